"""What a screen says in words and numbers: reasons per row, facts about the whole, and what it does not show."""

import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from aidefend._core.batches import sample_id
from aidefend._core.stats import wilson
from aidefend.sanitize.caps import Cap, words_of_caps
from aidefend.sanitize.decide import POWER, SMALLEST_CLASS, Decision, Verdict, smallest_detectable
from aidefend.sanitize.decisions import PROPOSED, WEAK, WEIGHT
from aidefend.sanitize.features import Features, finite_rows
from aidefend.sanitize.remarks import Remarks
from aidefend.sanitize.written import WrittenVerdict

THREAT = (
    "An adversary puts training rows of other classes under one or more wrong labels (dirty-label backdoor), with a "
    "pattern that is added or written onto the input, in parts or fainter than at the test, or with a smooth "
    "displacement of pictures (in tables: values of a few columns; in texts: words or letters); or puts one constant "
    "mark on pictures of one class, which it may have made hard to learn, and leaves their labels right. The adversary "
    "controls inputs and labels of those rows, and inputs of rows with right labels (covers), not the training, and "
    "does not shape the poison against this very screen."
)
LIMITS = (
    "A kept row is not shown to be clean. Not looked for: poison with right labels other than one constant mark on "
    "pictures (single rows crafted for one target; rows made hard to learn whose mark moves, comes in several forms "
    "in one cluster, varies by more than a twentieth of the range, or is in a twentieth of other classes), triggers "
    "that depend on the input beyond one pattern or one displacement, wrong labels without a pattern (remarked, not "
    "quarantined), and groups below the stated size. A constant mark that one class alone has, and that the model "
    "takes for the class, is called poison whoever put it there. "
    "A displacement of few rows (about 1 % of the data) and poison that leaves no gap in "
    "the model's features go unseen. Cover rows (trigger with right labels) are kept. "
    "The model's features belong to the adversary as far as the poison shaped them."
)
SCORE = "structured_poison"
ALPHA = 0.01
_BAD_INPUT = "the input holds NaN or infinity"
_BAD_OUTPUT = "what the model makes of the input holds NaN or infinity"


class RowVerdicts:
    """The verdict on every row of the data: `keep`, `scores`, `p_values`, `reasons`, `in_group`, `removed`, `columns`.

    Rows with equal input and label share one verdict. `removed` counts what the screen took for poison, trusted rows
    and rows with NaN or infinity not among them.

    Args:
        found: All rows, usable or not.
        decision: About the usable ones.
        trusted: (N,) bool, rows that are never quarantined for what a group of theirs is, or for a remark.
        remarks: What detectors say of single rows.
        quarantine: Whether a remark quarantines its row.
        caps: On what is removed of the usable rows of a class or group; the most suspicious go first. A later cap
            counts what an earlier one has left.
        seen: For each quarantined group which views saw it, in words.
    """

    def __init__(
        self,
        found: Features,
        decision: Decision,
        trusted: Tensor,
        remarks: Mapping[str, Remarks] = MappingProxyType({}),
        *,
        quarantine: bool = False,
        caps: Sequence[Cap] = (),
        seen: Sequence[str] = (),
    ) -> None:
        n = len(found)
        self.scores = torch.where(found.usable, 0.0, torch.nan).double()
        self.p_values = torch.ones(n, dtype=torch.float64)
        self.in_group = torch.zeros(n, dtype=torch.bool)
        self._remarks: list[list[str]] = [[] for _ in range(n)]
        self._weights = torch.ones(n, dtype=torch.float64)
        self._proposed = torch.full((n,), -1)
        self._places = found.usable.nonzero().flatten()
        for verdict, words in itertools.zip_longest(decision.quarantined, seen):
            self._mark(verdict, words)
        self._spread_to_copies(found)
        self.removed = self.in_group & ~trusted
        self.spared = [self._capped(found, cap) for cap in caps]
        self.keep = found.usable & ~self.removed
        self._remark(found, decision, trusted)
        for said in remarks.values():
            self._remark_rows(said, trusted, quarantine)
        self._abstain(found, decision)
        self.reasons = tuple(tuple(row) for row in self._remarks)

    @property
    def columns(self) -> dict[str, Tensor]:
        """Weights and proposed labels (N,), as `Decisions` reads them."""
        return {WEIGHT: torch.where(self.keep, self._weights, 0.0).float(), PROPOSED: self._proposed}

    def _capped(self, found: Features, cap: Cap) -> dict[str, list[int]]:
        """Rows beyond a cap, by class or group: they are kept, and say so."""
        spared = cap.beyond(self.removed, found.usable, self.scores)
        for name, rows in spared.items():
            self.removed[rows] = False
            self._weights[rows] = 1 - self.scores[rows]
            for row in rows:
                self._remarks[row].append(f"kept: more than {cap.of(name):.2f} of its {cap.kind} would go")
        return spared

    def _mark(self, verdict: Verdict | WrittenVerdict, seen: str | None) -> None:
        group = verdict.group
        rows = self._places[group.rows]
        chance = torch.sigmoid(group.log_odds)
        said = torch.where(group.inside, chance.clamp(min=0.5 + 1e-5), chance.clamp(max=0.5))
        self.scores[rows] = torch.maximum(self.scores[rows], said)
        members = rows[group.inside]
        self.p_values[members] = self.p_values[members].clamp(max=max(verdict.p_value, 1e-300))
        self.in_group[members] = True
        for row, like in zip(members.tolist(), group.looks_like[group.inside].tolist(), strict=True):
            seems = f"; looks like class {like}, labelled {group.label}" if like >= 0 else ""
            self._remarks[row] += [*_said(verdict), f"{SCORE} score above 0.5{seems}", *([seen] if seen else [])]

    def _spread_to_copies(self, found: Features) -> None:
        """Equal rows are interchangeable: where one is in a group, all are."""
        first = {sample_id(found.ids[row]): row for row in self.in_group.nonzero().flatten().tolist()}
        for row in (~self.in_group).nonzero().flatten().tolist():
            twin = first.get(sample_id(found.ids[row]))
            if twin is not None:
                self.in_group[row], self.scores[row], self.p_values[row] = True, self.scores[twin], self.p_values[twin]
                self._remarks[row] = [*self._remarks[twin][:2], "equal to a row of the group"]

    def _remark(self, found: Features, decision: Decision, trusted: Tensor) -> None:
        finite, unreadable = finite_rows(found.x), dict(found.broken)
        for row in (~found.usable).nonzero().flatten().tolist():
            self._remarks[row].append(unreadable.get(row, _BAD_OUTPUT if bool(finite[row]) else _BAD_INPUT))
        for row in (self.in_group & trusted).nonzero().flatten().tolist():
            self._remarks[row].append("kept: the row is trusted")
        for row in self._places[decision.mislabelled].tolist():
            if not self.in_group[row]:
                self._remarks[row].append("kept: fits another class better than its label (no structured poison)")
                self._weights[row] = 1.0 if trusted[row] else WEAK

    def _remark_rows(self, said: Remarks, trusted: Tensor, quarantine: bool) -> None:
        for at, row in enumerate(said.flagged.nonzero().flatten().tolist()):
            kept = not quarantine or bool(trusted[row])
            self.keep[row] = bool(self.keep[row]) and kept
            self._remarks[row].append(_prefix(bool(self.keep[row])) + said.words[at])
            if not bool(trusted[row]):
                self._weights[row] = min(float(self._weights[row]), said.weights[at])
                self._proposed[row] = said.proposed[at] if said.proposed else self._proposed[row]

    def _abstain(self, found: Features, decision: Decision) -> None:
        """Rows of classes that were too small to be searched say so."""
        for label in unsearched(found, decision):
            rows = (found.usable & (found.labels == label)).nonzero().flatten().tolist()
            for row in rows:
                self._remarks[row].append(f"kept: not searched, its class has {len(rows)} rows")


def unsearched(found: Features, decision: Decision) -> list[int]:
    """Classes in which no group was looked for: too few rows, or no other class to compare with."""
    seen = {*decision.searched, *decision.written_detectable}
    return [label for label in found.labels.unique().tolist() if label not in seen]


def _prefix(kept: bool) -> str:
    return "kept: " if kept else ""


def _said(verdict: Verdict | WrittenVerdict) -> tuple[str, str]:
    """What the group is, and what speaks against it."""
    facts, label = verdict.to_dict(), verdict.group.label
    if isinstance(verdict, WrittenVerdict):
        return _said_of_pattern(facts)
    if facts["right_labels"] is not False:
        return _said_of_mark(facts)
    group = f"structured poison in class {label}: group of {_size_of(facts)}"
    evidence = (
        f"evidence: {facts['foreign']:.2f} of the group fit another class and not {label}; it stands apart in the "
        f"features; its common pattern turns {facts['transfer']:.2f} of other rows into {label} "
        f"(corrected p = {facts['p_value']:.1g}, threshold {ALPHA})"
    )
    return group, evidence


def _size_of(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['group']} of its {facts['rows']} rows "
        f"(share {facts['poisoned_share']:.3f}, 95 % interval {facts['low']:.3f} to {facts['high']:.3f})"
    )


def _said_of_mark(facts: Mapping[str, Any]) -> tuple[str, str]:
    label = facts["class"]
    labels = "with right labels" if facts["right_labels"] else "(labels not judged)"
    group = f"mark {labels} in class {label}: group of {_size_of(facts)}"
    mark = "a constant mark: the rest of the class looks the same with it"
    if "cells" in facts:
        mark = f"{facts['cells']} cells that are alike in it; {facts['elsewhere']:.2f} of other classes hold the same"
    evidence = (
        f"evidence: it stands apart in the features, by {mark}; "
        f"it turns {facts['transfer']:.2f} of rows of other classes into {label}, with its cells in another order "
        f"{facts['scrambled']:.2f} (corrected p = {facts['p_value']:.1g}, threshold {ALPHA})"
    )
    return group, evidence


def _said_of_pattern(facts: Mapping[str, Any]) -> tuple[str, str]:
    label = facts["class"]
    group = f"written pattern in class {label}: {facts['pattern']} in {_size_of(facts)}"
    evidence = (
        f"evidence: without it {facts['foreign']:.2f} of them fit another class and not {label} (of the rest of the "
        f"class {facts['rest_foreign']:.2f}); {facts['purity']:.2f} of all rows with it are labelled {label}; it turns "
        f"{facts['transfer']:.2f} of other rows into {label} in the model (corrected p = {facts['p_foreign']:.1g})"
    )
    return group, evidence


def facts_of(decision: Decision, removed: int, n: int) -> dict[str, Any]:
    """Counts, shares and detectable sizes of a decision, JSON types."""
    share = wilson(removed, n)
    levels = decision.threshold, decision.gate
    sizes = {label: smallest_detectable(rows, *levels) for label, rows in decision.searched.items()}
    return {
        "target_classes": sorted({verdict.group.label for verdict in decision.quarantined}),
        "poisoned_share": {"value": share.value, "low": share.low, "high": share.high, "rows": removed, "n": n},
        "poison": [verdict.to_dict() for verdict in decision.quarantined],
        "closest_harmless": [verdict.to_dict() for verdict in decision.harmless],
        "classes_searched": {str(label): rows for label, rows in decision.searched.items()},
        "detectable": {
            str(label): {"rows": size, "share_of_class": None if size is None else size / decision.searched[label]}
            for label, size in sizes.items()
        },
        "written_detectable": {str(label): size for label, size in decision.written_detectable.items()},
        "power": POWER,
        "tests": decision.tests,
        "levels": {
            "foreign_and_gap": decision.threshold,
            "others": decision.gate,
            "proven_in_another_class": decision.kin_threshold,
        },
    }


def limits_of(facts: Mapping[str, Any], skipped: Sequence[int]) -> str:
    """The limits in words, with the smallest group that this data could have revealed."""
    sizes = [entry["rows"] for entry in facts["detectable"].values() if entry["rows"] is not None]
    clean = [label for label in facts["classes_searched"] if int(label) not in facts["target_classes"]]
    said = ""
    if sizes and clean:
        said = (
            f"In classes {', '.join(clean)} no evidence of a group of at least {max(sizes)} rows with a common "
            f"pattern, at power {POWER} if it stands apart in the features. "
        )
    said += _limits_of_routes(facts, clean) + _written_limits(facts) + words_of_caps(facts.get("cap", {}))
    if not facts["classes_searched"] and not facts["written_detectable"]:
        said = "No class was searched: nothing is shown. "
    if skipped:
        said += f"Not searched, fewer than {SMALLEST_CLASS} rows: classes {', '.join(map(str, skipped))}. "
    return said + LIMITS


def _limits_of_routes(facts: Mapping[str, Any], open_classes: Sequence[str]) -> str:
    """What the routes beside the first one would have found, for each the largest of the smallest sizes."""
    said = []
    for name, route in facts.get("detectable_by_route", {}).items():
        sizes = [route["classes"][label]["rows"] for label in open_classes if name not in ("pattern", "written")]
        seen = [size for size in sizes if size is not None]
        if seen:
            said.append(f"No evidence there of at least {max(seen)} rows ({name}), at power {route['power']}. ")
    return "".join(said)


def _written_limits(facts: Mapping[str, Any]) -> str:
    sizes = dict(facts["written_detectable"].items())
    open_classes = [label for label in sizes if int(label) not in facts["target_classes"]]
    seen = [sizes[label] for label in open_classes if sizes[label] is not None]
    said = ""
    if seen:
        said = (
            f"In classes {', '.join(label for label in open_classes if sizes[label] is not None)} no evidence of at "
            f"least {max(seen)} rows with a value, range or word in common that fit another class without it "
            f"(if nine in ten do), at power {POWER}. "
        )
    blind = [label for label in open_classes if sizes[label] is None]
    return said + (f"No power for such patterns in classes {', '.join(blind)}. " if blind else "")
