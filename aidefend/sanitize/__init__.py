"""Training data: find structured poison without being told where it is, and keep it out without touching the data."""

from aidefend.sanitize.activation_clustering import ActivationClustering, ClusterEvidence
from aidefend.sanitize.batch import screen_batch
from aidefend.sanitize.confident_learning import ConfidentLearning
from aidefend.sanitize.features import Features, extract_features
from aidefend.sanitize.neighbour_disagreement import NeighbourDisagreement
from aidefend.sanitize.schema import DatasetSchema
from aidefend.sanitize.screen import Detector, screen
from aidefend.sanitize.sources import Source, TrustedSources, verify_sources
from aidefend.sanitize.spectral_signature import SpectralSignature

__all__ = [
    "ActivationClustering",
    "ClusterEvidence",
    "ConfidentLearning",
    "DatasetSchema",
    "Detector",
    "Features",
    "NeighbourDisagreement",
    "Source",
    "SpectralSignature",
    "TrustedSources",
    "extract_features",
    "screen",
    "screen_batch",
    "verify_sources",
]
