"""Sanitizer-aware poison: rows inside what filters let pass that turn a linear model as far as they can."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from aidefend._core.checks import check_callable, check_int, check_labels, check_number, check_tensor, refuse
from aidefend._core.random import derive_seed
from aidefend.attacks.poisoning.allowed_region import Convex, Filter, HalfSpace, nearest, region
from aidefend.attacks.poisoning.crafted import plant_inputs, rows_in_memory
from aidefend.attacks.poisoning.logistic_model import (
    Rows,
    curvature,
    effect_of_moving,
    fit_logistic,
    margins,
    smooth_error,
)
from aidefend.attacks.poisoning.poisoned import Poisoned, choose

_SHARES = (0.0, 0.5, 1.0)  # of the poison that the second class gets; the best of them is kept
_STRIDE = 0.5  # of the first step, in median distances of a row from its mean
_PASSING = 0.9  # of the poison that `accept` has to keep
_HALVINGS = 6


class _Found(NamedTuple):
    """The largest error on the way, the points (2, d) that caused it, the model, and the copies of each class."""

    error: float
    points: Tensor
    theta: Tensor
    copies: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class SanitizerAware:
    """Indiscriminate poison against linear models of two classes, made inside the region that filters let pass.

    One point for each class is moved by the gradient of the error of the model that is trained with its copies
    (implicit differentiation), and back into the region at each step. Copies of few points suffice against a linear
    model, and hide from filters by neighbours, as each has the others. There is no trigger: success is a lower
    accuracy.

    Guarantee: none about strength, it is an attack. Exactly `round(rate * N)` rows, drawn at random, are replaced; each
        lies inside the regions of `filters`, as they follow from the other rows. "loss" holds for the attacker's own
        model. A filter that is fitted on the poisoned data differs from that a little; raise `removed` for safety.
    Limits: a region where d is small or the classes are far apart leaves little room (digits 1 and 7, breast cancer).
        Only smooth linear models are attacked; others are met by transfer. `accept` is obeyed by a retreat on a line.
    Args:
        rate: Share of the whole data set that is replaced, in (0, 1).
        filters: What the poison shall pass, each fitted to the rows of a class: "sphere", distance from the mean;
            "slab", distance along the line through both means; "subspace", distance from the directions that hold 95 %
            of all variance; "ellipsoid", Mahalanobis distance; "range", smallest and largest value of each column;
            "loss", that of the trained model. (): no filter, which is no attack that anyone would miss.
        removed: Share of a class that the filters throw away, in (0, 1); "range" throws nothing away.
        accept: The defender's own filter, as a black box: (x (N, ...), y (N,)) -> keep (N,) bool. The points retreat
            towards the mean of their class until nine tenths of the poison are kept, at most as far as to the mean
            itself. None: none.
        aim: (x, y), rows on which the model shall err: the test rows for the strongest attacker. None: the clean rows.
        ridge: Penalty on the squared weights of the model that is attacked, in (0, 1e6]: (mean loss) + ridge / 2 |w|^2.
        spread: Of copies about their point, in units of the spread of their class, in [0, 1e6]. 0: exact copies,
            which any search for duplicates finds.
        steps: Gradient steps for each of three shares of the classes, >= 1.
    Raises: ConfigurationError: arguments out of range, other than two classes with two clean rows each, `aim` of other
        columns or classes, `accept` that does not return (N,) bool.
    Cost: 3 * steps trainings by Newton's method, each some O(N d^2 + d^3), and at most 7 calls of `accept`. Columns
        should have like scales.
    Source: Koh, Steinhardt, Liang 2021 (influence attack with concentration). Differs: logistic loss and its smoothed
        error in place of the hinge; regions follow from the clean rows; rows are replaced, not added; no whole numbers;
        "ellipsoid", "range", spread and `accept` are ours. Region and name of sphere and slab: Steinhardt, Koh, Liang
        2017.

    Example:
        >>> stream = torch.Generator().manual_seed(0)
        >>> y = torch.arange(100) % 2
        >>> x = torch.randn(100, 4, generator=stream) + 2.0 * y[:, None]
        >>> poisoned = SanitizerAware(0.1, filters=("sphere", "slab"), steps=5).poison((x, y), seed=0)
        >>> int(poisoned.is_poison.sum())
        10
    """

    rate: float = 0.03
    filters: tuple[Filter, ...] = ("sphere", "slab", "subspace", "loss")
    removed: float = 0.05
    accept: Callable[[Tensor, Tensor], Tensor] | None = None
    aim: tuple[Tensor, Tensor] | None = None
    ridge: float = 1e-3
    spread: float = 0.1
    steps: int = 100

    def __post_init__(self) -> None:
        check_number(self.rate, "rate", 0, 1, open_low=True, open_high=True)
        check_number(self.removed, "removed", 0, 1, open_low=True, open_high=True)
        check_number(self.ridge, "ridge", 0, 1e6, open_low=True)
        check_number(self.spread, "spread", 0, 1e6)
        check_int(self.steps, "steps")
        known = get_args(Filter)
        if not isinstance(self.filters, tuple) or not all(name in known for name in self.filters):
            raise refuse(f"a tuple of {', '.join(known)}", "filters", self.filters, 'Pass ("sphere", "slab")')
        if self.accept is not None:
            check_callable(self.accept, "accept", "Pass a function (x, y) -> keep (N,) bool")
        if self.aim is not None:
            if not isinstance(self.aim, tuple) or len(self.aim) != 2:
                raise refuse("a pair (x, y)", "aim", self.aim, "Pass inputs and their labels")
            if not len(check_labels(self.aim[1], len(_flat(self.aim[0], "aim")), name="aim")):
                raise refuse("at least one row", "aim", self.aim[1], "Leave it out")

    def poison(self, dataset: Any, seed: int = 0) -> Poisoned:
        """The data set with poison in it, and its ground truth. There is no trigger: judge the accuracy."""
        base, x, y = rows_in_memory(dataset)
        flat = _flat(x, "dataset")
        rows = choose(torch.ones_like(y, dtype=torch.bool), round(self.rate * len(y)), seed, "sanitizer aware")
        left = torch.ones_like(y, dtype=torch.bool)
        left[rows] = False
        classes = _two_classes(y[left])
        clean = Rows(flat[left], (y[left] == classes[1]).long())
        poison = self._made(clean, classes, len(rows), seed)
        if self.accept is not None and len(rows):
            poison = self._accepted(poison, clean, rows, x, y, classes)
        inputs, labels = poison.x.to(x.dtype).reshape(-1, *x.shape[1:]), classes[poison.y]
        return plant_inputs(base, len(y), rows, inputs, labels, None, None)

    def _made(self, clean: Rows, classes: Tensor, count: int, seed: int) -> Rows:
        """The copies (count, d) of the best points, each inside the region of its class."""
        aim = clean if self.aim is None else _aimed(self.aim, classes, clean.x.shape[1])
        own = [clean.x[clean.y == label] for label in (0, 1)]
        regions = [region(own[label], own[1 - label], self.filters, self.removed) for label in (0, 1)]
        seconds = dict.fromkeys(round(share * count) for share in _SHARES)
        tries = [self._moved(clean, aim, regions, (count - second, second)) for second in seconds]
        best = max(tries, key=lambda found: found.error)
        labels = torch.arange(2).repeat_interleave(torch.tensor(best.copies))
        stream = torch.Generator().manual_seed(derive_seed(seed, "sanitizer aware copies") % 2**63)
        copies = []
        for label in labels.tolist():
            mine = own[label]
            strange = mine[int(torch.randint(len(mine), (1,), generator=stream))] - mine.mean(dim=0)
            sets = [*regions[label], *self._by_loss(best.theta, clean, label)]
            copies.append(nearest(best.points[label] + self.spread * strange, sets))
        return Rows(torch.stack(copies) if copies else clean.x[:0], labels)

    def _moved(self, clean: Rows, aim: Rows, regions: list[list[Convex]], copies: tuple[int, int]) -> "_Found":
        """Gradient ascent of the error with a point for each class; the best model on the way and its points."""
        means = [clean.x[clean.y == label].mean(dim=0) for label in (0, 1)]
        points = torch.stack([nearest(means[1 - label], regions[label]) for label in (0, 1)])
        reach = float((clean.x - torch.stack(means)[clean.y]).norm(dim=1).median())
        mass = torch.cat([clean.x.new_ones(len(clean.x)), clean.x.new_tensor(copies)])
        mass, theta = mass / mass.sum(), clean.x.new_zeros(clean.x.shape[1] + 1)
        best = _Found(-1.0, points, theta, copies)
        for step in range(self.steps + 1):
            rows = Rows(torch.cat([clean.x, points]), torch.cat([clean.y, torch.arange(2)]))
            theta = fit_logistic(rows, mass, self.ridge, theta)
            error, slope = smooth_error(theta, aim)
            if float(error) > best.error:
                best = _Found(float(error), points, theta, copies)
            if step < self.steps:
                back = torch.linalg.solve(curvature(theta, rows, mass, self.ridge), slope)
                way = effect_of_moving(theta, Rows(points, torch.arange(2)), back)
                way = _STRIDE * reach * (1 - step / self.steps) * way / way.norm(dim=1, keepdim=True).clamp(min=1e-300)
                sets = [[*regions[label], *self._by_loss(theta, clean, label)] for label in (0, 1)]
                points = torch.stack([nearest(points[label] + way[label], sets[label]) for label in (0, 1)])
        return best

    def _accepted(self, poison: Rows, clean: Rows, rows: Tensor, x: Tensor, y: Tensor, classes: Tensor) -> Rows:
        """The poison as far from the means of its classes as the defender's own filter allows, on a line."""
        means = torch.stack([clean.x[clean.y == label].mean(dim=0) for label in (0, 1)])[poison.y]
        labels = y.clone()
        labels[rows] = classes[poison.y]

        def at(part: float) -> Rows:
            return Rows(torch.lerp(means, poison.x, part), poison.y)

        def passes(part: float) -> bool:
            inputs = x.clone()
            inputs[rows] = at(part).x.to(x.dtype).reshape(-1, *x.shape[1:])
            keep = self.accept(inputs, labels.clone())  # type: ignore[misc]  # not None here
            if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != y.shape:
                raise refuse(f"accept(x, y) -> bool ({len(y)},)", "accept", keep, "Return True for rows that are kept")
            return float(keep.cpu()[rows].double().mean()) >= _PASSING

        if passes(1.0):
            return poison
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if passes(middle) else (low, middle)
        return at(low)

    def _by_loss(self, theta: Tensor, clean: Rows, label: int) -> list[Convex]:
        """What a filter of the losses of this model lets pass of a class: all beyond a least margin, a half space."""
        if "loss" not in self.filters:
            return []
        mine = clean.y == label
        least = torch.quantile(margins(theta, Rows(clean.x[mine], clean.y[mine])), self.removed)
        sign = 2 * label - 1
        return [HalfSpace(sign * theta[:-1], least - sign * theta[-1])]


def _flat(x: Any, name: str) -> Tensor:
    """(N, d) float64."""
    if check_tensor(x, name, floating=True).ndim < 2:
        raise refuse(f"{name} to hold rows of shape (d,) or more", name, x, "Add a dimension: x[:, None]")
    return x.detach().cpu().flatten(1).double()  # type: ignore[no-any-return]  # a tensor, as is checked


def _two_classes(y: Tensor) -> Tensor:
    classes: Tensor
    classes, counts = y.unique(return_counts=True)
    if len(classes) != 2 or int(counts.min()) < 2:
        found = f"classes {classes.tolist()[:8]} with {counts.tolist()[:8]} clean rows"
        raise refuse("two classes with two clean rows each", "dataset", found, "Pass the rows of two classes")
    return classes


def _aimed(aim: tuple[Tensor, Tensor], classes: Tensor, columns: int) -> Rows:
    x, y = _flat(aim[0], "aim"), aim[1].cpu()
    if x.shape[1] != columns or not bool(torch.isin(y, classes).all()):
        rule = f"rows of {columns} values and of the classes {classes.tolist()}"
        raise refuse(rule, "aim", aim[0], "Pass rows of the same kind as the data")
    return Rows(x, (y == classes[1]).long())
