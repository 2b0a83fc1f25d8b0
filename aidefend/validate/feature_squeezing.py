"""Feature squeezing: how much the answer changes when the input is made coarser."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from aidefend._core.checks import check_callable, refuse
from aidefend._core.modules import Model
from aidefend.validate.asking_again import answer_changes
from aidefend.validate.autoencoders import Autoencoders
from aidefend.validate.detector import check_fit, check_wide_logits
from aidefend.validate.restoration import BitDepth, JPEGLike, MedianFilter, NonLocalMeans, TotalVariation

Squeezer = Callable[[Tensor], Tensor]
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (BitDepth, MedianFilter, NonLocalMeans, TotalVariation, JPEGLike)
}


@dataclasses.dataclass(frozen=True)
class FeatureSqueezing:
    """The largest L1 change of the softmax when the input loses detail: high where the answer hangs on detail.

    Guarantee: none under attack: an attacker who knows the squeezers finds inputs that they do not change.
    Args:
        squeezers: Callables x -> x. None = `BitDepth(5)`, `MedianFilter(2)`, `NonLocalMeans()` for images in (0, 1),
            and `BitDepth(5)` alone for inputs of other shapes. For digits and other line art take `BitDepth(1)`.
    Cost: One forward pass for each squeezer.
    Source: Xu, Evans, Qi 2018, equation 3 and section V-C.
    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 2).eval()
        >>> _ = model.load_state_dict(
        ...     {"weight": torch.tensor([[9.0], [-9.0]]), "bias": torch.tensor([-4.5, 4.5])}
        ... )
        >>> x = torch.tensor([[1.0], [0.6]])
        >>> score = FeatureSqueezing([BitDepth(1)]).score(x, model(x), x=x, model=model)
        >>> bool(score[0] == 0) and bool(score[1] > 0.2)
        True
    """

    squeezers: Sequence[Squeezer] | None = None
    name: ClassVar[str] = "feature-squeezing"
    uses_features: ClassVar[bool] = False
    uses_logits: ClassVar[bool] = True
    uses_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given = self.squeezers
        if given is None:
            return
        if not isinstance(given, list | tuple) or not given:
            raise refuse("a list of squeezers, or None", "squeezers", given, "Pass for example [BitDepth(1)]")
        for one in given:
            check_callable(one, "squeezers", "Pass callables from x to x")
        object.__setattr__(self, "squeezers", tuple(given))

    def fit(self, features: Tensor, logits: Tensor | None = None, labels: Tensor | None = None) -> "FeatureSqueezing":
        """Checks the rows; there is nothing to learn."""
        check_fit(features, check_wide_logits(features, logits), labels)
        return self

    def score(
        self, features: Tensor, logits: Tensor | None = None, *, x: Tensor | None = None, model: Model | None = None
    ) -> Tensor:
        """Max over squeezers |softmax f(x) - softmax f(s(x))|_1: (N,) in [0, 2], higher = stranger."""
        return answer_changes(features, logits, x, model, self._squeezed).amax(dim=0)

    def _squeezed(self, x: Tensor) -> list[Tensor]:
        chosen = self.squeezers
        if chosen is None:
            chosen = (BitDepth(), MedianFilter(), NonLocalMeans()) if x.ndim == 4 else (BitDepth(),)
        return [squeeze(x) for squeeze in chosen]

    def settings(self) -> Mapping[str, Any]:
        """The squeezers as JSON types.

        Raises: ConfigurationError: a squeezer that is not of this package.
        """
        if self.squeezers is None:
            return {"squeezers": None}
        for one in self.squeezers:
            if _KINDS.get(type(one).__name__) is not type(one):
                rule = f"squeezers of this package to save ({', '.join(sorted(_KINDS))})"
                raise refuse(rule, "squeezers", one, "Keep the detector yourself")
        described = [[type(one).__name__, dataclasses.asdict(one)] for one in self.squeezers]  # type: ignore[call-overload]
        return {"squeezers": described}

    def arrays(self) -> Mapping[str, Tensor]:
        """Nothing: there is nothing to learn."""
        return {}

    @classmethod
    def rebuild(cls, _: Autoencoders, squeezers: list[list[Any]] | None) -> "FeatureSqueezing":
        """The detector back from its `settings`."""
        return cls(None if squeezers is None else [_KINDS[kind](**settings) for kind, settings in squeezers])
