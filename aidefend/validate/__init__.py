"""Input validation in service: hard checks, calibrated detectors, hardened outputs, and a guard that joins them."""

from aidefend.validate.attackable import AttackableGuard
from aidefend.validate.collaborators import Budget, Drift, Log, MetricsSink, Policy, Queries
from aidefend.validate.conformal import Calibration
from aidefend.validate.conformal_law import least_calibration_rows
from aidefend.validate.consistency import Consistency
from aidefend.validate.decision import GuardDecision
from aidefend.validate.detector import Detector, FittedDetector, FittedInputDetector
from aidefend.validate.detector_file import load_detector, save_detector
from aidefend.validate.ensemble import Ensemble, FittedEnsemble
from aidefend.validate.feature_squeezing import FeatureSqueezing
from aidefend.validate.guard import Guard
from aidefend.validate.image_spec import ImageSpec
from aidefend.validate.keyed_noise import KeyedNoise
from aidefend.validate.local_dimension import LocalDimension
from aidefend.validate.logit_scores import GEN, Energy, Entropy, MaxLogit, MaxSoftmax
from aidefend.validate.mahalanobis import Mahalanobis, RelativeMahalanobis
from aidefend.validate.nearest_neighbours import NearestNeighbours
from aidefend.validate.outputs import LabelOnly, Rounded, Tempered, TopK
from aidefend.validate.purify import PurifiedModel, Purify
from aidefend.validate.queries.monitor import QueryMonitor, QueryStanding
from aidefend.validate.queries.redis_store import RedisStore
from aidefend.validate.queries.sqlite_store import SQLiteStore
from aidefend.validate.queries.store import Capacity, MemoryStore, QueryStore, StoreHealth
from aidefend.validate.reconstruction import Reconstruction
from aidefend.validate.restoration import BitDepth, JPEGLike, MedianFilter, NonLocalMeans, TotalVariation
from aidefend.validate.reverse_sigmoid import ReverseSigmoid
from aidefend.validate.shifts import Shifts
from aidefend.validate.spec import InputSpec
from aidefend.validate.spec_result import SpecResult
from aidefend.validate.table_columns import Column
from aidefend.validate.table_spec import TableSpec
from aidefend.validate.text_spec import TextSpec
from aidefend.validate.virtual_logit import ViM

__all__ = [
    "GEN",
    "AttackableGuard",
    "BitDepth",
    "Budget",
    "Calibration",
    "Capacity",
    "Column",
    "Consistency",
    "Detector",
    "Drift",
    "Energy",
    "Ensemble",
    "Entropy",
    "FeatureSqueezing",
    "FittedDetector",
    "FittedEnsemble",
    "FittedInputDetector",
    "Guard",
    "GuardDecision",
    "ImageSpec",
    "InputSpec",
    "JPEGLike",
    "KeyedNoise",
    "LabelOnly",
    "LocalDimension",
    "Log",
    "Mahalanobis",
    "MaxLogit",
    "MaxSoftmax",
    "MedianFilter",
    "MemoryStore",
    "MetricsSink",
    "NearestNeighbours",
    "NonLocalMeans",
    "Policy",
    "PurifiedModel",
    "Purify",
    "Queries",
    "QueryMonitor",
    "QueryStanding",
    "QueryStore",
    "Reconstruction",
    "RedisStore",
    "RelativeMahalanobis",
    "ReverseSigmoid",
    "Rounded",
    "SQLiteStore",
    "Shifts",
    "SpecResult",
    "StoreHealth",
    "TableSpec",
    "Tempered",
    "TextSpec",
    "TopK",
    "TotalVariation",
    "ViM",
    "least_calibration_rows",
    "load_detector",
    "save_detector",
]
