"""Attacks that ask whether a sample was in the training data. Scores: higher = rather a member."""

from aidefend.attacks.membership.lira import LiRA, half_splits, likelihood_ratio
from aidefend.attacks.membership.loss_threshold import LossThreshold
from aidefend.attacks.membership.outputs import ask, log_probabilities, read, scaled_logit
from aidefend.attacks.membership.training import TrainFn, isolated_streams, train_isolated

__all__ = [
    "LiRA",
    "LossThreshold",
    "TrainFn",
    "ask",
    "half_splits",
    "isolated_streams",
    "likelihood_ratio",
    "log_probabilities",
    "read",
    "scaled_logit",
    "train_isolated",
]
