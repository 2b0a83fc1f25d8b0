"""Screening data that do not fit into memory: features on disk, a bounded sample judged, the verdict carried to all."""

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from aidefend._core.batches import Batch, iterate, sample_id
from aidefend._core.checks import check_int, refuse
from aidefend._core.modules import Model
from aidefend._core.naming import columns_of
from aidefend._core.random import derive_seed, make_generator
from aidefend._core.stats import wilson
from aidefend._core.storage import atomic_path, canonical_json
from aidefend.sanitize.choose import Detector, named_detectors
from aidefend.sanitize.decisions import PROPOSED, WEIGHT, as_json
from aidefend.sanitize.feature_store import FeatureStore
from aidefend.sanitize.features import Features, Layer
from aidefend.sanitize.findings import SCORE, THREAT
from aidefend.sanitize.provenance import read_names, removals
from aidefend.sanitize.sample import ClassSample
from aidefend.sanitize.screen import screen
from aidefend.sanitize.screen_report import ScreenReport
from aidefend.sanitize.separation import discriminant, held_out_log_odds, inverse_covariance, whitened, whitening
from aidefend.sanitize.stream_remarks import StreamRemarks, stream_remarks

_LEAST = 6
_STREAM_LIMITS = (
    "Judged was a sample of each class; other rows are quarantined only where they are like a group that was found in "
    "it. Of all rows it was asked whether their labels are wrong and whether they lie far out, in the features of the "
    "suspect model, which may have learnt both; and whether they are copies, to the bit."
)
_NOT_USABLE = "the input, or what the model makes of it, holds NaN or infinity"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StreamReport:
    """The verdict on every row of a stream, row i = sample i.

    Args:
        keep: (N,) bool, True = good.
        scores: (N,) float32, probability-like, above .5 in a poisoned group; NaN for rows that are not usable.
        sample: The report of the screen of the sample: evidence, detectable sizes, control.
        parameters: What was found and how well it carries over, JSON types.
        store: The features; ids and labels are read from there.
        limits: What is not shown.
        reasons: Those of the quarantined rows of the sample, by id.
        remarks: What is said of single rows.
    """

    keep: Tensor
    scores: Tensor
    sample: ScreenReport
    parameters: Mapping[str, Any]
    store: FeatureStore
    limits: str
    reasons: Mapping[str, tuple[str, ...]]
    remarks: StreamRemarks

    def __len__(self) -> int:
        return len(self.keep)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.summary()}>"

    def summary(self) -> str:
        """One line."""
        kept = int(self.keep.sum())
        targets = self.parameters["target_classes"]
        return f"screen_stream: {kept} of {len(self)} rows kept, {len(self) - kept} not; target classes {targets}"

    def rows(self, size: int = 1024) -> Iterator[dict[str, Any]]:
        """Blocks of ids, labels, keep, score, weight, proposed label (-1: none) and reasons, in order, from disk."""
        start, weights = 0, self.weights()
        for block in self.store.blocks(size):
            stop = start + len(block["ids"])
            keep, scores = self.keep[start:stop], self.scores[start:stop]
            yield {
                "ids": block["ids"],
                "labels": block["labels"],
                "keep": keep,
                "scores": scores,
                "weights": weights[start:stop],
                "proposed_labels": torch.where(keep, self.remarks.proposed[start:stop].long(), -1),
                "reasons": [self._reasons(block, row, start) for row in range(len(keep))],
            }
            start = stop

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """One line of JSON a row: id, row number, decision, score, reasons. The whole file or nothing.

        A decision is keep, action, weight, and the proposed label (null where none is), see `Decisions`.
        """
        with atomic_path(path) as temporary, temporary.open("w", encoding="ascii") as file:
            row = 0
            for block in self.rows():
                for place, row_id in enumerate(block["ids"]):
                    decision = (bool(block["keep"][place]), float(block["weights"][place]))
                    line = {"id": row_id, "row": row} | as_json(*decision, int(block["proposed_labels"][place]))
                    line |= {"scores": {SCORE: float(block["scores"][place])}, "reasons": block["reasons"][place]}
                    file.write(canonical_json(line) + "\n")
                    row += 1

    def report(self) -> ScreenReport:
        """All of it as one `ScreenReport` in memory, with sampler, weights and state: some 500 bytes a row."""
        blocks = list(self.rows())
        ids = tuple(row_id for block in blocks for row_id in block["ids"])
        reasons = tuple(row for block in blocks for row in block["reasons"])
        scores = {SCORE: self.scores.double(), "confident_learning": self.remarks.wrong.double()}
        columns = {WEIGHT: self.weights(), PROPOSED: torch.cat([block["proposed_labels"] for block in blocks])}
        facts = ("screen_stream", self.parameters, THREAT, self.limits)
        return ScreenReport(ids, self.keep, scores, {}, reasons, *facts, columns=columns)

    def changed(self, data: Any, batch_size: int = 512) -> Tensor:
        """Row numbers (K,) int64 of samples that are not what was judged: another input, another label, another place.

        Args:
            data: The stream as it is now, in the form and order in which it was judged.
            batch_size: Rows in memory at once.
        Raises: ConfigurationError: another number of samples.
        Cost: The data are read once, and each row is hashed; the model is not asked.
        """
        check_int(batch_size, "batch_size")
        judged = (row_id for block in self.store.blocks() for row_id in block["ids"])
        found = (row_id for batch in iterate(data, batch_size, bad="mark") for row_id in batch.ids)
        differ = []
        for row, (mine, other) in enumerate(itertools.zip_longest(judged, found)):
            if mine is None or other is None:
                rule = f"the {len(self)} samples that were judged"
                raise refuse(rule, "data", f"{row} samples" if other is None else "more", "Pass the same data")
            if sample_id(mine) != sample_id(other):
                differ.append(row)
        return torch.tensor(differ, dtype=torch.int64)

    def weights(self) -> Tensor:
        """(N,) float32 weights for the loss of each row, by the rules of `Decisions`."""
        return torch.where(self.keep, self.remarks.weights(), 0.0)

    def _reasons(self, block: Mapping[str, Any], row: int, start: int) -> tuple[str, ...]:
        score = float(self.scores[start + row])
        if not bool(block["usable"][row]):
            return (block["broken"].get(row, _NOT_USABLE),)
        if bool(self.keep[start + row]):
            return tuple(self.remarks.words(start + row, int(block["labels"][row])))
        if block["ids"][row] in self.reasons:
            return tuple(self.reasons[block["ids"][row]])
        label = int(block["labels"][row])
        return (f"structured poison in class {label}: like the group that was found in its sample (score {score:.3f})",)


def screen_stream(
    data: Any,
    model: Model,
    path: str | os.PathLike[str],
    layer: Layer | None = None,
    *,
    detectors: Literal["auto"] | Sequence[Detector] = "auto",
    sources: Sequence[Any] | None = None,
    groups: Sequence[Any] | None = None,
    rows_per_class: int = 2000,
    shard_rows: int = 8192,
    batch_size: int = 512,
    seed: int = 0,
) -> StreamReport:
    """Judge every row of data of any size in constant memory: read once, resumable, nothing removed.

    The data go through the model once, features to disk. `screen` judges a sample of each class, chosen by content (the
    same for every order of the rows, and for every batch size). Where it finds a poisoned group, a linear discriminant
    of the features that tells the group from the rest of its class judges all other rows of the class. All rows are
    asked for wrong labels (with proposals), copies and outliers: remarks with weights, that quarantine nothing.

    Guarantee: on the sample that of `screen`. Beyond it none: how many rows of the sample the discriminant misjudges
        when it has not seen them is in `parameters["extended"]`, with intervals.
    Args:
        data: Anything that `Samples` takes, also an iterator that can be read only once.
        model: See `extract_features`. There is no default: to train one is a pass of its own over the data.
        layer: See there.
        path: Folder of the feature store; after a crash, the same call goes on there.
        detectors: See `screen`; they propose groups in the sample. To score all rows by a detector that needs features
            only, ask `report.store.scores(detector)`.
        sources: One name a row, see `screen`; each source is scored as a whole by the features. In memory.
        groups: The same for groups.
        rows_per_class: Size of the sample of each class, whose inputs are held in memory: at least 24.
        shard_rows: See `FeatureStore.write`.
        batch_size: See there.
        seed: Everything that is drawn.
    Returns: The verdicts. Copies are found to the bit only, wrong labels and outliers in the features of the suspect
        model: what it has learnt by heart goes unseen. Poison that is so rare that its sample is too small to show (see
        `sample.parameters["detectable"]`) stays unseen: a class of a million rows with 2,000 sampled needs some
        hundredths of it poisoned.
    Raises: ConfigurationError: no labels, no readable sample, a folder with another store. IncompatibleModel: the model
        fails on the data.
    Cost: one forward pass a sample; `screen` of `rows_per_class` times the classes; memory for that sample, one shard
        of features, and some 50 bytes a row; five more passes over the features on disk for the remarks.

    Example:
        >>> import tempfile
        >>> x, y = torch.rand(60, 5, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = screen_stream(zip(x, y), torch.nn.Linear(5, 2), folder, rows_per_class=24)
        >>> found.summary()
        'screen_stream: 60 of 60 rows kept, 0 not; target classes []'
    """
    check_int(rows_per_class, "rows_per_class", 24)
    check_int(seed, "seed", 0)
    if not (isinstance(detectors, str) and detectors == "auto"):
        named_detectors(detectors, copied=False)  # refused before the data are read
    sample = ClassSample(rows_per_class, seed)

    def offer(batch: Batch, found: Features) -> None:
        rows = found.usable
        ids = [row_id for row_id, usable in zip(batch.ids, rows.tolist(), strict=True) if usable]
        sample.add(ids, batch.x[rows], found.labels[rows])

    store = FeatureStore.write(data, model, path, layer, shard_rows=shard_rows, batch_size=batch_size, on_batch=offer)
    sides = {"sources": read_names(sources, len(store), "sources"), "groups": read_names(groups, len(store), "groups")}
    return _judged(store, sample, model, layer, detectors, seed, columns_of(data), sides)


def _judged(
    store: FeatureStore,
    sample: ClassSample,
    model: Model,
    layer: Layer | None,
    detectors: Any,
    seed: int,
    columns: Any,
    sides: Mapping[str, list[str] | None],
) -> StreamReport:
    parts = {label: sample.of(label) for label in sample.classes()}
    if not parts:
        raise refuse("at least one sample that can be judged", "data", "none", "Repair the data")
    ids = tuple(row_id for part in parts.values() for row_id in part[0])
    labels = torch.tensor([label for label, part in parts.items() for _ in part[0]], dtype=torch.int64)
    judged = screen((torch.cat([part[1] for part in parts.values()]), labels), model, layer, detectors, seed=seed)
    place = {row_id: row for row, row_id in enumerate(ids)}
    rules = _rules(store, judged, place, labels, seed)
    keep, scores = _all_rows(store, judged, place, rules)
    extended = {str(label): rule.facts for label, rule in rules.items()}
    remarks = stream_remarks(store, sides["sources"], seed)
    share = wilson(int((~keep & scores.isfinite()).sum()), len(keep))
    parameters = {
        "target_classes": list(judged.parameters["target_classes"]),
        "quarantined_share": {"value": share.value, "low": share.low, "high": share.high, "n": len(keep)},
        "extended": extended,
        "bad_rows": int(scores.isnan().sum()),
        "remarks": {name: int(count) for name, count in remarks.counts(keep).items()},
        "source_evidence": dict(remarks.sources),
        **{name: removals(values, ~keep & scores.isfinite()) for name, values in sides.items() if values is not None},
        "sampled": {str(label): len(part[0]) for label, part in parts.items()},
        "detectable": dict(judged.parameters["detectable"]),
        "columns": columns,
        "store": store.digest,
        "seed": seed,
        "dtype": judged.parameters["dtype"],
        "shape": list(judged.parameters["shape"]),
    }
    reasons = {row_id: judged.reasons[row] for row_id, row in place.items() if not bool(judged.keep[row])}
    limits = f"{_STREAM_LIMITS} {judged.limits}"
    return StreamReport(keep, scores, judged, parameters, store, limits, reasons, remarks)


class _Rule:
    """Judges rows of one class by what told a poisoned group from the rest of its sample."""

    def __init__(self, features: Tensor, inside: Tensor, seed: int) -> None:
        self._whitening = whitening(features)
        points = whitened(features, self._whitening)
        self._direction, self._offset = discriminant(points, inside, inverse_covariance(points))
        unseen = held_out_log_odds(points, inside, make_generator(seed=derive_seed(seed, "stream") % 2**63)) > 0
        found = wilson(int((unseen & inside).sum()), int(inside.sum()))
        wrong = wilson(int((unseen & ~inside).sum()), int((~inside).sum()))
        self.facts: dict[str, Any] = {
            "group_in_sample": int(inside.sum()),
            "held_out_found": {"value": found.value, "low": found.low, "high": found.high},
            "held_out_wrong": {"value": wrong.value, "low": wrong.low, "high": wrong.high},
        }

    def chance(self, features: Tensor) -> Tensor:
        """(n,) of belonging to the group."""
        odds = whitened(features, self._whitening) @ self._direction + self._offset
        inside, chance = odds > 0, torch.sigmoid(odds).float()
        return torch.where(inside, chance.clamp(min=0.5 + 1e-6), chance.clamp(max=0.5))


def _rules(
    store: FeatureStore, judged: ScreenReport, place: Mapping[str, int], labels: Tensor, seed: int
) -> dict[int, _Rule]:
    """For each poisoned class the rule, from the stored features of its sample."""
    targets = list(judged.parameters["target_classes"])
    if not targets:
        return {}
    features = torch.full((len(place), int(store.index["features"])), torch.nan)
    for block in store.blocks():
        for row, row_id in enumerate(block["ids"]):
            if row_id in place:
                features[place[row_id]] = block["features"][row]
    grouped = ~judged.keep & (judged.scores[SCORE] > 0.5)
    mine = {label: (labels == label) & features.isfinite().all(dim=1) for label in targets}
    large = {
        label: rows for label, rows in mine.items() if _LEAST <= int(grouped[rows].sum()) <= int(rows.sum()) - _LEAST
    }
    return {label: _Rule(features[rows], grouped[rows], seed) for label, rows in large.items()}


def _all_rows(
    store: FeatureStore, judged: ScreenReport, place: Mapping[str, int], rules: Mapping[int, _Rule]
) -> tuple[Tensor, Tensor]:
    """(N,) keep and scores: of the sample as it was judged, of all others by the rule of their class."""
    keeps, scores = [], []
    for block in store.blocks():
        score = torch.where(block["usable"], 0.0, torch.nan)
        for label, rule in rules.items():
            rows = block["usable"] & (block["labels"] == label)
            if bool(rows.any()):
                score[rows] = rule.chance(block["features"][rows])
        keep = score <= 0.5
        for row, row_id in enumerate(block["ids"]):
            if row_id in place:
                score[row], keep[row] = float(judged.scores[SCORE][place[row_id]]), judged.keep[place[row_id]]
        keeps.append(keep)
        scores.append(score)
    return torch.cat(keeps), torch.cat(scores)
