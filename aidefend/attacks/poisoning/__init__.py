"""Attacks on training data: `attack.poison(dataset, seed=0)` gives the poisoned data set with its ground truth."""

from aidefend.attacks.poisoning.blend import Blend
from aidefend.attacks.poisoning.label_flip import LabelFlip
from aidefend.attacks.poisoning.patch import Patch
from aidefend.attacks.poisoning.poisoned import Poisoned, PoisonedDataset

__all__ = ["Blend", "LabelFlip", "Patch", "Poisoned", "PoisonedDataset"]
