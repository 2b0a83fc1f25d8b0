"""Which input features moved a logit: saliency, integrated gradients, SmoothGrad, occlusion."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from aidefend._core.checks import (
    check_choice,
    check_int,
    check_kind,
    check_labels,
    check_logits,
    check_number,
    check_tensor,
    refuse,
)
from aidefend._core.modules import Model, evaluate, freeze, naming_the_model, preserve
from aidefend._core.random import make_generator, normal

Method = Literal["saliency", "integrated_gradients", "smoothgrad", "occlusion"]
METHODS: tuple[Method, ...] = ("saliency", "integrated_gradients", "smoothgrad", "occlusion")


@dataclasses.dataclass(frozen=True, eq=False)
class Attribution:
    """Feature attributions of a batch.

    Args:
        values: The shape and dtype of x. Absolute for saliency, else signed: positive raises the logit.
        target: (N,) the explained classes.
        completeness_error: (N,) |sum of values - (f(x) - f(baseline))| in logits for integrated gradients, which sum up
            to the difference exactly if the integral is exact; NaN for the methods without that property.
        method: How they were computed.
    """

    values: Tensor
    target: Tensor
    completeness_error: Tensor
    method: Method

    def mass(self) -> Tensor:
        """Share of the absolute attribution on each feature, summing to one a sample; uniform if all are zero."""
        size = self.values.abs().flatten(1).double()
        total = size.sum(dim=1, keepdim=True)
        even = torch.full_like(size, 1 / max(1, size.shape[1]))
        share: Tensor = torch.where(total > 0, size / total.clamp(min=torch.finfo(size.dtype).tiny), even)
        return share.reshape(self.values.shape)


def attribute(
    model: Model,
    x: Tensor,
    target: Tensor | int,
    method: Method = "integrated_gradients",
    *,
    baseline: Tensor | float = 0.0,
    steps: int = 32,
    samples: int = 16,
    noise: float = 0.1,
    window: int = 4,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> Attribution:
    """Attribute the logit of a class to the input features. The model runs in eval mode and is left as it was.

    Guarantee: integrated gradients report their own error; nothing is promised about faithfulness (`sanity_check`).
    Args:
        model: Callable from (N, ...) to logits (N, K).
        x: (N, ...) float; images, tables, signals.
        target: Class of each sample, (N,) integers, or one class for all.
        method: "saliency" |df/dx|; "integrated_gradients" along the line from the baseline; "smoothgrad" the mean
            gradient under Gaussian noise; "occlusion" the drop of the logit when a window is set to the baseline.
        baseline: Number or tensor that broadcasts to x[0]; for integrated gradients and occlusion.
        steps: Gauss-Legendre points of the integral, >= 1.
        samples: Noisy copies for SmoothGrad, >= 1.
        noise: Standard deviation of that noise, in the units of x.
        window: Side of the occluding window on the last one (2-D, 3-D input) or two dimensions, >= 1.
        batch_size: Rows in memory at once, copies included.
        generator: For SmoothGrad.
    Returns: The attributions.
    Raises: ConfigurationError: x not finite, target out of range, the model does not return logits.
    Cost: forward and backward passes a sample: 1 (saliency), `steps` and two forwards (integrated gradients), `samples`
        (SmoothGrad); one forward for each window position (occlusion).
    Source: Simonyan et al. 2014; Sundararajan et al. 2017 (Gauss-Legendre instead of Riemann); Smilkov et al. 2017;
        Zeiler, Fergus 2014.
    Example:
        >>> weight = torch.tensor([[1.0, -2.0], [0.0, 0.0]])
        >>> attribute(lambda x: x @ weight.T, torch.tensor([[3.0, 1.0]]), 0, steps=4).values
        tensor([[ 3., -2.]])
    """
    check_choice(method, METHODS, "method")
    check_tensor(x, "x", floating=True)
    for name, value in (("steps", steps), ("samples", samples), ("window", window), ("batch_size", batch_size)):
        check_int(value, name)
    noise = check_number(noise, "noise", 0.0)
    labels = _targets(target, x)
    start = _baseline(baseline, x)
    unknown = torch.full((len(x),), torch.nan, dtype=torch.float64)
    with preserve(model):
        evaluate(model)
        freeze(model)
        look = _Look(model, labels, batch_size)
        if method == "saliency":
            return Attribution(look.gradient(x, x[None]).abs(), labels, unknown, method)
        if method == "smoothgrad":
            return Attribution(look.gradient(x, _noisy(x, samples, noise, generator)), labels, unknown, method)
        if method == "occlusion":
            return Attribution(_occlusion(look, x, start, window), labels, unknown, method)
        values = look.integral(x, start, steps)
        gap = (look.logit(x) - look.logit(start)).double()
        error = (values.flatten(1).double().sum(dim=1) - gap).abs().cpu()
        return Attribution(values, labels, error, method)


class _Look:
    """The logit of each sample's class, and its gradient, in blocks of bounded size."""

    def __init__(self, model: Model, labels: Tensor, batch_size: int) -> None:
        self._model, self._labels, self._batch_size = model, labels, batch_size

    def logit(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            parts = [self._of(x[rows], rows) for rows in self._blocks(len(x))]
        return torch.cat(parts) if parts else x.new_zeros(0)

    def gradient(self, x: Tensor, copies: Tensor) -> Tensor:
        """Mean gradient over copies (S, N, ...) of x."""
        total = torch.zeros_like(x)
        for points in copies:
            for rows in self._blocks(len(x)):
                total[rows] += self._gradient_of(points[rows], rows)
        return total / len(copies)

    def integral(self, x: Tensor, start: Tensor, steps: int) -> Tensor:
        """(x - start) times the mean gradient along the line between them."""
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        total = torch.zeros_like(x)
        for rows in self._blocks(len(x)):
            step = x[rows] - start[rows]
            for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
                total[rows] += float(weight) * self._gradient_of(start[rows] + float(node) * step, rows)
            total[rows] *= step
        return total

    def _gradient_of(self, points: Tensor, rows: slice) -> Tensor:
        with torch.enable_grad():
            leaf = points.detach().requires_grad_()
            logit = self._of(leaf, rows).sum()
            with naming_the_model(leaf):
                (gradient,) = torch.autograd.grad(logit, leaf)
        return gradient

    def _of(self, x: Tensor, rows: slice) -> Tensor:
        with naming_the_model(x):
            outputs = check_logits(self._model(x), len(x))
        labels = self._labels[rows].to(outputs.device)
        check_labels(labels, len(x), outputs.shape[1], "target")
        return outputs.gather(1, labels[:, None])[:, 0]

    def _blocks(self, n: int) -> Iterator[slice]:
        for first in range(0, n, self._batch_size):
            yield slice(first, min(n, first + self._batch_size))


def _noisy(x: Tensor, samples: int, noise: float, generator: torch.Generator | None) -> Tensor:
    stream = make_generator(generator)
    return torch.stack([x + noise * normal(tuple(x.shape), stream, x) for _ in range(samples)])


def _occlusion(look: _Look, x: Tensor, start: Tensor, window: int) -> Tensor:
    """Drop of the logit for each window position, shared evenly by the positions that cover a feature."""
    whole = look.logit(x)
    total, cover = torch.zeros_like(x), torch.zeros_like(x[:1])
    for place in _windows(x, window):
        hidden = x.clone()
        hidden[place] = start[place]
        drop = (whole - look.logit(hidden)).to(x.device)
        total[place] += drop.reshape(-1, *[1] * (x.ndim - 1))
        cover[place] += 1
    return total / cover.clamp(min=1)


def _windows(x: Tensor, window: int) -> Iterator[tuple[slice | type(...), ...]]:  # type: ignore[valid-type]
    stride = max(1, window // 2)
    spans = [_spans(x.shape[-1], window, stride)]
    if x.ndim >= 4:
        spans.insert(0, _spans(x.shape[-2], window, stride))
    if len(spans) == 1:
        for span in spans[0]:
            yield (..., span)
        return
    for top in spans[0]:
        for left in spans[1]:
            yield (..., top, left)


def _spans(size: int, window: int, stride: int) -> list[slice]:
    last = max(0, size - window)
    starts = sorted({*range(0, last + 1, stride), last})
    return [slice(first, first + window) for first in starts]


def _targets(target: Tensor | int, x: Tensor) -> Tensor:
    if isinstance(target, int) and not isinstance(target, bool):
        target = torch.full((len(x),), check_int(target, "target", 0), dtype=torch.int64)
    return check_labels(target, len(x), name="target")


def _baseline(baseline: Tensor | float, x: Tensor) -> Tensor:
    check_kind(baseline, (Tensor, float, int), "baseline", "Pass a number or a tensor of the shape of one sample")
    if isinstance(baseline, Tensor) and baseline.ndim:
        check_tensor(baseline, "baseline", finite=False)
    try:
        return torch.as_tensor(baseline, dtype=x.dtype, device=x.device).expand_as(x)
    except (RuntimeError, OverflowError) as error:
        rule = f"a baseline that fits one sample {tuple(x.shape[1:])}"
        raise refuse(rule, "baseline", baseline, "Pass a number or a tensor of that shape") from error
