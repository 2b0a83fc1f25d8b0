"""How badly the user's autoencoder rebuilds a row."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from aidefend._core.checks import check_callable, check_choice, check_same_rows, check_tensor, refuse
from aidefend._core.errors import IncompatibleModel
from aidefend._core.modules import Model, naming_the_model, training_layers
from aidefend.validate.autoencoders import Autoencoders
from aidefend.validate.detector import check_fit, check_outputs, wide
from aidefend.validate.model_identity import identify


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Mean squared error of an autoencoder that was trained on clean rows: high for what it never saw.

    Works for any input and any model, regression too. The autoencoder is yours: it is asked, never trained. A file of
    `Guard.save` or `save_detector` holds a digest of its structure and weights alone, and loading takes the very same
    module again, so only an `nn.Module` can be saved.
    Guarantee: none under attack. An autoencoder that copies everything sees nothing: calibrate, and look at the
        share of strange rows that is found.
    Args:
        autoencoder: From rows to rows of the same shape; in eval mode.
        on: "inputs" or "features": what it rebuilds.
    Cost: One pass of the autoencoder.
    Source: Japkowicz, Myers, Gluck 1995; against adversarial inputs Meng, Chen 2017.
    Example:
        >>> flat = lambda x: x.mean(dim=1, keepdim=True).expand_as(x)
        >>> x = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
        >>> Reconstruction(flat).score(x, x=x).tolist()
        [0.0, 1.0]
    """

    autoencoder: Model
    on: Literal["inputs", "features"] = "inputs"
    _fitted: Mapping[str, str] | None = dataclasses.field(default=None, kw_only=True, repr=False, compare=False)
    name: ClassVar[str] = "reconstruction"
    uses_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_callable(self.autoencoder, "autoencoder", "Pass a module from rows to rows of the same shape")
        check_choice(self.on, ("inputs", "features"), "on")

    @property
    def uses_features(self) -> bool:
        """Whether it rebuilds features."""
        return self.on == "features"

    def fit(self, features: Tensor, logits: Tensor | None = None, labels: Tensor | None = None) -> "Reconstruction":
        """Checks the rows, and takes note of the autoencoder's weights, which were trained before."""
        check_fit(features, logits, labels)
        return dataclasses.replace(self, _fitted=identify(self.autoencoder))

    @classmethod
    def rebuild(
        cls, autoencoders: Autoencoders, on: Literal["inputs", "features"], identity: dict[str, str]
    ) -> "Reconstruction":
        """The detector back from its `settings`, around the autoencoder of that identity."""
        return cls(autoencoders.of(identity), on, _fitted=identity)

    def settings(self) -> Mapping[str, Any]:
        """What it rebuilds, and the identity of the autoencoder.

        Raises: ConfigurationError: the autoencoder is no module, or its weights changed after the fit.
        """
        identity = identify(self.autoencoder)
        if not identity["weights"]:
            cure = "Wrap the function in an nn.Module"
            raise refuse("an nn.Module as autoencoder, to save it by its weights", "autoencoder", "a callable", cure)
        if self._fitted not in (None, identity):
            cure = "Calibrate again: the scores that were calibrated are not those of these weights"
            raise refuse("the weights at the fit", "autoencoder", identity["weights"][:16], cure)
        return {"on": self.on, "identity": identity}

    def arrays(self) -> Mapping[str, Tensor]:
        """Nothing: the weights stay with their owner."""
        return {}

    def score(
        self, features: Tensor, logits: Tensor | None = None, *, x: Tensor | None = None, model: Model | None = None
    ) -> Tensor:
        """Mean (row - autoencoder(row))^2: (N,), higher = stranger."""
        check_outputs(features, logits)
        rows = features if self.on == "features" else x
        if rows is None:
            raise refuse("the inputs", "x", None, "Pass x= to score, or rebuild features with on='features'")
        check_same_rows(("features", "x"), len(features), len(check_tensor(rows, "x", floating=True)))
        if offenders := training_layers(self.autoencoder):
            raise IncompatibleModel("Expected an autoencoder in eval mode.", offenders)
        if len(rows) == 0:
            return wide(rows).new_zeros(0)
        with naming_the_model(rows):
            rebuilt = self.autoencoder(rows)
        if not isinstance(rebuilt, torch.Tensor) or rebuilt.shape != rows.shape:
            cure = "Pass one whose output has the shape of its input"
            raise refuse(f"an autoencoder that returns the shape {tuple(rows.shape)}", "autoencoder", rebuilt, cure)
        return (wide(rebuilt) - wide(rows)).square().reshape(len(rows), -1).mean(dim=1)
