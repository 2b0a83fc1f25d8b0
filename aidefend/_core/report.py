"""A verdict on every row of a data set or a batch: what was kept, what was not, and why."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import Subset

from aidefend._core.batches import as_dataset
from aidefend._core.checks import check_items, check_kind, check_path, check_same_rows, check_tensor, refuse
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend._core.stats import wilson
from aidefend._core.storage import atomic_path, canonical_json, plain

_SCHEMA = "aidefend.report/1"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Report:
    """One row for each sample, in the order of the data that was judged.

    Args:
        ids: Content ids, one a row, unique.
        keep: (N,) bool, True = good.
        scores: Name to (N,) float, higher = more suspicious; NaN where a method had no opinion.
        p_values: Name to (N,) float in (0, 1], where the method is calibrated.
        reasons: For each row the reasons in words; empty for a row without remarks.
        method: What judged.
        parameters: Its settings, JSON types.
        threat: The threat model in words.
        limits: What the verdict does not show.
        fitted: Arrays that judge new rows the same way, where the method has such a form.
        columns: Name to (N,) tensor of any dtype: what else is said of each row, such as weights or proposed labels.
    Raises: ConfigurationError: lengths differ, ids repeat, keep is not bool.
    Example:
        >>> report = Report(["a", "b"], torch.tensor([True, False]), reasons=[(), ("too far",)])
        >>> report.keep_indices.tolist(), report.summary()
        ([0], 'report: 1 of 2 rows kept, 1 not (too far: 1)')
    """

    ids: tuple[str, ...]
    keep: Tensor
    scores: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    p_values: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    reasons: tuple[tuple[str, ...], ...] = ()
    method: str = "report"
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    threat: str = ""
    limits: str = ""
    fitted: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    columns: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", check_items(self.ids, str, "ids", "Pass one text for each row"))
        for name in ("scores", "p_values", "parameters", "fitted", "columns"):
            check_kind(getattr(self, name), Mapping, name, "Pass a dict")
        for name in ("method", "threat", "limits"):
            check_kind(getattr(self, name), str, name, "Pass words")
        check_items(self.reasons, (tuple, list), "reasons", "Pass the reasons of each row, such as [(), ('too far',)]")
        n = len(self.ids)
        reasons = tuple(tuple(row) for row in self.reasons) or ((),) * n
        object.__setattr__(self, "reasons", reasons)
        check_tensor(self.keep, "keep", ndim=1, rows=n)
        check_same_rows(("ids", "reasons"), n, len(reasons))
        if self.keep.dtype != torch.bool:
            raise refuse("keep to be bool", "keep", self.keep, "True marks a good row")
        if len(set(self.ids)) != n:
            raise refuse(
                "ids to be unique", "ids", f"{n - len(set(self.ids))} repeated", "Use content ids with ordinals"
            )
        for name, values in [*self.scores.items(), *self.p_values.items()]:
            check_tensor(values, name, ndim=1, floating=True, finite=False, rows=n)
        for name, values in self.columns.items():
            check_tensor(values, name, ndim=1, finite=False, rows=n)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def keep_indices(self) -> Tensor:
        """Row numbers that were kept: (K,) int64, ascending."""
        return self.keep.nonzero().flatten()

    @property
    def quarantine_indices(self) -> Tensor:
        """Row numbers that were not kept: (N - K,) int64, ascending."""
        return (~self.keep).nonzero().flatten()

    def view(self, dataset: Any) -> Subset[Any]:
        """The kept rows of the data set that was judged, in order. The data itself is not changed."""
        return self._subset(dataset, self.keep_indices)

    def quarantine(self, dataset: Any) -> Subset[Any]:
        """The rows that were not kept."""
        return self._subset(dataset, self.quarantine_indices)

    def _subset(self, dataset: Any, indices: Tensor) -> Subset[Any]:
        data = as_dataset(dataset)
        if len(data) != len(self):  # type: ignore[arg-type]  # map-style, so it has a length
            found = f"{len(data)} samples"  # type: ignore[arg-type]
            raise refuse(f"the {len(self)} samples that were judged", "dataset", found, "Pass the same data set")
        return Subset(data, indices.tolist())

    def __and__(self, other: "Report") -> "Report":
        """Both verdicts on the same rows: kept only where both keep. `other` may list the rows in another order."""
        check_kind(other, Report, "other", "Pass another report")
        if set(self.ids) != set(other.ids):
            cure = "Join reports on the same data"
            raise refuse("two reports on the same rows", "other", f"{len(other)} rows with other ids", cure)
        place = {row_id: i for i, row_id in enumerate(other.ids)}
        order = torch.tensor([place[row_id] for row_id in self.ids], dtype=torch.int64)
        return Report(
            self.ids,
            self.keep & other.keep[order],
            _joined(self.scores, other.scores, other.method, order),
            _joined(self.p_values, other.p_values, other.method, order),
            tuple((*mine, *other.reasons[i]) for mine, i in zip(self.reasons, order.tolist(), strict=True)),
            f"{self.method} & {other.method}",
            {"left": dict(self.parameters), "right": dict(other.parameters)},
            " & ".join(dict.fromkeys(text for text in (self.threat, other.threat) if text)),
            " ".join(dict.fromkeys(text for text in (self.limits, other.limits) if text)),
            columns=_joined(self.columns, other.columns, other.method, order),
        )

    def counts(self) -> dict[str, int]:
        """How many of the rows that were not kept carry each reason."""
        found: dict[str, int] = {}
        for kept, row in zip(self.keep.tolist(), self.reasons, strict=True):
            for reason in row if not kept else ():
                found[reason] = found.get(reason, 0) + 1
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def __repr__(self) -> str:
        """The summary, and not every row: a report may have millions."""
        return f"<{type(self).__name__} {self.summary()}>"

    def summary(self) -> str:
        """One line: rows kept, rows not kept, the commonest reasons."""
        kept = int(self.keep.sum())
        top = ", ".join(f"{reason}: {count}" for reason, count in list(self.counts().items())[:3])
        detail = f" ({top})" if top else ""
        return f"{self.method}: {kept} of {len(self)} rows kept, {len(self) - kept} not{detail}"

    def state(self) -> dict[str, Any]:
        """Verdicts by id, and what judges new rows: plain, picklable, the input of `sanitize.screen_batch`."""
        return {
            "schema": _SCHEMA,
            "method": self.method,
            "rows": {row_id: i for i, row_id in enumerate(self.ids)},
            "keep": self.keep.clone(),
            "scores": dict(self.scores),
            "reasons": self.reasons,
            "parameters": plain(self.parameters),
            "fitted": dict(self.fitted),
        }

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types, rows included."""
        rows = {name: getattr(self, name) for name in ("ids", "keep", "scores", "p_values", "columns")}
        converted: dict[str, Any] = plain({**self._header(), **rows})
        return converted | {"reasons": [list(row) for row in self.reasons]}

    def _header(self) -> dict[str, Any]:
        return {
            "schema": _SCHEMA,
            "method": self.method,
            "parameters": self.parameters,
            "threat": self.threat,
            "limits": self.limits,
        }

    def to_evidence(self) -> Evidence:
        """One finding: the share of rows that were not kept, with its interval."""
        setting = {**plain(self.parameters), "reasons": self.counts()}
        title = f"Rows that {self.method} did not keep"
        identity = f"{self.method}.rejected_share"
        if not len(self):
            return Evidence([Finding(identity, title, n=0, status="not tested", limits="The data held no row.")])
        rejected = int((~self.keep).sum())
        share = wilson(rejected, len(self))
        severity = Severity.MEDIUM if rejected else Severity.INFO
        finding = Finding(identity, title, severity, *share, len(self), setting, self.threat, self.limits)
        return Evidence([finding], {"method": self.method})

    def digest(self) -> str:
        """SHA-256 over every field, in hex: equal for equal reports, in any process. Keep it where others cannot."""
        return _digest(canonical_json(self._header()), self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        """What is said of the rows, and the arrays."""
        text = canonical_json({"ids": self.ids, "reasons": self.reasons})
        tensors = {"keep": self.keep, "text": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}
        for kind in ("scores", "p_values", "fitted", "columns"):
            tensors |= {f"{kind}/{name}": value for name, value in getattr(self, kind).items()}
        return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file (no code in it), whole or not at all.

        Guarantee: equal reports give equal bytes, and `load` refuses a file whose content was changed. The digest in
            the file has no key: whoever can write the file can write one that fits. Where that matters, sign the file
            with `artifacts.Manifest`, or keep `digest()` where others cannot write.
        """
        # one entry only: the format writes several in no fixed order
        header = canonical_json({**self._header(), "digest": self.digest()})
        with atomic_path(path) as temporary:
            safetensors.torch.save_file(self._tensors(), temporary, {"report": header})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Report":
        """The report back from `save`. A file of another kind is refused, and one that was changed since."""
        place = check_path(path)
        try:
            with safetensors.safe_open(place, framework="pt") as file:
                raw = (file.metadata() or {})["report"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            header = json.loads(raw)
            if canonical_json(header) != raw or header.pop("digest") != _digest(canonical_json(header), tensors):
                raise ValueError("it was changed since it was written")
            text = json.loads(tensors.pop("text").numpy().tobytes())
            if header.pop("schema") != _SCHEMA:
                raise KeyError("schema")
        except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise refuse("a file written by Report.save", "path", str(path), f"Could not read it ({error})") from error
        parts: dict[str, Any] = {kind: {} for kind in ("scores", "p_values", "fitted", "columns")}
        for name in [name for name in tensors if "/" in name]:
            kind, _, rest = name.partition("/")
            parts[kind][rest] = tensors.pop(name)
        return cls(text["ids"], tensors["keep"], reasons=text["reasons"], **parts, **header)


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name]
        head = canonical_json([name, str(values.dtype), list(values.shape)])
        found.update(head.encode() + b"\n" + values.reshape(-1).view(torch.uint8).numpy().tobytes())
    found.update(header.encode())
    return found.hexdigest()


def _joined(left: Mapping[str, Tensor], right: Mapping[str, Tensor], method: str, order: Tensor) -> dict[str, Tensor]:
    merged = dict(left)
    for name, values in right.items():
        merged[name if name not in merged else _free_name(f"{method}/{name}", merged)] = values[order]
    return merged


def _free_name(name: str, taken: Mapping[str, Tensor]) -> str:
    """A name that is not taken: the plain one, or with a number behind it."""
    count, candidate = 2, name
    while candidate in taken:
        candidate, count = f"{name}-{count}", count + 1
    return candidate


def reasons_by_row(n: int, remarks: Sequence[tuple[int, str]]) -> tuple[tuple[str, ...], ...]:
    """Collect (row, reason) pairs into the form that `Report.reasons` takes."""
    rows: dict[int, list[str]] = {}
    for row, reason in remarks:
        rows.setdefault(row, []).append(reason)
    return tuple(tuple(rows.get(i, ())) for i in range(n))
