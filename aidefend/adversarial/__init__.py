"""Adversarial training: objectives for your own loop, which take an attack as an argument and hold no model."""

from aidefend.adversarial.pgd_training import PGDTraining as PGDTraining
from aidefend.adversarial.trades import TRADES as TRADES

__all__ = ["TRADES", "PGDTraining"]
