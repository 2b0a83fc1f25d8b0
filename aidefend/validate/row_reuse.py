"""Calibration rows that were used before: they score too low, and every rate that is read off them is wrong.

Inputs that traffic brings again and again are no such rows: in service, too, they are those that were trained on.
"""

import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from aidefend._core.batches import input_id
from aidefend._core.checks import check_items, check_same_rows, refuse

_OFTEN = 10  # times the median number of copies


def count_inputs(ids: Iterable[str]) -> Counter[str]:
    """How often each input occurs among rows with these content ids, whatever their labels."""
    return Counter(map(input_id, ids))


def frequent_inputs(counts: Mapping[str, int]) -> set[str]:
    """Inputs that traffic brings again and again, such as an empty form: not data that was copied as a whole."""
    least = _OFTEN * max(1.0, statistics.median(counts.values())) if counts else 0.0
    return {name for name, count in counts.items() if count > least}


def reused_inputs(counts: Mapping[str, int], used: Iterable[str]) -> set[str]:
    """Calibration inputs, but for frequent ones, that are among content ids of rows that were used before."""
    return (counts.keys() - frequent_inputs(counts)) & set(map(input_id, used))


def check_not_reused(ids: Collection[str] | None, used: Collection[str] | None, n: int) -> None:
    """Refuse content ids of n calibration rows that share an input with those that were used before.

    Labels and repetitions do not matter: the same input is the same row.
    """
    if used is None:
        return
    if ids is None:
        raise refuse("ids of the calibration rows beside used_ids", "ids", None, "Pass content_ids(x)")
    counts = count_inputs(check_items(ids, str, "ids", "Pass the content ids of the rows"))
    check_same_rows(("scores", "ids"), n, counts.total())
    if shared := reused_inputs(counts, check_items(used, str, "used_ids", "Pass the content ids of the rows")):
        rule = "calibration rows that neither trained the model nor fitted a detector: such rows score too low"
        raise refuse(rule, "ids", f"{len(shared)} shared inputs", "Calibrate on rows that were held out")
