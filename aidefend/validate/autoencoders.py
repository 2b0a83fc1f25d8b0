"""Autoencoders that a file names by digest and its reader hands over: the very ones, and no others."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from aidefend._core.checks import check_kind, refuse
from aidefend.validate.model_identity import identify


class Autoencoders:
    """What the caller of a loader gave, found by identity: the order does not matter.

    Args:
        given: None, one module, or a list of modules.
    Raises: ConfigurationError: something else.
    """

    def __init__(self, given: Any = None) -> None:
        modules = given if isinstance(given, list | tuple) else [] if given is None else [given]
        cure = "Pass the module that Reconstruction was given, or a list of them"
        self._given = [(check_kind(module, nn.Module, "autoencoder", cure), identify(module)) for module in modules]
        self._used: set[int] = set()

    def of(self, identity: Mapping[str, str]) -> nn.Module:
        """The module with this identity.

        Raises: ConfigurationError: none was given, or only others; says whether structure or weights differ.
        """
        for place, (module, found) in enumerate(self._given):
            if found == identity:
                self._used.add(place)
                return module
        like = [found for _, found in self._given if found["structure"] == identity["structure"]]
        what = "weights (the structure is the same)" if like else "autoencoder (its modules or shapes differ)"
        rule = f"the {what if self._given else 'autoencoder'} that Reconstruction was saved with"
        value = [found["weights"][:16] for _, found in self._given] or None
        cure = f"Pass autoencoder= with the weights {identity['weights'][:16]}..., or calibrate again"
        raise refuse(rule, "autoencoder", value, cure)

    def check_all_used(self) -> None:
        """Refuse one that no detector asked for: its owner believes that it guards something."""
        if left := len(self._given) - len(self._used):
            rule = "only autoencoders that a detector of the file was saved with"
            raise refuse(rule, "autoencoder", f"{left} that none was", "Leave it out")
