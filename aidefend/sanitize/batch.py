"""The verdicts of a screen inside a data pipeline: a pure function from batch to batch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aidefend._core.batches import INPUT_KEYS, LABEL_KEYS, ContentIds
from aidefend._core.checks import check_same_rows, refuse

_UNKNOWN = "not judged: the row was not in the data that was screened"
_COLUMNS = ("aidefend_keep", "aidefend_score", "aidefend_reason")


def screen_batch(batch: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Look up the verdict on every row of a batch by its content: same columns plus three.

    A pure function of (batch, state) that pickles: `functools.partial(screen_batch, state=report.state())` goes into
    Ray Data's `map_batches`, Hugging Face's `Dataset.map(batched=True)`, or a loop over pandas columns. Rows are never
    removed here: filter on `aidefend_keep`.

    Guarantee: fails closed: a row whose input and label were not screened as they stand gets keep = False, score NaN
        and a reason. A changed pixel, label or precision makes another row (numbers are first read in the dtype and
        shape that were screened, so that lists and flattened copies are recognised).
    Args:
        batch: Columns by name, each an array, a tensor or a list with one entry a row; inputs under one of the keys
            that data sets use ("x", "image", "pixel_values", ...), labels under one of "y", "label", "labels", ...
        state: `report.state()` of a screen.
    Returns: A new dict: the given columns unchanged, `aidefend_keep` (bool), `aidefend_score` (float, up = suspicious),
        `aidefend_reason` (text, empty where there is none); of the kind of the input column: tensors (texts as list),
        numpy arrays, or lists.
    Raises: ConfigurationError: no input or label column, lengths differ, another state.
    Cost: one hash a row.

    Example:
        >>> from aidefend.sanitize import screen
        >>> x, y = torch.rand(60, 3, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2
        >>> state = screen((x, y)).state()
        >>> screen_batch({"x": [[9.0, 9.0, 9.0], x[0].tolist()], "y": [0, 0]}, state)["aidefend_keep"]
        [False, True]
    """
    places = _places(batch, _checked(state))
    known = places >= 0
    at = places.clamp(min=0)
    keep = state["keep"][at] & known if len(state["keep"]) else known
    suspicion = state["scores"]["structured_poison"]
    score = torch.where(known, suspicion[at], torch.nan) if len(suspicion) else torch.full((len(at),), torch.nan)
    reasons = ["; ".join(state["reasons"][place]) if place >= 0 else _UNKNOWN for place in places.tolist()]
    like = batch[_key(batch, INPUT_KEYS, "an input")]
    return {**batch, **dict(zip(_COLUMNS, _as_kind(like, keep, score, reasons), strict=True))}


def _checked(state: Any) -> Mapping[str, Any]:
    parts = {"rows", "keep", "scores", "reasons", "parameters"}
    if not isinstance(state, Mapping) or not parts <= set(state) or "structured_poison" not in state["scores"]:
        raise refuse("the state() of a screen's report", "state", type(state).__name__, "Pass screen(...).state()")
    return state


def _places(batch: Any, state: Mapping[str, Any]) -> Tensor:
    """Row number in the screened data of every row of the batch, -1 where it was not screened."""
    if not isinstance(batch, Mapping):
        cure = "Pass a dict of columns, for example dict(frame) or table.to_pydict()"
        raise refuse("batch to be a mapping from column names to columns", "batch", type(batch).__name__, cure)
    inputs, labels = batch[_key(batch, INPUT_KEYS, "an input")], batch[_key(batch, LABEL_KEYS, "a label")]
    check_same_rows(("inputs", "labels"), len(inputs), len(labels))
    shape, dtype = state["parameters"]["shape"], getattr(torch, state["parameters"]["dtype"])
    found = [_row_id(x, y, shape, dtype) for x, y in zip(inputs, labels, strict=True)]
    return torch.tensor([state["rows"].get(row_id, -1) for row_id in found], dtype=torch.int64)


def _row_id(x: Any, y: Any, shape: list[int], dtype: torch.dtype) -> str | None:
    """The id that the row had if it was screened; equal rows share a verdict, so their ordinal does not matter."""
    try:
        row = (x if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x))).to(dtype).reshape(1, *shape)
        label = torch.as_tensor(np.asarray(y)).reshape(1)
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = bool(label == label.round()) if label.is_floating_point() else True
    return ContentIds().of(row, label.long())[0] if whole else None


def _key(batch: Mapping[str, Any], keys: tuple[str, ...], what: str) -> str:
    found = next((key for key in keys if key in batch), None)
    if found is None:
        raise refuse(f"{what} column among {keys}", "batch", sorted(map(str, batch)), "Rename the column")
    return found


def _as_kind(like: Any, keep: Tensor, score: Tensor, reasons: list[str]) -> tuple[Any, Any, Any]:
    if isinstance(like, Tensor):
        return keep, score, reasons
    if isinstance(like, list | tuple):
        return keep.tolist(), score.tolist(), reasons
    return keep.numpy(), score.numpy(), np.array(reasons, dtype=object)
