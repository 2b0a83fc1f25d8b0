"""Adversarial training: objectives for your own loop, which take an attack as an argument and hold no model."""

from aidefend.adversarial.awp import AWP as AWP
from aidefend.adversarial.fast_training import FastTraining as FastTraining
from aidefend.adversarial.mart import MART as MART
from aidefend.adversarial.nfgsm import NFGSM as NFGSM
from aidefend.adversarial.pgd_training import PGDTraining as PGDTraining
from aidefend.adversarial.trades import TRADES as TRADES

__all__ = ["AWP", "MART", "NFGSM", "TRADES", "FastTraining", "PGDTraining"]
