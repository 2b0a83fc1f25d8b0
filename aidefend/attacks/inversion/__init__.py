"""Attacks that reconstruct what a model was trained on."""

from aidefend.attacks.inversion.class_inversion import ClassInversion, InversionResult

__all__ = ["ClassInversion", "InversionResult"]
