"""The report of a screen, and what one does with it: train on it, write it down, look at it, overrule it."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from aidefend._core.batches import sample_id
from aidefend._core.checks import check_callable, check_items, check_kind, check_number, check_same_rows, refuse
from aidefend._core.report import Report
from aidefend._core.storage import atomic_path, canonical_json, plain
from aidefend.sanitize.decisions import PROPOSED, WEIGHT, Decisions, as_json, decisions_of
from aidefend.sanitize.gallery import page
from aidefend.sanitize.kept_sampler import KeptSampler
from aidefend.sanitize.material import Encoder, read_material, with_class_numbers
from aidefend.sanitize.raw_table import named_rows
from aidefend.sanitize.texts import text_rows

_BEGIN = "aidefend.releases"
_RELEASED = "released by "


class ScreenReport(Report):
    """A `Report` (see there for the fields) with sampler, weights, lines of JSON, a page, and releases.

    Raises: ConfigurationError: `parameters["releases"]` is not the unbroken chain that `release` writes.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_chain(self.releases)
        _check_released(self.ids, self.reasons, self.releases)

    @property
    def releases(self) -> tuple[dict[str, Any], ...]:
        """Who let which rows out of quarantine, and why, oldest first."""
        found = self.parameters.get("releases", ())
        return tuple(check_items(found, dict, "releases", "Pass what release() wrote"))

    def changed(self, dataset: Any, encoder: Encoder | None = None) -> Tensor:
        """Row numbers (K,) int64 of samples that are not what was judged: another input, another label, another place.

        Ask it before you train on `view`, which goes by row number. No row: input and label of each are the same, to
        the bit (labels by 32 bits of a hash; samples that could not be read have no content that could be compared).

        Args:
            dataset: The data as they are now, in the form in which they were judged.
            encoder: That of `screen`.
        Raises: ConfigurationError: another number of samples, or classes of other names.
        Cost: The data are read as `screen` reads them, and each row is hashed.
        """
        material = read_material(dataset, encoder)
        now, told = material.samples.ids, material.told(dataset)
        classes = plain(None if told is None else told["classes"])
        known = plain(self.parameters.get("classes", classes))
        if known != classes:  # a row's label is a number among them
            raise refuse(f"the classes {known} that were judged", "dataset", f"classes {classes}", "Compare the labels")
        if len(now) != len(self):
            cure = "Pass the same data set"
            raise refuse(f"the {len(self)} samples that were judged", "dataset", f"{len(now)} samples", cure)
        differ = [sample_id(mine) != sample_id(other) for mine, other in zip(self.ids, now, strict=True)]
        return torch.tensor(differ, dtype=torch.bool).nonzero().flatten()

    def _subset(self, dataset: Any, indices: Tensor) -> Subset[Any]:
        """Of a table with categories the rows are (dict from column to value, label as it stands), of texts pairs."""
        kind = self.parameters.get("kind")
        rows = named_rows(dataset) if kind == "mixed" else text_rows(dataset) if kind == "text" else dataset
        return super()._subset(with_class_numbers(rows)[0], indices)

    def sampler(self, shuffle: bool = True, seed: int = 0, rank: int = 0, world_size: int = 1) -> KeptSampler:
        """Draws the kept rows from the data as it is; resumable, and the same rows on all ranks. See `KeptSampler`."""
        return KeptSampler(self.keep_indices, shuffle, seed, rank, world_size)

    def decisions(self) -> Decisions:
        """What to do with each row: keep, quarantine, down-weight, or relabel; with weights and reasons."""
        return decisions_of(self)

    def weights(self, down: str | None = None, least: float = 0.0) -> Tensor:
        """(N,) float32 weights for the loss of each row: 0 in quarantine, else those of `decisions()`.

        Args:
            down: Name of a score in [0, 1]: kept rows weigh 1 less the score, in place of what the table says. No
                opinion (NaN) leaves 1.
            least: Smallest weight of a kept row, in [0, 1].
        Raises: ConfigurationError: no such score, or it leaves [0, 1].
        """
        check_number(least, "least", 0.0, 1.0)
        weights = self.decisions().weights.double().clamp(min=least)
        if down is not None:
            if check_kind(down, str, "down", "Name a score") not in self.scores:
                raise refuse(f"a score among {sorted(self.scores)}", "down", down, "Name one of these")
            score = self.scores[down].double().nan_to_num(0.0)
            if not bool(((score >= 0) & (score <= 1)).all()):
                low, high = float(score.min()), float(score.max())
                cure = "Choose a score that is a probability, such as structured_poison"
                raise refuse("a score in [0, 1]", down, f"values from {low:.3g} to {high:.3g}", cure)
            weights = (1 - score).clamp(min=least)
        return torch.where(self.keep, weights, 0.0).float()

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """One line of JSON a row: id, row number, decision, scores, p-values, reasons. The whole file or nothing.

        A decision is keep, action, weight, and the proposed label (null where none is), see `decisions`.
        """
        table = self.decisions()
        weights, proposed = table.weights.tolist(), table.proposed_labels.tolist()
        scores = {name: plain(values) for name, values in self.scores.items()}
        p_values = {name: plain(values) for name, values in self.p_values.items()}
        with atomic_path(path) as temporary, temporary.open("w", encoding="ascii") as file:
            for row, row_id in enumerate(self.ids):
                line = {"id": row_id, "row": row, "reasons": list(self.reasons[row])}
                line |= as_json(bool(self.keep[row]), weights[row], proposed[row])
                line["scores"] = {name: values[row] for name, values in scores.items()}
                line["p_values"] = {name: values[row] for name, values in p_values.items()}
                file.write(canonical_json(line) + "\n")

    def to_html(
        self, path: str | os.PathLike[str], dataset: Any = None, texts: Sequence[str] | None = None, limit: int = 100
    ) -> None:
        """A page for the person who decides: what was found, and each quarantined row with what speaks against it.

        Args:
            path: The file; self-contained, no script, nothing is loaded from elsewhere.
            dataset: The data that was judged, to show the rows: pictures (C, H, W) with one or three channels as
                pictures, texts as texts, rows of tables with the names of their columns, others as numbers.
            texts: One text a row, shown in place of numbers.
            limit: Rows that are shown, the most suspicious first.
        Raises: MissingExtra: jinja2 or matplotlib is not installed (`report`). ConfigurationError: other lengths.
        """
        if texts is not None:
            texts = check_items(texts, str, "texts", "Pass one text for each row")
            check_same_rows(("report", "texts"), len(self), len(texts))
        html = page(self, None if dataset is None else self.quarantine(dataset), texts, limit)
        with atomic_path(path) as temporary:
            temporary.write_text(html, encoding="utf-8")

    def release(
        self, ids: Sequence[str], by: str, why: str, log: Callable[[Mapping[str, Any]], Any] | None = None
    ) -> "ScreenReport":
        """A new report in which these rows are kept, with the decision written down; this one stays as it was.

        Guarantee: releases form a chain of digests: one that is changed, dropped (the last one, too, as long as the row
            says that it was released) or moved later is refused when the report is made or loaded. The chain has no
            key, so whoever can write the whole file can forge it: pass the append method of an `AuditLog` as `log`.
        Args:
            ids: Ids of quarantined rows.
            by: Who decides.
            why: The grounds.
            log: Called with the entry before the report is made; if it raises, nothing is released.
        Raises: ConfigurationError: an id is not in quarantine, or `by` or `why` is empty.
        """
        names = check_items(ids, str, "ids", "Pass the ids of the rows")
        for name, words in (("by", by), ("why", why)):
            if not check_kind(words, str, name, "Say it in words").strip():
                raise refuse(f"{name} in words", name, words, "Say who decides and on what grounds")
        place = {row_id: row for row, row_id in enumerate(self.ids)}
        held = [row_id for row_id in names if row_id in place and not bool(self.keep[place[row_id]])]
        if len(held) != len(names) or not names or len(set(names)) != len(names):
            found = next((row_id for row_id in names if row_id not in held), f"{len(names)} ids")
            cure = "Take them from report.quarantine_indices"
            raise refuse("ids of rows in quarantine, each once", "ids", found, cure)
        entry = {"ids": sorted(names), "by": by, "why": why, "previous": _last(self.releases)}
        entry["digest"] = _digest(entry)
        if log is not None:
            check_callable(log, "log", "Pass a function that takes the entry")(dict(entry))
        keep, reasons = self.keep.clone(), [*self.reasons]
        columns = {name: values.clone() for name, values in self.columns.items()}
        for row in (place[row_id] for row_id in names):
            keep[row], reasons[row] = True, (*self.reasons[row], _words_of(entry))
            for name, value in ((WEIGHT, 1.0), (PROPOSED, -1)):
                if name in columns:
                    columns[name][row] = value
        parameters = {**self.parameters, "releases": [*self.releases, entry]}
        return dataclasses.replace(self, keep=keep, reasons=tuple(reasons), parameters=parameters, columns=columns)


def _words_of(entry: Mapping[str, Any]) -> str:
    """What a released row says of its release."""
    return f"{_RELEASED}{entry['by']}: {entry['why']}"


def _last(releases: Sequence[Mapping[str, Any]]) -> str:
    return str(releases[-1]["digest"]) if releases else hashlib.sha256(_BEGIN.encode()).hexdigest()


def _digest(entry: Mapping[str, Any]) -> str:
    body = {name: value for name, value in entry.items() if name != "digest"}
    return hashlib.sha256(canonical_json(body).encode()).hexdigest()


def _check_chain(releases: Sequence[Mapping[str, Any]]) -> None:
    for place, entry in enumerate(releases):
        known = json.loads(canonical_json(entry))
        if known.get("previous") != _last(releases[:place]) or known.get("digest") != _digest(known):
            cure = "Restore the report: somebody changed what was released"
            raise refuse("an unbroken chain of releases", "releases", f"entry {place} does not fit", cure)


def _check_released(
    ids: Sequence[str], reasons: Sequence[Sequence[str]], releases: Sequence[Mapping[str, Any]]
) -> None:
    """Every row that says it was released has its entry: a chain without its end is unbroken, too."""
    known = {(row_id, _words_of(entry)) for entry in releases for row_id in entry["ids"]}
    for row_id, said in zip(ids, reasons, strict=True):
        if any(words.startswith(_RELEASED) and (row_id, words) not in known for words in said):
            cure = "Restore the report: somebody took an entry out"
            raise refuse("an unbroken chain of releases", "releases", f"none of row {row_id[:16]}", cure)
