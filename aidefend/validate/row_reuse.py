"""Calibration rows that were used before: they score too low, and every rate that is read off them is wrong."""

from collections.abc import Collection

from aidefend._core.batches import input_id
from aidefend._core.checks import check_items, check_same_rows, refuse


def check_not_reused(ids: Collection[str] | None, used: Collection[str] | None, n: int) -> None:
    """Refuse content ids of n calibration rows that share an input with those that were used before.

    Labels and repetitions do not matter: the same input is the same row.
    """
    if used is None:
        return
    if ids is None:
        raise refuse("ids of the calibration rows beside used_ids", "ids", None, "Pass content_ids(x)")
    names = [input_id(name) for name in check_items(ids, str, "ids", "Pass the content ids of the rows")]
    check_same_rows(("scores", "ids"), n, len(names))
    before = {input_id(name) for name in check_items(used, str, "used_ids", "Pass the content ids of the rows")}
    if shared := before.intersection(names):
        rule = "calibration rows that neither trained the model nor fitted a detector: such rows score too low"
        raise refuse(rule, "ids", f"{len(shared)} shared inputs", "Calibrate on rows that were held out")
