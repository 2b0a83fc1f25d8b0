"""What the adversary may do to an input: the one description for attacks, objectives, certificates and reports."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from aidefend._core import threat_checks as checks
from aidefend._core.checks import check_choice, check_inside, check_tensor, refuse
from aidefend._core.discrete import changed, drawn, outside
from aidefend._core.errors import ThreatModelError
from aidefend._core.geometry import ORDERS, move_groups, near, nearest
from aidefend._core.projection import by_row
from aidefend._core.random import ball_step, few_step, make_generator, uniform

Norm = Literal["linf", "l2", "l1", "l0"]
NORMS: tuple[Norm, ...] = ("linf", "l2", "l1", "l0")


@dataclasses.dataclass(frozen=True, eq=False)
class Threat:
    """A set of allowed inputs around each x: an eps-ball of a norm, inside the bounds of the data.

    Guarantee: `project` and `random_start` return points for which `contains` is true. Everything is in the units of
        x as the model receives it: put normalisation inside the model, or use `Threat.normalised`.
    Args:
        norm: "linf" (every feature by at most eps), "l2" (Euclidean length over all features of a sample), "l1" (sum
            of absolute changes) or "l0" (number of changed features; a changed group counts as one).
        eps: Radius >= 0. A number; a tensor (N,) or (N, 1, ...) for one radius a sample; or, for linf, a tensor that
            broadcasts to x[0], such as (C, 1, 1) or (d,), for one radius a feature. Against a table (N, d), a tensor
            of length d is by feature: write radii by sample as (N, 1) there.
        bounds: Lowest and highest allowed value; numbers, or tensors that broadcast to x[0].
        mask: Bool tensor that broadcasts to x[0]; False marks features that the adversary cannot change.
        integer: Bool tensor that broadcasts to x[0]; True marks features that take whole numbers only.
        groups: One-hot groups of a table: for each the positions of its features in a flattened sample. The adversary
            may move the one to another member, which is a change of 1 in both (linf: eps >= 1 for them; l2: 2**0.5).
        scale: Positive tensor that broadcasts to x[0]: changes are measured as scale * (x_adv - x). The standard
            deviations of normalised data bring eps back into the original units; elsewhere they price features.
    Raises: ThreatModelError: eps negative or NaN, bounds empty, eps per feature with another norm than linf (use
        scale), malformed mask, integer, groups or scale.
    Example:
        >>> threat = Threat("linf", 0.1)
        >>> threat.project(torch.tensor([[0.9, 0.0]]), torch.tensor([[0.5, 0.05]])).tolist()
        [[0.6000000238418579, 0.0]]
    """

    norm: Norm = "linf"
    eps: float | Tensor = 8 / 255
    bounds: tuple[float | Tensor, float | Tensor] = (0.0, 1.0)
    mask: Tensor | None = None
    integer: Tensor | None = None
    groups: tuple[tuple[int, ...], ...] | None = None
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        check_choice(self.norm, NORMS, "norm")
        checks.check_eps(self.eps)
        checks.check_bounds(self.bounds)
        if self.norm != "linf" and isinstance(self.eps, Tensor) and self.eps.ndim and len(self.eps) != self.eps.numel():
            cure = "Use one radius a sample, scale= for prices by feature, or linf"
            raise refuse(f"one {self.norm} radius for a whole sample", "eps", self.eps, cure, ThreatModelError)
        checks.check_flags(self.mask, "mask", "Mark changeable features with True")
        checks.check_flags(self.integer, "integer", "Mark whole-number features with True")
        checks.check_scale(self.scale)
        object.__setattr__(self, "groups", checks.as_groups(self.groups))

    @classmethod
    def normalised(
        cls,
        norm: Norm,
        eps: float | Tensor,
        mean: Sequence[float] | Tensor,
        std: Sequence[float] | Tensor,
        bounds: tuple[float, float] = (0.0, 1.0),
        **options: Any,
    ) -> "Threat":
        """The threat for x = (original - mean) / std by channel, with eps and bounds in the original units.

        Args:
            norm: As for the class, like eps and what `options` may hold (mask, integer, groups).
            eps: Radius in the original units.
            mean: One value a channel (C,), for x of shape (N, C, ...), or a tensor that broadcasts to x[0].
            std: Likewise, > 0.
            bounds: Of the original values.
            options: Further fields.
        Raises: ThreatModelError: std not positive, or as for the class.
        Example:
            >>> threat = Threat.normalised("linf", 0.1, mean=[0.5], std=[0.25])
            >>> threat.project(torch.full((1, 1, 2), 9.0), torch.zeros(1, 1, 2)).flatten().tolist()
            [0.4000000059604645, 0.4000000059604645]
        """
        checks.check_bounds(bounds)
        centre, spread = checks.as_channels(mean, "mean"), checks.as_channels(std, "std")
        checks.check_scale(spread, "std")
        low, high = ((bound - centre) / spread for bound in bounds)
        return cls(norm, eps, (low.float(), high.float()), scale=spread.float(), **options)

    def discrete(self, x: Tensor) -> Tensor | None:
        """Which features take whole numbers or are one-hot, broadcasts against x; None where there are none."""
        if self.groups is None:
            return None if self.integer is None else self.integer.to(x.device)
        members = ~outside(self.groups, x.flatten(1)).reshape(x.shape[1:])
        return members if self.integer is None else members | self.integer.to(x.device)

    def check(self, x: Tensor, name: str = "x") -> Tensor:
        """Refuse an x that is not floating point, not finite, outside the bounds, or of a shape eps does not fit."""
        check_tensor(x, name, floating=True)
        low, high = self.limits(x)
        check_inside(x, low, high, name)
        radius = self.radius(x)
        one_row = radius.ndim == 1 and x.ndim > 2 and len(radius) > 1
        if one_row or not checks.fits(radius.shape, x.shape):
            rule = f"eps as a number, ({len(x)},) or a shape that fits one sample {tuple(x.shape[1:])}"
            raise refuse(rule, "eps", self.eps, "Match eps to x", ThreatModelError)
        for field, value in (("mask", self.mask), ("integer", self.integer), ("scale", self.scale)):
            checks.check_fit(value, x, field)
        checks.check_whole(x, self.integer, name)
        checks.check_one_hot(x, self.groups, name)
        return x

    def limits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds as tensors of x's dtype and device."""
        low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in self.bounds)
        return low, high

    def radius(self, x: Tensor) -> Tensor:
        """Eps as a tensor that broadcasts against x, in the units of the norm; radii by sample come as (N, 1, ...)."""
        eps = torch.as_tensor(self.eps, dtype=x.dtype, device=x.device)
        by_feature = self.norm == "linf" and x.ndim == 2 and eps.shape == x.shape[1:]
        if eps.ndim == 1 and len(eps) == len(x) and not by_feature:
            return eps.reshape(-1, *[1] * (x.ndim - 1))
        return eps

    def reach(self, x: Tensor) -> Tensor:
        """The largest change of one feature in the units of x, bounds aside: broadcasts against x; l0: no limit."""
        if self.norm == "l0":
            return torch.where(self.radius(x) >= 1, torch.inf, 0.0).to(x)
        return self.unpriced(self.radius(x))

    def priced(self, change: Tensor) -> Tensor:
        """A change of x in the units of the norm: times `scale`."""
        return change if self.scale is None else change * self.scale.to(change)

    def unpriced(self, step: Tensor) -> Tensor:
        """Back in the units of x; turns a gradient by x into one by priced changes, too."""
        return step if self.scale is None else step / self.scale.to(step)

    @property
    def bounded(self) -> bool:
        """Whether the bounds are finite."""
        return all(bool(torch.as_tensor(bound).isfinite().all()) for bound in self.bounds)

    def changeable(self, x: Tensor) -> Tensor:
        """Which features the adversary may change: bool, broadcasts against x."""
        return torch.ones((), dtype=torch.bool, device=x.device) if self.mask is None else self.mask.to(x.device)

    def rows(self, x: Tensor, index: Tensor) -> "Threat":
        """The threat for x[index]: radii by sample are indexed too, everything else is shared."""
        radius = self.radius(x)
        by_sample = radius.ndim == x.ndim and radius.shape[0] == len(x) != 1
        return self.with_eps(radius[index]) if by_sample else self

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest allowed point to x_adv, for each sample. Shapes (N, ...), x inside the bounds.

        Nearest in the Euclidean length of scale * change. Whole numbers are rounded afterwards (towards x where the
        nearest one is not allowed), and one-hot groups are served before the other features, the best gain for its
        price first: allowed, but with l2 and l1 not always the nearest.
        """
        checks.check_pair(x_adv, x)
        if self.groups is not None and x.numel():
            return move_groups(self, x_adv, x, self.groups)
        return nearest(self, x_adv, x, self.radius(x), self.mask)

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random allowed point for each sample.

        linf: uniform in the cube within the bounds. l2, l1: uniform in the ball, then projected. l0: uniform values
        within the bounds (a normal step where they are infinite) in floor(eps) features drawn at random.
        """
        check_tensor(x, "x", floating=True, finite=False)
        stream = make_generator(generator)
        if x.numel() == 0:
            return x.clone()
        if self.norm == "linf":
            low, high = self.limits(x)
            bottom, top = torch.maximum(x - self.reach(x), low), torch.minimum(x + self.reach(x), high)
            target = bottom + (top - bottom) * uniform(tuple(x.shape), stream, x)
        elif self.norm == "l0":
            target = x + few_step(
                x, *self.limits(x), self.changeable(x).expand_as(x), by_row(self.radius(x), x), stream
            )
        else:
            step = ball_step(x, self.changeable(x).expand_as(x), ORDERS[self.norm], stream) * self.radius(x)
            target = x + self.unpriced(step)
        if self.groups is not None:
            target = drawn(target.flatten(1), self.groups, stream).reshape(x.shape)
        return self.project(target, x)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Length of the perturbation of each sample in this norm: (N,) float64."""
        checks.check_pair(x_adv, x)
        step = self.priced(x_adv.double() - x.double()).flatten(1)
        if step.shape[1] == 0:
            return torch.zeros(len(step), dtype=step.dtype, device=step.device)
        if self.norm == "l0":
            return changed(step, self.groups).sum(dim=1).double()
        length: Tensor = torch.linalg.vector_norm(step, ord=ORDERS[self.norm], dim=1)
        return length

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Which samples lie inside the threat: (N,) bool, up to the rounding of x's own dtype."""
        checks.check_pair(x_adv, x)
        slack = 4 * torch.finfo(x.dtype).eps
        low, high = (bound.double() for bound in self.limits(x))
        point, origin = x_adv.double(), x.double()
        inside = (point >= low - slack * low.abs()) & (point <= high + slack * high.abs())
        if self.mask is not None:
            inside &= self.mask.to(x.device) | (point == origin)
        if self.integer is not None:
            inside &= ~self.integer.to(x.device) | (point == point.round())
        rounding = slack * torch.maximum(point.abs(), origin.abs())
        within = inside.flatten(1).all(dim=1) & checks.is_one_hot(point, self.groups)
        if self.norm == "linf":
            close = (point - origin).abs() <= self.reach(x).double() * (1 + slack) + rounding
            return within & close.flatten(1).all(dim=1)
        return within & near(self, x_adv, x, rounding, slack)

    def to_uint8(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The points as 8-bit images that still lie inside the threat: rounded towards x. uint8, shape (N, ...).

        Args:
            x_adv: (N, ...), inside the threat.
            x: (N, ...), on the grid k / 255 for bounds (0, 1), or whole numbers for bounds (0, 255).
        Raises: ThreatModelError: other bounds, x off the grid, x_adv outside the threat.
        """
        checks.check_pair(x_adv, x)
        unit = checks.grid_unit(self.bounds)
        origin, target = x.double() / unit, x_adv.double() / unit
        if bool(((origin - origin.round()).abs() > 1e-3).any()):
            raise refuse("x on the 8-bit grid", "x", x, "Attack the image as it was stored", ThreatModelError)
        if not bool(self.contains(x_adv, x).all()):
            raise refuse("x_adv inside the threat", "x_adv", x_adv, "Call project first", ThreatModelError)
        origin, nearest = origin.round(), target.round()
        inward = origin + (target - origin).trunc()
        kept = torch.where((target - nearest).abs() < 1e-3, nearest, inward)
        allowed = self.contains((kept * unit).to(x.dtype), (origin * unit).to(x.dtype))
        levels = torch.where(allowed.reshape(-1, *[1] * (x.ndim - 1)), kept, inward)
        return levels.to(torch.uint8)

    def with_eps(self, eps: float | Tensor) -> "Threat":
        """The same threat with another radius."""
        return dataclasses.replace(self, eps=eps)

    def to_dict(self) -> dict[str, Any]:
        """The threat as JSON types; tensors as shape, range and digest."""
        fields = {
            "norm": self.norm, "eps": self.eps, "low": self.bounds[0], "high": self.bounds[1], "mask": self.mask,
            "integer": self.integer, "groups": self.groups and [list(group) for group in self.groups],
            "scale": self.scale,
        }  # fmt: skip
        return {name: _describe(value) for name, value in fields.items() if value is not None}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Threat) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(str(self.to_dict()))

    def __str__(self) -> str:
        parts = self.to_dict()
        return f"{parts['norm']} eps={parts['eps']} in [{parts['low']}, {parts['high']}]"


def _describe(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.numel() == 1:
        return value.item()
    array = value.detach().cpu().double().contiguous()
    digest = hashlib.sha256(array.numpy().tobytes()).hexdigest()[:16]
    low, high = (float(array.min()), float(array.max())) if array.numel() else (None, None)
    return {"shape": list(array.shape), "min": low, "max": high, "sha256": digest}
