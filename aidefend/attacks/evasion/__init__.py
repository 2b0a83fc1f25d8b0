"""Evasion: inputs that a model gets wrong, inside a stated threat."""

from aidefend.attacks.evasion.apgd import APGD as APGD
from aidefend.attacks.evasion.losses import cross_entropy as cross_entropy
from aidefend.attacks.evasion.losses import dlr as dlr
from aidefend.attacks.evasion.losses import margin as margin
from aidefend.attacks.evasion.pgd import PGD as PGD
from aidefend.attacks.evasion.result import AttackResult as AttackResult

__all__ = ["APGD", "PGD", "AttackResult", "cross_entropy", "dlr", "margin"]
