"""Evasion: inputs that a model gets wrong, inside a stated threat."""

from aidefend.attacks.evasion.adversarial_patch import AdversarialPatch as AdversarialPatch
from aidefend.attacks.evasion.apgd import APGD as APGD
from aidefend.attacks.evasion.bpda import BPDA as BPDA
from aidefend.attacks.evasion.carlini_wagner import CarliniWagner as CarliniWagner
from aidefend.attacks.evasion.ddn import DDN as DDN
from aidefend.attacks.evasion.eot import EOT as EOT
from aidefend.attacks.evasion.fmn import FMN as FMN
from aidefend.attacks.evasion.hop_skip_jump import HopSkipJump as HopSkipJump
from aidefend.attacks.evasion.losses import cross_entropy as cross_entropy
from aidefend.attacks.evasion.losses import dlr as dlr
from aidefend.attacks.evasion.losses import margin as margin
from aidefend.attacks.evasion.nes import NES as NES
from aidefend.attacks.evasion.pgd import PGD as PGD
from aidefend.attacks.evasion.result import AttackResult as AttackResult
from aidefend.attacks.evasion.sigma_zero import SigmaZero as SigmaZero
from aidefend.attacks.evasion.square import Square as Square
from aidefend.attacks.evasion.transfer import Transfer as Transfer
from aidefend.attacks.evasion.universal import UniversalPerturbation as UniversalPerturbation

__all__ = [
    "APGD",
    "BPDA",
    "DDN",
    "EOT",
    "FMN",
    "NES",
    "PGD",
    "AdversarialPatch",
    "AttackResult",
    "CarliniWagner",
    "HopSkipJump",
    "SigmaZero",
    "Square",
    "Transfer",
    "UniversalPerturbation",
    "cross_entropy",
    "dlr",
    "margin",
]
