"""What the adversary does. Knows no defense: every attack is a frozen configuration, called on any model.

Sub-rooms: evasion, poisoning, membership, inversion, extraction, federated. Their public names are also reachable here
(`aidefend.attacks.PGD`); a sub-room adds one sorted line for each to the table below.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aidefend.attacks.evasion import APGD as APGD
    from aidefend.attacks.evasion import BPDA as BPDA
    from aidefend.attacks.evasion import DDN as DDN
    from aidefend.attacks.evasion import EOT as EOT
    from aidefend.attacks.evasion import FMN as FMN
    from aidefend.attacks.evasion import NES as NES
    from aidefend.attacks.evasion import PGD as PGD
    from aidefend.attacks.evasion import AdversarialPatch as AdversarialPatch
    from aidefend.attacks.evasion import AttackResult as AttackResult
    from aidefend.attacks.evasion import CarliniWagner as CarliniWagner
    from aidefend.attacks.evasion import HopSkipJump as HopSkipJump
    from aidefend.attacks.evasion import SigmaZero as SigmaZero
    from aidefend.attacks.evasion import Square as Square
    from aidefend.attacks.evasion import Transfer as Transfer
    from aidefend.attacks.evasion import UniversalPerturbation as UniversalPerturbation
    from aidefend.attacks.extraction import Extraction as Extraction
    from aidefend.attacks.extraction import ExtractionResult as ExtractionResult
    from aidefend.attacks.inversion import ClassInversion as ClassInversion
    from aidefend.attacks.inversion import InversionResult as InversionResult
    from aidefend.attacks.membership import LiRA as LiRA
    from aidefend.attacks.membership import LossThreshold as LossThreshold
    from aidefend.attacks.poisoning import AdaptiveBlend as AdaptiveBlend
    from aidefend.attacks.poisoning import AdaptivePatch as AdaptivePatch
    from aidefend.attacks.poisoning import AllToAll as AllToAll
    from aidefend.attacks.poisoning import Blend as Blend
    from aidefend.attacks.poisoning import Disguised as Disguised
    from aidefend.attacks.poisoning import Evading as Evading
    from aidefend.attacks.poisoning import FeatureCollision as FeatureCollision
    from aidefend.attacks.poisoning import GradientMatching as GradientMatching
    from aidefend.attacks.poisoning import LabelConsistent as LabelConsistent
    from aidefend.attacks.poisoning import LabelFlip as LabelFlip
    from aidefend.attacks.poisoning import Patch as Patch
    from aidefend.attacks.poisoning import Poisoned as Poisoned
    from aidefend.attacks.poisoning import SanitizerAware as SanitizerAware
    from aidefend.attacks.poisoning import Sinusoid as Sinusoid
    from aidefend.attacks.poisoning import SourceTargeted as SourceTargeted
    from aidefend.attacks.poisoning import TableTrigger as TableTrigger
    from aidefend.attacks.poisoning import TextTrigger as TextTrigger
    from aidefend.attacks.poisoning import Trial as Trial
    from aidefend.attacks.poisoning import Warp as Warp

_HOMES = {
    "APGD": "evasion",
    "AdaptiveBlend": "poisoning",
    "AdaptivePatch": "poisoning",
    "AdversarialPatch": "evasion",
    "AllToAll": "poisoning",
    "AttackResult": "evasion",
    "BPDA": "evasion",
    "Blend": "poisoning",
    "CarliniWagner": "evasion",
    "ClassInversion": "inversion",
    "DDN": "evasion",
    "Disguised": "poisoning",
    "EOT": "evasion",
    "Evading": "poisoning",
    "Extraction": "extraction",
    "ExtractionResult": "extraction",
    "FMN": "evasion",
    "FeatureCollision": "poisoning",
    "GradientMatching": "poisoning",
    "HopSkipJump": "evasion",
    "InversionResult": "inversion",
    "LabelConsistent": "poisoning",
    "LabelFlip": "poisoning",
    "LiRA": "membership",
    "LossThreshold": "membership",
    "NES": "evasion",
    "PGD": "evasion",
    "Patch": "poisoning",
    "Poisoned": "poisoning",
    "SanitizerAware": "poisoning",
    "SigmaZero": "evasion",
    "Sinusoid": "poisoning",
    "SourceTargeted": "poisoning",
    "Square": "evasion",
    "TableTrigger": "poisoning",
    "TextTrigger": "poisoning",
    "Transfer": "evasion",
    "Trial": "poisoning",
    "UniversalPerturbation": "evasion",
    "Warp": "poisoning",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"aidefend.attacks.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'aidefend.attacks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
