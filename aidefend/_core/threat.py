"""What the adversary may do to an input: the one description for attacks, objectives, certificates and reports."""

import dataclasses
import hashlib
from typing import Any, Literal

import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_inside, check_tensor, refuse
from aidefend._core.errors import ThreatModelError
from aidefend._core.random import make_generator, normal, uniform

Norm = Literal["linf", "l2"]
_BALL_STEPS = 12


@dataclasses.dataclass(frozen=True, eq=False)
class Threat:
    """A set of allowed inputs around each x: an eps-ball of a norm, inside the bounds of the data.

    Guarantee: `project` and `random_start` return points for which `contains` is true. Everything is in the units of
        x as the model receives it: put normalisation inside the model.
    Args:
        norm: "linf" (every feature by at most eps) or "l2" (Euclidean length over all features of a sample).
        eps: Radius >= 0. A number; a tensor (N,) or (N, 1, ...) for one radius a sample; or, for linf, a tensor that
            broadcasts to x[0], such as (C, 1, 1) or (d,), for one radius a feature. Against a table (N, d), a tensor
            of length d is by feature: write radii by sample as (N, 1) there.
        bounds: Lowest and highest allowed value; numbers, or tensors that broadcast to x[0].
        mask: Bool tensor that broadcasts to x[0]; False marks features that the adversary cannot change.
    Raises: ThreatModelError: eps negative or NaN, bounds empty, eps per feature with l2.
    Example:
        >>> threat = Threat("linf", 0.1)
        >>> threat.project(torch.tensor([[0.9, 0.0]]), torch.tensor([[0.5, 0.05]])).tolist()
        [[0.6000000238418579, 0.0]]
    """

    norm: Norm = "linf"
    eps: float | Tensor = 8 / 255
    bounds: tuple[float | Tensor, float | Tensor] = (0.0, 1.0)
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        check_choice(self.norm, ("linf", "l2"), "norm")
        _check_eps(self.eps)
        _check_bounds(self.bounds)
        if self.norm == "l2" and isinstance(self.eps, Tensor) and self.eps.ndim and len(self.eps) != self.eps.numel():
            cure = "Use one radius a sample, or linf"
            raise refuse("one l2 radius for a whole sample", "eps", self.eps, cure, ThreatModelError)
        if self.mask is not None and (not isinstance(self.mask, Tensor) or self.mask.dtype != torch.bool):
            raise refuse("a bool tensor", "mask", self.mask, "Mark changeable features with True", ThreatModelError)

    def check(self, x: Tensor, name: str = "x") -> Tensor:
        """Refuse an x that is not floating point, not finite, outside the bounds, or of a shape eps does not fit."""
        check_tensor(x, name, floating=True)
        low, high = self.limits(x)
        check_inside(x, low, high, name)
        radius = self.radius(x)
        one_row = radius.ndim == 1 and x.ndim > 2 and len(radius) > 1
        if one_row or not _fits(radius.shape, x.shape):
            rule = f"eps as a number, ({len(x)},) or a shape that fits one sample {tuple(x.shape[1:])}"
            raise refuse(rule, "eps", self.eps, "Match eps to x", ThreatModelError)
        if self.mask is not None and not _fits(self.mask.shape, x.shape[1:]):
            rule = f"a mask that fits one sample {tuple(x.shape[1:])}"
            raise refuse(rule, "mask", self.mask, "Match the mask to x", ThreatModelError)
        return x

    def limits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds as tensors of x's dtype and device."""
        low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in self.bounds)
        return low, high

    def radius(self, x: Tensor) -> Tensor:
        """Eps as a tensor that broadcasts against x; radii by sample come as (N, 1, ...)."""
        eps = torch.as_tensor(self.eps, dtype=x.dtype, device=x.device)
        by_feature = self.norm == "linf" and x.ndim == 2 and eps.shape == x.shape[1:]
        if eps.ndim == 1 and len(eps) == len(x) and not by_feature:
            return eps.reshape(-1, *[1] * (x.ndim - 1))
        return eps

    def rows(self, x: Tensor, index: Tensor) -> "Threat":
        """The threat for x[index]: radii by sample are indexed too, everything else is shared."""
        radius = self.radius(x)
        by_sample = radius.ndim == x.ndim and radius.shape[0] == len(x) != 1
        return self.with_eps(radius[index]) if by_sample else self

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest allowed point to x_adv, for each sample. Shapes (N, ...), x inside the bounds."""
        _check_pair(x_adv, x)
        low, high = self.limits(x)
        step = self._step(x_adv, x)
        if self.norm == "linf":
            eps = self.radius(x)
            point = torch.minimum(torch.maximum(x + step, x - eps), x + eps)
            return torch.minimum(torch.maximum(point, low), high)
        return _project_ball(step, x, self.radius(x), low, high)

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random allowed point for each sample: uniform in the linf cube within the bounds, or in the l2 ball."""
        check_tensor(x, "x", floating=True, finite=False)
        stream = make_generator(generator)
        low, high = self.limits(x)
        if self.norm == "linf":
            bottom, top = torch.maximum(x - self.radius(x), low), torch.minimum(x + self.radius(x), high)
            return self.project(bottom + (top - bottom) * uniform(tuple(x.shape), stream, x), x)
        direction = normal(tuple(x.shape), stream, x)
        features = max(1, x[0].numel()) if len(x) else 1
        share = uniform((len(x), *[1] * (x.ndim - 1)), stream, x) ** (1 / features)
        length = _length(direction).clamp(min=torch.finfo(x.dtype).tiny)
        return self.project(x + direction / length * share * self.radius(x), x)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Length of the perturbation of each sample in this norm: (N,) float64."""
        _check_pair(x_adv, x)
        step = (x_adv.double() - x.double()).flatten(1)
        if step.shape[1] == 0:
            return torch.zeros(len(step), dtype=step.dtype, device=step.device)
        length: Tensor = step.abs().amax(dim=1) if self.norm == "linf" else step.norm(dim=1)
        return length

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Which samples lie inside the threat: (N,) bool, up to the rounding of x's own dtype."""
        _check_pair(x_adv, x)
        slack = 4 * torch.finfo(x.dtype).eps
        low, high = (bound.double() for bound in self.limits(x))
        eps, point, origin = self.radius(x).double(), x_adv.double(), x.double()
        inside = (point >= low - slack * low.abs()) & (point <= high + slack * high.abs())
        if self.mask is not None:
            inside &= self.mask.to(x.device) | (point == origin)
        rounding = slack * torch.maximum(point.abs(), origin.abs())
        if self.norm == "linf":
            inside &= (point - origin).abs() <= eps * (1 + slack) + rounding
            return inside.flatten(1).all(dim=1)
        length = self.distance(x_adv, x)
        limit = eps.reshape(-1) * (1 + slack) + rounding.flatten(1).norm(dim=1)
        found: Tensor = inside.flatten(1).all(dim=1) & (length <= limit)
        return found

    def with_eps(self, eps: float | Tensor) -> "Threat":
        """The same threat with another radius."""
        return dataclasses.replace(self, eps=eps)

    def to_dict(self) -> dict[str, Any]:
        """The threat as JSON types; tensors as shape, range and digest."""
        fields = {"norm": self.norm, "eps": self.eps, "low": self.bounds[0], "high": self.bounds[1], "mask": self.mask}
        return {name: _describe(value) for name, value in fields.items() if value is not None}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Threat) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(str(self.to_dict()))

    def __str__(self) -> str:
        parts = self.to_dict()
        return f"{parts['norm']} eps={parts['eps']} in [{parts['low']}, {parts['high']}]"

    def _step(self, x_adv: Tensor, x: Tensor) -> Tensor:
        step = x_adv - x
        return step if self.mask is None else step * self.mask.to(x.device)


def _check_eps(eps: float | Tensor) -> None:
    if isinstance(eps, bool) or not isinstance(eps, int | float | Tensor):
        raise refuse("eps to be a number or a tensor", "eps", eps, "Pass a radius in the units of x", ThreatModelError)
    _check_dense(eps, "eps")
    value = torch.as_tensor(eps, dtype=torch.float64)
    if not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
        raise refuse("eps >= 0 and finite", "eps", eps, "Pass a radius in the units of x", ThreatModelError)


def _check_dense(value: float | Tensor, name: str) -> None:
    if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_meta or value.is_complex()):
        raise refuse(f"{name} as a dense real tensor", name, value, "Convert it with .to_dense()", ThreatModelError)


def _is_plain(value: Tensor) -> bool:
    return value.is_floating_point() and value.ndim > 0 and value.layout == torch.strided and not value.is_meta


def _check_pair(x_adv: Tensor, x: Tensor) -> None:
    """Two floating tensors of one shape; cheap, because every step of an attack comes through here."""
    for name, value in (("x_adv", x_adv), ("x", x)):
        if not isinstance(value, Tensor) or not _is_plain(value):
            check_tensor(value, name, floating=True, finite=False)
    if x_adv.shape != x.shape:
        rule = f"x_adv of the shape of x, {tuple(x.shape)}"
        raise refuse(rule, "x_adv", x_adv, "Pass points for the same rows", ThreatModelError)


def _check_bounds(bounds: tuple[float | Tensor, float | Tensor]) -> None:
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise refuse("bounds to be (low, high)", "bounds", bounds, "Pass the range of x", ThreatModelError)
    for bound in bounds:
        if isinstance(bound, bool) or not isinstance(bound, int | float | Tensor):
            raise refuse("bounds as numbers or tensors", "bounds", bounds, "Pass the range of x", ThreatModelError)
        _check_dense(bound, "bounds")
    low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in bounds)
    if not (_fits(low.shape, high.shape) or _fits(high.shape, low.shape)):
        raise refuse("bounds that fit one another", "bounds", bounds, "Give both the shape of x[0]", ThreatModelError)
    if bool(torch.isnan(low).any()) or bool(torch.isnan(high).any()) or not bool((low < high).all()):
        raise refuse("bounds with low < high", "bounds", bounds, "Pass the range of x", ThreatModelError)


def _fits(shape: torch.Size, target: torch.Size) -> bool:
    """Whether a tensor of `shape` broadcasts to exactly `target`."""
    try:
        return bool(torch.broadcast_shapes(shape, target) == target)
    except RuntimeError:
        return False


def _length(step: Tensor) -> Tensor:
    """Euclidean length over all but the batch dimension, shaped to broadcast against it."""
    length: Tensor = step.flatten(1).norm(dim=1)
    return length.reshape(-1, *[1] * (step.ndim - 1))


def _project_ball(step: Tensor, x: Tensor, eps: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Nearest point to x + step in ball and box. It is clip(x + t * step) for the largest feasible t in (0, 1].

    The length of clip(x + t * step) - x grows with t; the features that stop at the box are found from below, so every
    iterate is feasible and the active set grows until it is exact.
    """
    room = torch.where(step >= 0, (high - x).clamp(min=0), (x - low).clamp(min=0))
    size = step.abs()
    if step.numel() == 0 or bool((_length(torch.minimum(size, room)) <= eps).all()):
        return torch.minimum(torch.maximum(x + step, low), high)
    tiny = torch.finfo(x.dtype).tiny
    t = (eps / _length(step).clamp(min=tiny)).clamp(max=1.0)
    for _ in range(_BALL_STEPS):
        stopped = t * size > room
        left = (eps**2 - _length(torch.where(stopped, room, 0)) ** 2).clamp(min=0)
        free = _length(torch.where(stopped, 0, size))
        following = torch.where(free > tiny, left.sqrt() / free.clamp(min=tiny), 1.0).clamp(max=1.0)
        following = torch.maximum(t, following)
        if bool(((following - t) <= 1e-7 * following).all()):
            break
        t = following
    point = x + step.sign() * torch.minimum(t * size, room)
    return torch.minimum(torch.maximum(point, low), high)


def _describe(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.numel() == 1:
        return value.item()
    array = value.detach().cpu().double().contiguous()
    digest = hashlib.sha256(array.numpy().tobytes()).hexdigest()[:16]
    low, high = (float(array.min()), float(array.max())) if array.numel() else (None, None)
    return {"shape": list(array.shape), "min": low, "max": high, "sha256": digest}
