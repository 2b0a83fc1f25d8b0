"""Differentially private training around your own loop, and the account of what it cost."""

from aidefend.privacy.accounting import calibrate_noise as calibrate_noise
from aidefend.privacy.accounting import epsilon as epsilon
from aidefend.privacy.accounting import max_steps_within as max_steps_within
from aidefend.privacy.config import PrivacyConfig as PrivacyConfig
from aidefend.privacy.ledger import PrivacyLedger as PrivacyLedger
from aidefend.privacy.ledger_entries import LedgerCharge as LedgerCharge
from aidefend.privacy.ledger_entries import LedgerRun as LedgerRun
from aidefend.privacy.linear_fit import LinearFit as LinearFit
from aidefend.privacy.linear_fit import fit_linear as fit_linear
from aidefend.privacy.lora import add_lora as add_lora
from aidefend.privacy.lora import merge_lora as merge_lora
from aidefend.privacy.normalisation import Change as Change
from aidefend.privacy.normalisation import Fixed as Fixed
from aidefend.privacy.normalisation import fix as fix
from aidefend.privacy.private_statistics import private_histogram as private_histogram
from aidefend.privacy.private_statistics import private_mean as private_mean
from aidefend.privacy.private_statistics import private_quantile as private_quantile
from aidefend.privacy.readiness import Problem as Problem
from aidefend.privacy.readiness import check_private_ready as check_private_ready
from aidefend.privacy.scatter_features import ScatterFeatures as ScatterFeatures
from aidefend.privacy.standardizer import DPStandardizer as DPStandardizer
from aidefend.privacy.statement import PrivacyStatement as PrivacyStatement
from aidefend.privacy.training import PrivateTraining as PrivateTraining
from aidefend.privacy.training import make_private as make_private
from aidefend.privacy.tuner import PrivateTuner as PrivateTuner
from aidefend.privacy.tuner import Tuned as Tuned

__all__ = [
    "Change",
    "DPStandardizer",
    "Fixed",
    "LedgerCharge",
    "LedgerRun",
    "LinearFit",
    "PrivacyConfig",
    "PrivacyLedger",
    "PrivacyStatement",
    "PrivateTraining",
    "PrivateTuner",
    "Problem",
    "ScatterFeatures",
    "Tuned",
    "add_lora",
    "calibrate_noise",
    "check_private_ready",
    "epsilon",
    "fit_linear",
    "fix",
    "make_private",
    "max_steps_within",
    "merge_lora",
    "private_histogram",
    "private_mean",
    "private_quantile",
]
