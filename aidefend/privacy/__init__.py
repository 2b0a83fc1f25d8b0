"""Differentially private training around your own loop, and the account of what it cost."""

from aidefend.privacy.accounting import epsilon as epsilon
from aidefend.privacy.config import PrivacyConfig as PrivacyConfig
from aidefend.privacy.ledger import LedgerRun as LedgerRun
from aidefend.privacy.ledger import PrivacyLedger as PrivacyLedger
from aidefend.privacy.linear_fit import LinearFit as LinearFit
from aidefend.privacy.linear_fit import fit_linear as fit_linear
from aidefend.privacy.readiness import Problem as Problem
from aidefend.privacy.readiness import check_private_ready as check_private_ready
from aidefend.privacy.scatter_features import ScatterFeatures as ScatterFeatures
from aidefend.privacy.statement import PrivacyStatement as PrivacyStatement
from aidefend.privacy.training import PrivateTraining as PrivateTraining
from aidefend.privacy.training import make_private as make_private

__all__ = [
    "LedgerRun",
    "LinearFit",
    "PrivacyConfig",
    "PrivacyLedger",
    "PrivacyStatement",
    "PrivateTraining",
    "Problem",
    "ScatterFeatures",
    "check_private_ready",
    "epsilon",
    "fit_linear",
    "make_private",
]
