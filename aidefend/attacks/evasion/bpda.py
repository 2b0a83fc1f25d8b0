"""Backward pass differentiable approximation: a preprocessing without a useful gradient, attacked all the same."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_callable, refuse
from aidefend._core.errors import IncompatibleModel


class BPDA(nn.Module):
    """A preprocessing whose forward pass is exact and whose backward pass is that of a stand-in.

    Guarantee: the outputs are those of `preprocess`, bit by bit. None about the strength of the attack: the stand-in
        has to resemble the preprocessing.
    Args:
        preprocess: x (N, ...) -> (N, ...), floating point; quantisation, JPEG, a purifier, a detector's refusal, ...
        backward: A differentiable stand-in with outputs of the same shape; None = the identity.
    Cost: One pass of `preprocess` forward; backward the stand-in's own cost.
    Source: Athalye et al. 2018 (ICML, "Obfuscated gradients"), section 4.1.
    Example:
        >>> pipeline = nn.Sequential(BPDA(lambda x: (x * 4).round() / 4), nn.Linear(2, 2))
        >>> x = torch.rand(3, 2, requires_grad=True)
        >>> bool(torch.autograd.grad(pipeline(x)[:, 0].sum(), x)[0].any())
        True
    """

    def __init__(
        self, preprocess: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.preprocess = check_callable(preprocess, "preprocess", "Pass a module or a function of x")
        if backward is not None:
            check_callable(backward, "backward", "Pass a differentiable stand-in, or None for the identity")
        self.backward = backward

    def forward(self, x: Tensor) -> Tensor:
        """Exactly preprocess(x), with the gradient of the stand-in."""
        with torch.no_grad():
            exact = self.preprocess(x)
        stand_in = x if self.backward is None else self.backward(x)
        _check_alike(exact, stand_in)
        passed: Tensor = _Through.apply(stand_in, exact)  # type: ignore[no-untyped-call]
        return passed


class _Through(torch.autograd.Function):
    """The second argument forward, the first one backward."""

    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, exact: Tensor) -> Tensor:
        ctx.dtype = stand_in.dtype
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


def _check_alike(exact: Any, stand_in: Any) -> None:
    if not isinstance(exact, Tensor) or not exact.is_floating_point():
        cure = "Return a floating point tensor"
        raise refuse("floating point outputs of preprocess", "preprocess(x)", exact, cure, IncompatibleModel)
    if not isinstance(stand_in, Tensor) or stand_in.shape != exact.shape:
        rule = f"a stand-in with outputs of shape {tuple(exact.shape)}"
        cure = "Pass backward= a differentiable function with outputs of the shape of preprocess(x)"
        raise refuse(rule, "backward(x)", stand_in, cure, IncompatibleModel)
