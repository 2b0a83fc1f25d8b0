"""Training data: find structured poison without being told where it is, and keep it out without touching the data."""

from aidefend._core.samples import Samples
from aidefend.sanitize.activation_clustering import ActivationClustering, ClusterEvidence
from aidefend.sanitize.batch import screen_batch
from aidefend.sanitize.beatrix import Beatrix
from aidefend.sanitize.choose import Detector
from aidefend.sanitize.confident_learning import ConfidentLearning
from aidefend.sanitize.decisions import Decisions
from aidefend.sanitize.election import Certificate
from aidefend.sanitize.feature_store import FeatureStore
from aidefend.sanitize.features import Features, extract_features
from aidefend.sanitize.influence import Influence
from aidefend.sanitize.kept_sampler import KeptSampler
from aidefend.sanitize.near_duplicates import NearDuplicates
from aidefend.sanitize.neighbour_disagreement import NeighbourDisagreement
from aidefend.sanitize.outliers import Outliers
from aidefend.sanitize.partition_ensemble import PartitionEnsemble
from aidefend.sanitize.repair import RepairTest, ReversedTriggers, repair, retest, reverse_trigger
from aidefend.sanitize.robust_loss import robust_loss
from aidefend.sanitize.scan import Scan, ScanEvidence
from aidefend.sanitize.schema import DatasetSchema
from aidefend.sanitize.screen import screen
from aidefend.sanitize.screen_report import ScreenReport
from aidefend.sanitize.source_evidence import SourceEvidence, SourceScore
from aidefend.sanitize.sources import Source, TrustedSources, verify_sources
from aidefend.sanitize.spectral_signature import SpectralSignature
from aidefend.sanitize.spectre import Spectre
from aidefend.sanitize.stream import StreamReport, screen_stream
from aidefend.sanitize.text_encoder import TextEncoder
from aidefend.sanitize.training_dynamics import TrainingDynamics, Trajectory
from aidefend.sanitize.trigger_consistency import TriggerConsistency

__all__ = [
    "ActivationClustering",
    "Beatrix",
    "Certificate",
    "ClusterEvidence",
    "ConfidentLearning",
    "DatasetSchema",
    "Decisions",
    "Detector",
    "FeatureStore",
    "Features",
    "Influence",
    "KeptSampler",
    "NearDuplicates",
    "NeighbourDisagreement",
    "Outliers",
    "PartitionEnsemble",
    "RepairTest",
    "ReversedTriggers",
    "Samples",
    "Scan",
    "ScanEvidence",
    "ScreenReport",
    "Source",
    "SourceEvidence",
    "SourceScore",
    "SpectralSignature",
    "Spectre",
    "StreamReport",
    "TextEncoder",
    "TrainingDynamics",
    "Trajectory",
    "TriggerConsistency",
    "TrustedSources",
    "extract_features",
    "repair",
    "retest",
    "reverse_trigger",
    "robust_loss",
    "screen",
    "screen_batch",
    "screen_stream",
    "verify_sources",
]
