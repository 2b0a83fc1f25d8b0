"""Disguised poison: any trigger, with the means by which poison hides from filters, each of them one field."""

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from aidefend._core.checks import (
    check_callable,
    check_choice,
    check_inside,
    check_int,
    check_number,
    check_range,
    check_tensor,
    refuse,
)
from aidefend._core.random import derive_seed
from aidefend._core.threat import Threat
from aidefend.attacks.poisoning.crafted import read_rows
from aidefend.attacks.poisoning.poisoned import Change, Poisoned, choose, plant_with_covers

Hosts = Literal["any", "near", "one"]
_AT_ONCE = 512


@dataclasses.dataclass(frozen=True, eq=False)
class Disguised:
    """Backdoor with wrong labels whose rows may be made to look like the rest; the test always shows the whole trigger.

    With no field but the first three set it is the plain attack with this trigger. What a chosen row goes through, in
    this order: shift, mix, noise, trigger; the same at each read, by the seed and the number of the row.

    Guarantee: none about strength, it is an attack. Exactly `round(rate * N)` rows of other classes get the label
        `target`, exactly `round(cover_rate * N)` others the trigger and keep theirs; values stay inside `bounds`
        as far as the stamps keep them there.
    Args:
        stamp: Puts the trigger of the test on a batch: `Patch(...).stamp`, or any function of x.
        target: Label that the trigger shall cause, >= 0.
        rate: Share of the whole data set that is poisoned, in (0, 1).
        cover_rate: Share that carries the trigger under its right label, in [0, 1): slows the learning of the trigger.
        parts: Triggers of which a row of the data carries one, at random; None: `stamp`. Several make several modes.
        opacity: (low, high) in [0, 1]: a row's weight of the trigger is drawn between them.
        mix: Weight in [0, 1] of a row of the target class that is laid into each poisoned row before the trigger; at 1
            the row is one of the target class and its label is right.
        noise: Largest change of a cell by noise of its own in each poisoned row, in units of x, >= 0.
        shift: Largest shift of each poisoned row along both last dimensions, in cells, >= 0; for images.
        hosts: "any": rows at random; "near": those that lie nearest to a row of the target class; "one": rows at
            random that all show the input of the first of them: a repeated upload that `shift` and `noise` vary.
        source_class: Poison rows of this class only; None: all classes but the target.
        among: (N,) bool, rows that the attacker may change; None: all.
        bounds: (low, high) of x.
    Raises: ConfigurationError: arguments out of range, too few rows. ThreatModelError: x outside the bounds.
    Cost: The data set in memory. "near": one product of all rows with those of the target class.
    Source: opacity, parts and covers after Qi, Xie, Li, Mahloujifar, Mittal 2023; mix after Zhang, Cisse, Dauphin,
        Lopez-Paz 2018.

    Example:
        >>> from aidefend.attacks import Patch
        >>> x, y = torch.zeros(40, 1, 8, 8), torch.arange(40) % 4
        >>> poisoned = Disguised(Patch().stamp, target=1, rate=0.1, opacity=(0.5, 0.5)).poison((x, y), seed=0)
        >>> float(poisoned.dataset[int(poisoned.indices[0])][0].max()), float(poisoned.trigger(x[:1]).max())
        (0.5, 1.0)
    """

    stamp: Change
    target: int = 0
    rate: float = 0.05
    _: dataclasses.KW_ONLY
    cover_rate: float = 0.0
    parts: tuple[Change, ...] | None = None
    opacity: tuple[float, float] = (1.0, 1.0)
    mix: float = 0.0
    noise: float = 0.0
    shift: int = 0
    hosts: Hosts = "any"
    source_class: int | None = None
    among: Tensor | None = None
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_callable(self.stamp, "stamp", "Pass for example Patch().stamp")
        check_int(self.target, "target", 0)
        check_number(self.rate, "rate", 0, 1, open_low=True, open_high=True)
        check_number(self.cover_rate, "cover_rate", 0, 1, open_high=True)
        check_number(self.mix, "mix", 0, 1)
        check_number(self.noise, "noise", 0)
        check_int(self.shift, "shift", 0)
        check_choice(self.hosts, ("any", "near", "one"), "hosts")
        check_range(self.bounds)
        self._check_trigger()
        if self.source_class is not None and check_int(self.source_class, "source_class", 0) == self.target:
            raise refuse("source_class other than target", "source_class", self.source_class, "Choose another class")
        if self.among is not None and check_tensor(self.among, "among", ndim=1).dtype != torch.bool:
            raise refuse("a bool tensor (N,)", "among", self.among, "Mark the rows that may be changed with True")

    def _check_trigger(self) -> None:
        if self.parts is not None:
            if not isinstance(self.parts, tuple) or not self.parts:
                raise refuse("a tuple of stamps", "parts", self.parts, "Pass for example (Patch().stamp,)")
            for part in self.parts:
                check_callable(part, "parts", "Pass for example (Patch().stamp,)")
        pair = self.opacity
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise refuse("opacity (low, high)", "opacity", pair, "Pass for example (0.3, 0.6)")
        if check_number(pair[0], "opacity", 0, 1) > check_number(pair[1], "opacity", 0, 1):
            raise refuse("opacity with low <= high", "opacity", pair, "Put the lower one first")

    def poison(self, dataset: Any, seed: int = 0) -> Poisoned:
        """The data set with poison and covers in it, their ground truth, and the trigger for testing."""
        base, x, y = read_rows(dataset, Threat("linf", 0.0, bounds=self.bounds))
        may = self._may(y)
        from_class = y != self.target if self.source_class is None else y == self.source_class
        count = round(self.rate * len(y))
        rows = choose(may & from_class, count, seed, "disguised")
        if self.hosts == "near" and count:
            rows = _nearest(x, (may & from_class).nonzero().flatten(), x[y == self.target], count)
        taken = torch.zeros(len(y), dtype=torch.bool)
        taken[rows] = True
        covers = choose(may & (y != self.target) & ~taken, round(self.cover_rate * len(y)), seed, "disguised covers")
        host = x[rows[:1]] if self.hosts == "one" else None
        change = Disguise(self, seed, frozenset(rows.tolist()), host, self._partners(base, y, rows, seed))
        return plant_with_covers(base, y, self.target, rows, covers, self.stamp, change)

    def marked(self, x: Tensor, stream: torch.Generator) -> Tensor:
        """The batch with a trigger as rows of the data carry it: one of the parts, more or less opaque."""
        stamps = self.parts or (self.stamp,)
        stamp = stamps[int(torch.randint(len(stamps), (1,), generator=stream))]
        low, high = self.opacity
        weight = low + (high - low) * float(torch.rand(1, generator=stream))
        full = stamp(x)
        if not isinstance(full, Tensor) or full.shape != x.shape:
            raise refuse(f"stamps that return {tuple(x.shape)}", "stamp", full, "Keep the shape of x")
        return full if weight == 1 else torch.lerp(x, full.to(x), weight)

    def hidden(self, x: Tensor, partner: Tensor | None, stream: torch.Generator) -> Tensor:
        """The batch after shift, mix and noise."""
        if self.shift:
            if x.ndim < 3:
                raise refuse("images (N, ..., H, W) with shift", "x", x, "Set shift to 0")
            steps = torch.randint(-self.shift, self.shift + 1, (2,), generator=stream).tolist()
            x = torch.roll(x, steps, dims=(-2, -1))
        if partner is not None:
            x = torch.lerp(x, partner.to(x), self.mix)
        if self.noise:
            x = x + self.noise * (2 * torch.rand(x.shape, generator=stream).to(x) - 1)
        return x.clamp(*self.bounds)

    def _may(self, y: Tensor) -> Tensor:
        if self.among is None:
            return torch.ones(len(y), dtype=torch.bool)
        if len(self.among) != len(y):
            raise refuse(f"among of shape ({len(y)},)", "among", self.among, "Pass one flag for each row")
        return self.among.cpu()

    def _partners(self, base: Dataset[Any], y: Tensor, rows: Tensor, seed: int) -> dict[int, Tensor]:
        """For each poisoned row the row of the target class that is laid into it."""
        if not self.mix or not len(rows):
            return {}
        theirs = (y == self.target).nonzero().flatten()
        if not len(theirs):
            raise refuse("rows of the target class with mix", "dataset", "none", "Set mix to 0")
        stream = torch.Generator().manual_seed(derive_seed(seed, "partners") % 2**63)
        picked = theirs[torch.randint(len(theirs), (len(rows),), generator=stream)].tolist()
        return {
            row: torch.as_tensor(base[partner][0]).unsqueeze(0)
            for row, partner in zip(rows.tolist(), picked, strict=True)
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Disguise:
    """What the rows of one poisoned data set go through; covers get the trigger alone."""

    attack: Disguised
    seed: int
    poison: frozenset[int]
    host: Tensor | None
    partners: dict[int, Tensor]

    def __call__(self, x: Tensor, row: int) -> Tensor:
        """A batch of one as it is in the data."""
        check_inside(check_tensor(x, "x", floating=True, finite=False), *self.attack.bounds)
        stream = torch.Generator().manual_seed(derive_seed(self.seed, "disguise", row) % 2**63)
        if row in self.poison:
            x = x if self.host is None else self.host.to(x).reshape(x.shape)
            x = self.attack.hidden(x, self.partners.get(row), stream)
        return self.attack.marked(x, stream)


def _nearest(x: Tensor, eligible: Tensor, theirs: Tensor, count: int) -> Tensor:
    """The `count` eligible rows with the smallest distance to a row of the target class, ascending."""
    if not len(theirs):
        raise refuse("rows of the target class with hosts='near'", "dataset", "none", "Take hosts='any'")
    bank = theirs.flatten(1)
    gaps = [torch.cdist(x[rows].flatten(1), bank).min(dim=1).values for rows in eligible.split(_AT_ONCE)]
    return eligible[torch.cat(gaps).topk(count, largest=False).indices].sort().values
