"""Adversarial training: objectives for your own loop, which take an attack as an argument and hold no model."""

from aidefend.adversarial.awp import AWP as AWP
from aidefend.adversarial.bound_schedule import BoundSchedule as BoundSchedule
from aidefend.adversarial.certify_bounds import BoundCertificate as BoundCertificate
from aidefend.adversarial.certify_bounds import certify_bounds as certify_bounds
from aidefend.adversarial.consistency import Consistency as Consistency
from aidefend.adversarial.crown_ibp_training import CrownIBPTraining as CrownIBPTraining
from aidefend.adversarial.eps_warmup import EpsWarmup as EpsWarmup
from aidefend.adversarial.eps_warmup import with_eps_share as with_eps_share
from aidefend.adversarial.fast_training import FastTraining as FastTraining
from aidefend.adversarial.free_training import FreeTraining as FreeTraining
from aidefend.adversarial.gaussian import Gaussian as Gaussian
from aidefend.adversarial.grad_align import GradAlign as GradAlign
from aidefend.adversarial.hat import HAT as HAT
from aidefend.adversarial.ibp_training import IBPTraining as IBPTraining
from aidefend.adversarial.logit_pairing import LogitPairing as LogitPairing
from aidefend.adversarial.macer import MACER as MACER
from aidefend.adversarial.mart import MART as MART
from aidefend.adversarial.nfgsm import NFGSM as NFGSM
from aidefend.adversarial.overfitting_guard import OverfittingGuard as OverfittingGuard
from aidefend.adversarial.overfitting_guard import OverfittingVerdict as OverfittingVerdict
from aidefend.adversarial.pgd_training import PGDTraining as PGDTraining
from aidefend.adversarial.sabr import SABR as SABR
from aidefend.adversarial.smooth_adv import SmoothAdv as SmoothAdv
from aidefend.adversarial.smoothed_model import SmoothedModel as SmoothedModel
from aidefend.adversarial.smoothing_certificate import SmoothingCertificate as SmoothingCertificate
from aidefend.adversarial.trades import TRADES as TRADES
from aidefend.adversarial.weight_averaging import EMA as EMA
from aidefend.adversarial.weight_averaging import SWA as SWA

__all__ = [
    "AWP",
    "EMA",
    "HAT",
    "MACER",
    "MART",
    "NFGSM",
    "SABR",
    "SWA",
    "TRADES",
    "BoundCertificate",
    "BoundSchedule",
    "Consistency",
    "CrownIBPTraining",
    "EpsWarmup",
    "FastTraining",
    "FreeTraining",
    "Gaussian",
    "GradAlign",
    "IBPTraining",
    "LogitPairing",
    "OverfittingGuard",
    "OverfittingVerdict",
    "PGDTraining",
    "SmoothAdv",
    "SmoothedModel",
    "SmoothingCertificate",
    "certify_bounds",
    "with_eps_share",
]
