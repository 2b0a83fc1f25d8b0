"""How far views of a row differ: the suspect model's features, inputs near and wide, unseen heads, random features."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from aidefend._core.random import derive_seed, make_generator
from aidefend.sanitize.decide import Verdict
from aidefend.sanitize.features import Features
from aidefend.sanitize.suspect import Scaled
from aidefend.sanitize.written import WrittenVerdict

VIEWS = ("model", "independent", "wide", "out_of_fold", "random")
VIEW_SCORE = "view_disagreement"
_NEIGHBOURS = 10
_RANDOM = 256
_BANK_ROWS = 10_000
_WIDE = 0.35  # of a class: more than poison usually is
_SHARPNESS = 16.0
_LONGEST = 1e30
_BLOCK = 2048
_LEVEL = 0.01
_MOST_OF_IT = 0.5


@dataclasses.dataclass(frozen=True, eq=False)
class ViewReadings:
    """What each view takes every row for.

    Args:
        disagreement: (N,) float64 in [0, 1]: Jensen-Shannon divergence of the views' class shares over the logarithm of
            their number. 0 where all say the same, .31 where one of five is alone and sure, .42 where two are against
            three; NaN for rows that are not usable.
        placed: For each view (N,) int64, the likeliest class; -1 for rows that are not usable.
        labels: (N,) int64.
        usable: (N,) bool.
    """

    disagreement: Tensor
    placed: Mapping[str, Tensor]
    labels: Tensor
    usable: Tensor

    def facts(self, groups: Sequence[Verdict | WrittenVerdict]) -> dict[str, Any]:
        """JSON types: the views, the share of rows on which they differ, in all and by class, and who saw each group.

        A view saw a group where it places more than half of it in other classes than its label, and significantly more
        than of the rest of its class (Fisher's exact test, .01 shared by all groups and views).
        """
        first, *rest = (self.placed[name] for name in VIEWS)
        differ = torch.stack([first != other for other in rest]).any(dim=0)
        return {
            "used": list(VIEWS),
            "differ_on": self._share(differ, self.usable),
            "by_class": {
                str(label): self._share(differ, self.usable & (self.labels == label))
                for label in self.labels[self.usable].unique().tolist()
            },
            "groups": [self._of_group(verdict, len(groups)) for verdict in groups],
        }

    def _share(self, differ: Tensor, rows: Tensor) -> dict[str, Any]:
        n, count = int(rows.sum()), int((differ & rows).sum())
        return {"rows": count, "n": n, "share": count / n if n else None}

    def _of_group(self, verdict: Verdict | WrittenVerdict, groups: int) -> dict[str, Any]:
        group = verdict.group
        rows = self.usable.nonzero().flatten()[group.rows]
        found: dict[str, Any] = {"class": group.label, "rows": int(group.inside.sum()), "views": {}}
        for name in VIEWS:
            away = self.placed[name][rows] != group.label
            ours, n = int(away[group.inside].sum()), int(group.inside.sum())
            others, rest = int(away[~group.inside].sum()), int((~group.inside).sum())
            chance = stats.fisher_exact([[ours, n - ours], [others, rest - others]], alternative="greater").pvalue
            found["views"][name] = {
                "placed_elsewhere": ours / max(n, 1),
                "of_the_rest": others / max(rest, 1),
                "saw": bool(chance * groups * len(VIEWS) <= _LEVEL and ours > _MOST_OF_IT * n),
            }
        return found


def words_of_views(found: Mapping[str, Any]) -> str:
    """What one entry of `facts()["groups"]` says, for a person."""
    parts: dict[bool, list[str]] = {True: [], False: []}
    for name, view in found["views"].items():
        parts[view["saw"]].append(f"{name} ({view['placed_elsewhere']:.2f} of the group placed in other classes)")
    seen, unseen = (", ".join(parts[saw]) or "none" for saw in (True, False))
    return f"views that saw the group: {seen}; that did not: {unseen}"


def view_readings(found: Features, coordinates: Tensor, unseen: Tensor, seed: int) -> ViewReadings:
    """Five judgements of every row, none of which has seen the row itself.

    "model": labels of the ten nearest rows in the suspect model's features, which poison shapes. "independent": the
    same in principal directions of the inputs, which never met a label. "wide": there, too, by the distance within
    which 35 % of each class lie, which looks past a cluster of poison but is coarse. "out_of_fold": normal classes in
    these directions, fitted on the other folds. "random": as "wide", in features of a layer that was drawn and never
    trained, so that neither a label nor the data had a say in them. Poison with wrong labels keeps to its label in the
    first; it leaves it in the second and the fourth as far as it is rare or its pattern small, and in the third and
    the fifth nearly always.

    Args:
        found: All rows, usable or not.
        coordinates: (N, v) in the independent view.
        unseen: (N, K) log-probabilities of cross-validation.
        seed: Chooses the at most 10,000 rows, equally many a class, among which neighbours are sought, and the layer.
    Cost: distances of all rows to these, in three spaces.
    """
    rows, n = found.usable, len(found)
    labels = found.labels[rows]
    classes = labels.unique()
    bank = _bank(labels, classes, seed)
    shares = {
        "model": _neighbour_shares(found.features[rows], labels, classes, bank),
        "independent": _neighbour_shares(coordinates[rows], labels, classes, bank),
        "wide": _wide_shares(coordinates[rows], labels, classes, bank),
        "out_of_fold": torch.softmax(unseen[rows][:, classes].double(), dim=1),
        "random": _wide_shares(random_features(found.x[rows], seed), labels, classes, bank),
    }
    disagreement = torch.full((n,), torch.nan, dtype=torch.float64)
    disagreement[rows] = divergence(torch.stack([shares[name] for name in VIEWS]))
    placed = {name: torch.full((n,), -1) for name in VIEWS}
    for name in VIEWS:
        placed[name][rows] = classes[shares[name].argmax(dim=1)]
    return ViewReadings(disagreement, placed, found.labels, rows)


def random_features(x: Tensor, seed: int) -> Tensor:
    """(N, 256) float32: inputs (N, ...) through one layer of drawn weights and ReLU, whatever the labels are."""
    stream = make_generator(seed=derive_seed(seed, "random view") % 2**63)
    scaled = Scaled(x)
    parts = [scaled(part) for part in x.split(_BLOCK)]
    width = parts[0].shape[1]
    weights = torch.randn(width, _RANDOM, generator=stream) / math.sqrt(width)
    return torch.cat([torch.relu(part @ weights) for part in parts])


def no_readings(found: Features) -> ViewReadings:
    """Of data without a usable row."""
    n = len(found)
    placed = {name: torch.full((n,), -1) for name in VIEWS}
    return ViewReadings(torch.full((n,), torch.nan, dtype=torch.float64), placed, found.labels, found.usable)


def divergence(shares: Tensor) -> Tensor:
    """(n,) in [0, 1]: Jensen-Shannon divergence of V distributions (V, n, K), over log V."""
    mixed = torch.special.entr(shares.mean(dim=0)).sum(dim=1)
    own = torch.special.entr(shares).sum(dim=2).mean(dim=0)
    found: Tensor = (mixed - own) / math.log(len(shares))
    return found.clamp(0.0, 1.0)


def _bank(labels: Tensor, classes: Tensor, seed: int) -> Tensor:
    """Row numbers, at most the same number of each class."""
    stream = make_generator(seed=derive_seed(seed, "views") % 2**63)
    most = max(_NEIGHBOURS + 1, _BANK_ROWS // max(len(classes), 1))
    drawn = []
    for label in classes.tolist():
        rows = (labels == label).nonzero().flatten()
        drawn.append(rows[torch.randperm(len(rows), generator=stream)[:most]])
    return torch.cat(drawn).sort().values


def _neighbour_shares(points: Tensor, labels: Tensor, classes: Tensor, bank: Tensor) -> Tensor:
    """(n, K) shares of the classes among the nearest rows of the bank, a row itself left out."""
    votes = (labels[bank][:, None] == classes[None, :]).double()
    count = min(_NEIGHBOURS, len(bank) - 1)
    if count < 1:
        return votes.mean(dim=0).expand(len(points), -1)
    nearest = (distance.topk(count, dim=1, largest=False).indices for distance in _distances(points, bank))
    return torch.cat([votes[rows].mean(dim=1) for rows in nearest])


def _wide_shares(points: Tensor, labels: Tensor, classes: Tensor, bank: Tensor) -> Tensor:
    """(n, K), falling with the distance within which 35 % of a class lie, at least ten rows, a row itself left out."""
    parts = [(labels[bank] == label).nonzero().flatten() for label in classes.tolist()]
    scales = [min(len(part), max(_NEIGHBOURS, int(_WIDE * len(part)))) for part in parts]
    found = []
    for distance in _distances(points, bank):
        far = [distance[:, part].kthvalue(k, dim=1).values for part, k in zip(parts, scales, strict=True)]
        logs = torch.stack(far, dim=1).double().clamp(1e-9, _LONGEST).log()
        found.append(torch.softmax(-_SHARPNESS * logs, dim=1))
    return torch.cat(found)


def _distances(points: Tensor, bank: Tensor) -> Iterator[Tensor]:
    """Blocks (b, B) of distances to the rows of the bank, infinite to a row itself."""
    points = points.float()
    for start in range(0, len(points), _BLOCK):
        distance = torch.cdist(points[start : start + _BLOCK], points[bank])
        own = (bank >= start) & (bank < start + _BLOCK)
        distance[bank[own] - start, own.nonzero().flatten()] = torch.inf
        yield distance
