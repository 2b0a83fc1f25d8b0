"""What a threat asks of its own fields and of the points it is given."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aidefend._core.checks import check_tensor, refuse
from aidefend._core.errors import ThreatModelError


def check_eps(eps: float | Tensor) -> None:
    """A finite radius >= 0."""
    if isinstance(eps, bool) or not isinstance(eps, int | float | Tensor):
        raise refuse("eps to be a number or a tensor", "eps", eps, "Pass a radius in the units of x", ThreatModelError)
    _check_dense(eps, "eps")
    value = torch.as_tensor(eps, dtype=torch.float64)
    if not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
        raise refuse("eps >= 0 and finite", "eps", eps, "Pass a radius in the units of x", ThreatModelError)


def check_bounds(bounds: tuple[float | Tensor, float | Tensor]) -> None:
    """A pair with low < high."""
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise refuse("bounds to be (low, high)", "bounds", bounds, "Pass the range of x", ThreatModelError)
    for bound in bounds:
        if isinstance(bound, bool) or not isinstance(bound, int | float | Tensor):
            raise refuse("bounds as numbers or tensors", "bounds", bounds, "Pass the range of x", ThreatModelError)
        _check_dense(bound, "bounds")
    low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in bounds)
    if not (fits(low.shape, high.shape) or fits(high.shape, low.shape)):
        raise refuse("bounds that fit one another", "bounds", bounds, "Give both the shape of x[0]", ThreatModelError)
    if bool(torch.isnan(low).any()) or bool(torch.isnan(high).any()) or not bool((low < high).all()):
        raise refuse("bounds with low < high", "bounds", bounds, "Pass the range of x", ThreatModelError)


def check_flags(flags: Tensor | None, name: str, cure: str) -> None:
    """A bool tensor or nothing."""
    if flags is not None and (not isinstance(flags, Tensor) or flags.dtype != torch.bool):
        raise refuse("a bool tensor", name, flags, cure, ThreatModelError)


def check_scale(scale: Tensor | None, name: str = "scale") -> None:
    """A positive finite tensor or nothing."""
    if scale is None:
        return
    cure = "Pass for example the standard deviation of each channel, shape (C, 1, 1)"
    if not isinstance(scale, Tensor) or not scale.is_floating_point():
        raise refuse("a floating-point tensor", name, scale, cure, ThreatModelError)
    _check_dense(scale, name)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise refuse(f"{name} > 0 and finite", name, scale, cure, ThreatModelError)


def as_groups(groups: Any) -> tuple[tuple[int, ...], ...] | None:
    """Groups of positions as tuples of int; refused where they overlap or hold less than two members."""
    if groups is None:
        return None
    cure = "Pass the column positions of each one-hot group, such as groups=((3, 4, 5), (6, 7))"
    try:
        found = tuple(tuple(int(position) for position in group) for group in groups)
    except (TypeError, ValueError):
        raise refuse("sequences of positions", "groups", groups, cure, ThreatModelError) from None
    every = [position for group in found for position in group]
    if not found or min(len(group) for group in found) < 2 or len(set(every)) != len(every) or min(every) < 0:
        raise refuse("separate groups of two or more positions >= 0", "groups", groups, cure, ThreatModelError)
    return found


def as_channels(values: Sequence[float] | Tensor, name: str) -> Tensor:
    """One value a channel as (C, 1, ...) float64 that broadcasts to an image; other tensors as they are."""
    cure = "Pass one value a channel, as a sequence of numbers or a tensor"
    if isinstance(values, Tensor):
        _check_dense(values, name)
    elif not isinstance(values, list | tuple) or not all(type(value) in (int, float) for value in values):
        raise refuse("numbers", name, values, cure, ThreatModelError)
    found = torch.as_tensor(values, dtype=torch.float64)
    if not bool(torch.isfinite(found).all()) or not found.numel():
        raise refuse("finite numbers", name, values, cure, ThreatModelError)
    return found.reshape(-1, 1, 1) if found.ndim == 1 else found


def check_fit(value: Tensor | None, x: Tensor, name: str) -> None:
    """A field that broadcasts to one sample."""
    if value is not None and not fits(value.shape, x.shape[1:]):
        rule = f"a {name} that fits one sample {tuple(x.shape[1:])}"
        raise refuse(rule, name, value, f"Match the {name} to x", ThreatModelError)


def check_whole(x: Tensor, integer: Tensor | None, name: str) -> None:
    """Whole numbers where the threat says so."""
    if integer is not None and bool(((x != x.round()) & integer.to(x.device)).any()):
        cure = "Leave scaling to the model, or take the feature out of integer="
        raise refuse(f"{name} with whole numbers in integer features", name, x, cure, ThreatModelError)


def check_one_hot(x: Tensor, groups: Sequence[Sequence[int]] | None, name: str) -> None:
    """One-hot values in every group."""
    if groups is None or x.numel() == 0:
        return
    last = max(position for group in groups for position in group)
    if last >= x[0].numel():
        rule = f"positions below {x[0].numel()}, the number of features"
        raise refuse(rule, "groups", groups, "Give positions in a flattened sample", ThreatModelError)
    if not bool(is_one_hot(x, groups).all()):
        cure = "Encode each category as one 1 among zeros"
        raise refuse(f"{name} one-hot in every group", name, x, cure, ThreatModelError)


def is_one_hot(x: Tensor, groups: Sequence[Sequence[int]] | None) -> Tensor:
    """Which rows hold one 1 and zeros in every group: (N,) bool."""
    found = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for group in groups or ():
        values = x.flatten(1)[:, list(group)]
        found &= ((values == 0) | (values == 1)).all(dim=1) & (values.sum(dim=1) == 1)
    return found


def grid_unit(bounds: tuple[float | Tensor, float | Tensor]) -> float:
    """The step of an 8-bit image within these bounds."""
    found = tuple(float(bound) if not isinstance(bound, Tensor) or bound.numel() == 1 else math.nan for bound in bounds)
    if found not in ((0.0, 1.0), (0.0, 255.0)):
        cure = "Undo the normalisation first; 8-bit images have the bounds (0, 1) or (0, 255)"
        raise refuse("bounds (0, 1) or (0, 255)", "bounds", bounds, cure, ThreatModelError)
    return found[1] / 255


def check_pair(x_adv: Tensor, x: Tensor) -> None:
    """Two floating tensors of one shape; cheap, because every step of an attack comes through here."""
    for name, value in (("x_adv", x_adv), ("x", x)):
        if not isinstance(value, Tensor) or not _is_plain(value):
            check_tensor(value, name, floating=True, finite=False)
    if x_adv.shape != x.shape:
        rule = f"x_adv of the shape of x, {tuple(x.shape)}"
        raise refuse(rule, "x_adv", x_adv, "Pass points for the same rows", ThreatModelError)


def fits(shape: torch.Size, target: torch.Size) -> bool:
    """Whether a tensor of `shape` broadcasts to exactly `target`."""
    try:
        return bool(torch.broadcast_shapes(shape, target) == target)
    except RuntimeError:
        return False


def _check_dense(value: float | Tensor, name: str) -> None:
    if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_meta or value.is_complex()):
        raise refuse(f"{name} as a dense real tensor", name, value, "Convert it with .to_dense()", ThreatModelError)


def _is_plain(value: Tensor) -> bool:
    return value.is_floating_point() and value.ndim > 0 and value.layout == torch.strided and not value.is_meta
