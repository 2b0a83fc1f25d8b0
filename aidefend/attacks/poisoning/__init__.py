"""Attacks on training data: `attack.poison(dataset, seed=0)` gives the poisoned data set with its ground truth."""

from aidefend.attacks.poisoning.adaptive_blend import AdaptiveBlend
from aidefend.attacks.poisoning.adaptive_patch import AdaptivePatch
from aidefend.attacks.poisoning.all_to_all import AllToAll
from aidefend.attacks.poisoning.blend import Blend
from aidefend.attacks.poisoning.disguised import Disguised
from aidefend.attacks.poisoning.evading import Evading, Trial
from aidefend.attacks.poisoning.feature_collision import FeatureCollision
from aidefend.attacks.poisoning.gradient_matching import GradientMatching
from aidefend.attacks.poisoning.label_consistent import LabelConsistent
from aidefend.attacks.poisoning.label_flip import LabelFlip
from aidefend.attacks.poisoning.patch import Patch
from aidefend.attacks.poisoning.poisoned import Poisoned, PoisonedDataset
from aidefend.attacks.poisoning.sanitizer_aware import SanitizerAware
from aidefend.attacks.poisoning.sinusoid import Sinusoid
from aidefend.attacks.poisoning.source_targeted import SourceTargeted
from aidefend.attacks.poisoning.table_trigger import TableTrigger
from aidefend.attacks.poisoning.text_trigger import PoisonedTexts, TextTrigger
from aidefend.attacks.poisoning.warp import Warp

__all__ = [
    "AdaptiveBlend",
    "AdaptivePatch",
    "AllToAll",
    "Blend",
    "Disguised",
    "Evading",
    "FeatureCollision",
    "GradientMatching",
    "LabelConsistent",
    "LabelFlip",
    "Patch",
    "Poisoned",
    "PoisonedDataset",
    "PoisonedTexts",
    "SanitizerAware",
    "Sinusoid",
    "SourceTargeted",
    "TableTrigger",
    "TextTrigger",
    "Trial",
    "Warp",
]
