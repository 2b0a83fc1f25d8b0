"""Restore inputs before the model sees them."""

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from aidefend._core.checks import check_callable, refuse
from aidefend._core.modules import Model
from aidefend.validate.restoration import BitDepth, JPEGLike


@dataclasses.dataclass(frozen=True)
class Purify:
    """A chain of restorations as one optional step before a model.

    Guarantee: none: it takes away careless small changes. An attacker who knows of it attacks the model that `around`
        returns, through `aidefend.attacks.BPDA` where a step has no gradient; measure it so.
    Args:
        steps: Callables x -> x in their order, such as `BitDepth`, `MedianFilter`, `NonLocalMeans`, `TotalVariation`,
            `JPEGLike`; or None for `JPEGLike(75)`, then `BitDepth(5)`, for images in (0, 1).
    Cost: That of its steps.
    Source: Guo, Rana, Cisse, van der Maaten 2018; against adaptive attacks Athalye, Carlini, Wagner 2018.
    Example:
        >>> import torch
        >>> purify = Purify([BitDepth(1)])
        >>> purify(torch.tensor([[0.2, 0.6]])).tolist()
        [[0.0, 1.0]]
        >>> purify.around(nn.Flatten())(torch.tensor([[0.2, 0.6]])).tolist()
        [[0.0, 1.0]]
    """

    steps: Sequence[Callable[[Tensor], Tensor]] | None = None

    def __post_init__(self) -> None:
        steps = (JPEGLike(), BitDepth()) if self.steps is None else self.steps
        if not isinstance(steps, list | tuple) or not steps:
            raise refuse("a list of restorations", "steps", steps, "Pass for example [BitDepth(5)]")
        for step in steps:
            check_callable(step, "steps", "Pass callables from x to x")
        object.__setattr__(self, "steps", tuple(steps))

    def __call__(self, x: Tensor) -> Tensor:
        """The rows x (N, ...) restored, in their shape."""
        restored = x
        for step in self.steps or ():
            restored = step(restored)
            if not isinstance(restored, Tensor) or restored.shape != x.shape:
                raise refuse("a step that keeps the shape", "steps", step, "Return a tensor of the shape of x")
        return restored

    def around(self, model: Model) -> "PurifiedModel":
        """A module that restores x and then asks the model."""
        return PurifiedModel(self, check_callable(model, "model", "Pass a module or a callable"))


class PurifiedModel(nn.Module):
    """x -> model(purify(x)); see `Purify.around`."""

    def __init__(self, purify: Purify, model: Model) -> None:
        super().__init__()
        self.purify, self.model = purify, model

    @property
    def settings(self) -> list[str]:
        """What the steps are, in words: a guard that was calibrated behind others is refused."""
        return [
            repr(step) if dataclasses.is_dataclass(step) else getattr(step, "__qualname__", type(step).__qualname__)
            for step in self.purify.steps or ()
        ]

    def forward(self, x: Tensor) -> Tensor:
        """What the model answers to the restored rows."""
        outputs: Tensor = self.model(self.purify(x))
        return outputs
