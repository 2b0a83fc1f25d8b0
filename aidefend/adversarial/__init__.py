"""Adversarial training: objectives for your own loop, which take an attack as an argument and hold no model."""

from aidefend.adversarial.crafting import cross_entropy as cross_entropy
from aidefend.adversarial.pgd_training import PGDTraining as PGDTraining
from aidefend.adversarial.trades import TRADES as TRADES
from aidefend.adversarial.trades import kl_divergence as kl_divergence

__all__ = ["TRADES", "PGDTraining", "cross_entropy", "kl_divergence"]
