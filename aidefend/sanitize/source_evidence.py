"""Evidence on sources: does what one source says hold up against a model of all the others?"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aidefend._core.checks import check_int, check_items, check_number, check_same_rows, refuse
from aidefend.sanitize.block import check_kin, read_block
from aidefend.sanitize.moments import ClassMoments, Moments, merged, moments_of


class SourceScore(NamedTuple):
    """One source: its rows, its loss under a model of the others, and how much more that is than theirs.

    `loss` is the mean squared error of predicted class indicators, by a model that saw every source but this one;
    `excess` its distance from what other sources' rows of the same classes lose in the same way, as a share of that;
    `anomaly` the distance of `excess` from the median over the sources in robust standard deviations, NaN with fewer
    than four sources; `harm` how much the loss of all other sources' rows grows, as a share, if this one is learnt
    from, too.
    """

    rows: int
    loss: float
    excess: float
    anomaly: float
    harm: float


class SourceEvidence:
    """Scores sources by holding out each as a block: a row's score is the excess loss of the source it came from.

    Blocks carry "sources" (N,), one name a row. A linear model of the classes is fitted in closed form on all sources
    but one, from sums that each source contributes, and judges that one: triggers and wrong labels that come from one
    place are new to a model that never saw them. Features of a model that was trained on the poison have learnt it, so
    prefer an independent view of the inputs (key "view", as `screen` adds it).

    Guarantee: none. A source with a style of its own has a high loss, too; correctly labelled poison, and poison that
        every source carries, is not seen. A source may split itself under many names.
    Args:
        ridge: Strength of the regularisation, as a share of the mean variance of the features, > 0.
        smallest: Sources with fewer rows have no score (NaN): too few to judge.
    An unfitted detector, an unknown source, and a row with NaN or infinity have no score (NaN), and no source has one
    where there are fewer than two.
    Cost: N d^2 operations, S C d^2 numbers of memory, one pass; then S solutions of a d x d system.
    Source: after Baracaldo, Chen, Ludwig, Safavi 2017 (provenance). Differs: closed form in place of a training for
        each source, losses compared inside classes.

    Example:
        >>> stream = torch.Generator().manual_seed(0)
        >>> labels, sources = torch.arange(300) % 2, [f"source {i % 5}" for i in range(300)]
        >>> features = torch.randn(300, 4, generator=stream) + 3.0 * labels[:, None]
        >>> labels = torch.where(torch.arange(300) % 5 == 3, 1 - labels, labels)
        >>> block = {
        ...     "ids": tuple(map(str, range(300))),
        ...     "features": features,
        ...     "labels": labels,
        ...     "sources": sources,
        ... }
        >>> found = SourceEvidence().partial_fit(block).evidence()
        >>> max(found, key=lambda name: found[name].excess)
        'source 3'
    """

    def __init__(self, ridge: float = 0.01, smallest: int = 10) -> None:
        self.ridge = check_number(ridge, "ridge", 0.0, open_low=True)
        self.smallest = check_int(smallest, "smallest", 1)
        self.moments: dict[str, ClassMoments] = {}
        self._evidence: dict[str, SourceScore] | None = None

    def partial_fit(self, block: Mapping[str, Any]) -> "SourceEvidence":
        """Add the rows of a block; returns self."""
        rows, names = read_block(block, self._features(), key="view"), _names(block)
        for name in sorted(set(names)):
            mine = rows.usable & torch.tensor([found == name for found in names])
            added = moments_of(rows.features[mine], rows.labels[mine])
            self.moments[name] = merged(self.moments.get(name, {}), added)
        self._evidence = None
        return self

    def merge(self, other: "SourceEvidence") -> "SourceEvidence":
        """A new detector that has seen what both have seen."""
        check_kin(self, other, ("ridge", "smallest"))
        total = SourceEvidence(self.ridge, self.smallest)
        for name in sorted(self.moments.keys() | other.moments.keys()):
            total.moments[name] = merged(self.moments.get(name, {}), other.moments.get(name, {}))
        return total

    def score(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) float64, up = suspicious: 0 = loses as much as the others, 1 = twice as much."""
        rows, names, found = read_block(block, self._features(), key="view"), _names(block), self.evidence()
        scores = [found[name].excess if name in found else math.nan for name in names]
        return torch.where(rows.usable, torch.tensor(scores, dtype=torch.float64), torch.nan)

    def evidence(self) -> dict[str, SourceScore]:
        """What is found about each source with enough rows; nothing where fewer than two sources have them."""
        if self._evidence is None:
            self._evidence = self._judged()
        return self._evidence

    def _judged(self) -> dict[str, SourceScore]:
        parts = {name: found for name, found in sorted(self.moments.items()) if _rows(found) >= self.smallest}
        if len(parts) < 2:
            return {}
        problem = _Problem(parts, self.ridge)
        losses = {name: problem.losses(problem.fitted(without=name), of=name) for name in parts}
        everything = problem.fitted(without=None)
        excess = {name: _excess(name, losses, parts) for name in parts}
        table = torch.tensor(list(excess.values()), dtype=torch.float64)
        middle = float(table.median())
        spread = 1.4826 * float((table - middle).abs().median())
        found = {}
        for name, classes in parts.items():
            mean = sum(losses[name][label] * part.count for label, part in classes.items()) / _rows(classes)
            anomaly = (excess[name] - middle) / max(spread, 1e-12) if len(parts) >= 4 else math.nan
            harm = problem.harm(everything, problem.fitted(without=name), name)
            found[name] = SourceScore(_rows(classes), mean, excess[name], anomaly, harm)
        return found

    def _features(self) -> int | None:
        return next((len(part.mean) for found in self.moments.values() for part in found.values()), None)


class _Problem:
    """Ridge regression of class indicators on features and a constant, by sums that each source contributes."""

    def __init__(self, parts: Mapping[str, ClassMoments], ridge: float) -> None:
        self.parts = parts
        self.labels = sorted({label for found in parts.values() for label in found})
        whole = _pooled([part for found in parts.values() for part in found.values()])
        self.centre, self.count = whole.mean, whole.count
        self.damping = ridge * float(whole.scatter.trace()) / len(self.centre) + 1e-12
        self.sums = {name: self._sums(found) for name, found in parts.items()}

    def _sums(self, found: ClassMoments) -> tuple[Tensor, Tensor]:
        """Sums of z zT (d + 1, d + 1) and of z yT (d + 1, K) with z = (x - centre, 1)."""
        size = len(self.centre) + 1
        squares, products = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, len(self.labels))
        products = products.double()
        for label, part in found.items():
            squares += part.count * self._second(part)
            products[:, self.labels.index(label)] += part.count * self._first(part)
        return squares, products

    def _first(self, part: Moments) -> Tensor:
        return torch.cat([part.mean - self.centre, torch.ones(1, dtype=torch.float64)])

    def _second(self, part: Moments) -> Tensor:
        """Mean of z zT over the rows of a part."""
        first = self._first(part)
        second = torch.outer(first, first)
        second[:-1, :-1] += part.covariance()
        return second

    def fitted(self, without: str | None) -> Tensor:
        """Weights (d + 1, K) from all sources but one."""
        chosen = [sums for name, sums in self.sums.items() if name != without]
        squares, products = (torch.stack([sums[side] for sums in chosen]).sum(dim=0) for side in (0, 1))
        penalty = torch.full((len(squares),), self.damping, dtype=torch.float64)
        penalty[-1] = 1e-9 * self.count
        weights: Tensor = torch.linalg.solve(squares + torch.diag(penalty), products)
        return weights

    def losses(self, weights: Tensor, of: str) -> dict[int, float]:
        """Mean squared error of each class of a source."""
        found = {}
        for label, part in self.parts[of].items():
            wanted = torch.zeros(len(self.labels), dtype=torch.float64)
            wanted[self.labels.index(label)] = 1.0
            square = (weights * (self._second(part) @ weights)).sum()
            found[label] = float(square - 2 * wanted @ (weights.T @ self._first(part)) + 1)
        return found

    def harm(self, with_it: Tensor, without: Tensor, name: str) -> float:
        """Growth of the mean loss of all other sources, as a share of it."""
        grown = base = 0.0
        for other, classes in self.parts.items():
            if other != name:
                more, less = self.losses(with_it, other), self.losses(without, other)
                grown += sum((more[label] - less[label]) * part.count for label, part in classes.items())
                base += sum(less[label] * part.count for label, part in classes.items())
        return grown / max(base, 1e-12)


def _excess(name: str, losses: Mapping[str, Mapping[int, float]], parts: Mapping[str, ClassMoments]) -> float:
    """Loss of a source over the median of the others' in the same classes, as a share; classes of it alone are left."""
    mine = usual = 0.0
    for label, part in parts[name].items():
        others = [found[label] for other, found in losses.items() if other != name and label in found]
        if others:
            mine += part.count * losses[name][label]
            usual += part.count * float(torch.tensor(others, dtype=torch.float64).median())
    return (mine - usual) / usual if usual > 1e-12 else 0.0


def _pooled(parts: Sequence[Moments]) -> Moments:
    total: ClassMoments = {}
    for part in parts:
        total = merged(total, {0: part})
    return total[0]


def _rows(found: ClassMoments) -> int:
    return sum(part.count for part in found.values())


def _names(block: Any) -> list[str]:
    if not isinstance(block, Mapping) or "sources" not in block:
        found = sorted(map(str, block)) if isinstance(block, Mapping) else type(block).__name__
        raise refuse('a block with the key "sources"', "block", found, "Add one name a row")
    names = list(check_items(block["sources"], str, "sources", "Pass one name a row"))
    check_same_rows(("ids", "sources"), len(block["ids"]) if "ids" in block else len(names), len(names))
    return names
