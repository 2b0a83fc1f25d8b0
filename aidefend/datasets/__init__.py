"""The small real data set that ships with the package, and readers for users' own copies. Nothing is downloaded."""

from aidefend.datasets.copies import find, load
from aidefend.datasets.idx import read_idx
from aidefend.datasets.image_data import ImageData
from aidefend.datasets.mnist import mnist_subset
from aidefend.datasets.npz import read_npz

__all__ = ["ImageData", "find", "load", "mnist_subset", "read_idx", "read_npz"]
