"""What the user knows about rows beside their content: which are trusted, where they come from, whom they concern."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from aidefend._core.checks import refuse
from aidefend._core.stats import wilson


def read_trusted(trusted: Any, ids: Sequence[str]) -> Tensor:
    """(N,) bool from None, a bool mask (N,), row numbers, or content ids."""
    chosen = torch.zeros(len(ids), dtype=torch.bool)
    if trusted is None:
        return chosen
    if not isinstance(trusted, Collection) and not hasattr(trusted, "tolist"):
        raise refuse("trusted as a collection", "trusted", trusted, "Pass row numbers, content ids, or a bool mask")
    values = _listed(trusted, "trusted")
    if values and all(isinstance(value, bool) for value in values):
        if len(values) != len(ids):
            cure = "Pass one entry for each sample"
            raise refuse(f"a bool mask of {len(ids)} rows", "trusted", f"{len(values)} rows", cure)
        return torch.tensor(values)
    place = {row_id: i for i, row_id in enumerate(ids)}
    for value in values:
        row = place.get(value) if isinstance(value, str) else value
        if not isinstance(row, int) or isinstance(row, bool) or not 0 <= row < len(ids):
            cure = "Pass row numbers of this data set, content ids, or a bool mask"
            raise refuse(f"rows in 0 .. {len(ids) - 1} or content ids", "trusted", value, cure)
        chosen[row] = True
    return chosen


def _listed(values: Any, name: str) -> list[Any]:
    try:
        listed = values.tolist() if hasattr(values, "tolist") else list(values)
    except Exception as error:  # a sparse tensor, a list that computes its entries
        found = f"{type(error).__name__}: {error}"
        raise refuse(f"{name} as a collection that can be read", name, found, "Pass a list") from error
    if not isinstance(listed, list):
        raise refuse(f"{name} with one entry for each row", name, values, "Pass a list")
    return listed


def read_names(values: Any, n: int, name: str) -> list[str] | None:
    """One name a row, from a tensor, an array or a sequence; None stays None."""
    if values is None:
        return None
    if isinstance(values, str) or not (hasattr(values, "tolist") or isinstance(values, Sequence)):
        raise refuse(f"{name} with one entry for each row", name, type(values).__name__, "Pass a list of names")
    listed = _listed(values, name)
    if len(listed) != n:
        raise refuse(f"{name} with {n} entries", name, f"{len(listed)} entries", "Pass one entry for each sample")
    return [str(value) for value in listed]


def removals(names: Sequence[str], removed: Tensor) -> dict[str, dict[str, Any]]:
    """For each name: rows, rows removed, their share with interval, its ratio to the share elsewhere, and a p-value.

    The p-value (Fisher, one-sided) is of H: this name loses no larger share than the rest; it is not corrected.
    """
    found: dict[str, dict[str, Any]] = {}
    total, lost = len(names), int(removed.sum())
    for name in sorted(set(names)):
        mine = torch.tensor([other == name for other in names])
        n, count = int(mine.sum()), int((mine & removed).sum())
        share = wilson(count, n)
        elsewhere = (lost - count) / (total - n) if total > n else 0.0
        table = [[count, n - count], [lost - count, total - n - lost + count]]
        found[name] = {
            "rows": n,
            "removed": count,
            "share": share.value,
            "low": share.low,
            "high": share.high,
            "times_the_rest": share.value / elsewhere if elsewhere else None,
            "p_value": float(stats.fisher_exact(table, alternative="greater").pvalue),
            "more_than_twice_the_rest": bool(count and share.low > 2 * elsewhere),
        }
    return found
