"""Caps on what a screen takes: the largest share of a class, and of a group of people or things, that may go."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from aidefend._core.checks import check_number, refuse

_DEFAULT = 1.0
_MUCH = 0.5


@dataclasses.dataclass(frozen=True, eq=False)
class Cap:
    """The largest share of each part of the data that structured poison takes out.

    Args:
        parts: (N) the name of each row's part: its class, or its group.
        share: One share in (0, 1] for all parts, or by name; names that are not in it have no cap.
        kind: What a part is, in words.
    """

    parts: Sequence[str]
    share: float | Mapping[str, float]
    kind: str

    def beyond(self, removed: Tensor, usable: Tensor, scores: Tensor) -> dict[str, list[int]]:
        """For each part the rows over its cap, the least suspicious, ascending; of equal scores the later ones."""
        mine: dict[str, list[int]] = {}
        sizes: dict[str, int] = {}
        for name, counts in zip(self.parts, usable.tolist(), strict=True):
            if counts:
                sizes[name] = sizes.get(name, 0) + 1
        for row in removed.nonzero().flatten().tolist():
            mine.setdefault(self.parts[row], []).append(row)
        found = {}
        for name in sorted(mine):
            ranked = sorted(mine[name], key=lambda row: (-float(scores[row]), row))
            over = sorted(ranked[int(self.of(name) * sizes[name]) :])
            if over:
                found[name] = over
        return found

    def of(self, name: str) -> float:
        """The share of one part."""
        return self.share.get(name, _DEFAULT) if isinstance(self.share, Mapping) else self.share


def depleted(labels: Tensor, usable: Tensor, removed: Tensor) -> dict[str, dict[str, int]]:
    """For each class of which more than half of the usable rows go: how many do (`removed`), and how many stay."""
    found = {}
    for label in labels[removed & usable].unique().tolist():
        mine = usable & (labels == label)
        gone, n = int((mine & removed).sum()), int(mine.sum())
        if gone > _MUCH * n:
            found[str(label)] = {"removed": gone, "left": n - gone}
    return found


def words_of_caps(facts: Mapping[str, Any]) -> str:
    """What a reader of `parameters["cap"]` must not miss: classes that are nearly gone, and poison that a cap kept."""
    said = ""
    for label, rows in facts.get("depleted", {}).items():
        said += (
            f"Class {label} loses {rows['removed']} of its {rows['removed'] + rows['left']} rows to quarantine: "
            f"have them looked at and get others before training. "
        )
    for cap, spared in (("max_removed", "spared"), ("max_removed_group", "spared_groups")):
        kept = sum(len(rows) for rows in facts.get(spared, {}).values())
        if kept:
            said += f"{cap} kept {kept} rows of groups that were found to be poison; {cap}=1.0 takes them, too. "
    return said


def read_cap(share: Any, parts: Sequence[str] | None, name: str, kind: str) -> Cap | None:
    """The cap from what the user passed: a share, or a mapping from names (or class numbers) to shares.

    Raises: ConfigurationError: a share outside (0, 1], a name that no row has, a cap on groups where none are given.
    """
    if isinstance(share, Mapping):
        read: float | dict[str, float] = {str(key): _share(value, name) for key, value in share.items()}
    else:
        read = _share(share, name)
    if parts is None:
        if read != _DEFAULT:
            raise refuse("groups where they have a cap", name, share, "Pass groups=, one name a row")
        return None
    unknown = sorted(set(read) - set(parts)) if isinstance(read, dict) else []
    if unknown:
        raise refuse(f"names of a {kind} that some row has", name, unknown, "Correct the names")
    return Cap(parts, read, kind)


def _share(value: Any, name: str) -> float:
    return float(check_number(value, name, 0, 1, open_low=True))
