"""Differentially private training around your own loop, and the account of what it cost."""

from aidefend.privacy.accounting import epsilon as epsilon
from aidefend.privacy.config import PrivacyConfig as PrivacyConfig
from aidefend.privacy.ledger import LedgerRun as LedgerRun
from aidefend.privacy.ledger import PrivacyLedger as PrivacyLedger
from aidefend.privacy.linear_fit import LinearFit as LinearFit
from aidefend.privacy.linear_fit import fit_linear as fit_linear
from aidefend.privacy.lora import add_lora as add_lora
from aidefend.privacy.lora import merge_lora as merge_lora
from aidefend.privacy.normalisation import Change as Change
from aidefend.privacy.normalisation import Fixed as Fixed
from aidefend.privacy.normalisation import fix as fix
from aidefend.privacy.readiness import Problem as Problem
from aidefend.privacy.readiness import check_private_ready as check_private_ready
from aidefend.privacy.scatter_features import ScatterFeatures as ScatterFeatures
from aidefend.privacy.statement import PrivacyStatement as PrivacyStatement
from aidefend.privacy.training import PrivateTraining as PrivateTraining
from aidefend.privacy.training import make_private as make_private

__all__ = [
    "Change",
    "Fixed",
    "LedgerRun",
    "LinearFit",
    "PrivacyConfig",
    "PrivacyLedger",
    "PrivacyStatement",
    "PrivateTraining",
    "Problem",
    "ScatterFeatures",
    "add_lora",
    "check_private_ready",
    "epsilon",
    "fit_linear",
    "fix",
    "make_private",
    "merge_lora",
]
