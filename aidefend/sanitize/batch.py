"""The verdicts of a screen inside a data pipeline: a pure function from batch to batch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aidefend._core.batches import content_ids, sample_id
from aidefend._core.checks import check_same_rows, refuse
from aidefend._core.frames import column_batches, is_frame
from aidefend._core.samples import Samples
from aidefend.sanitize.mixed_table import class_of, row_text
from aidefend.sanitize.raw_table import rows_of
from aidefend.sanitize.texts import TEXT_KEYS, text_id

_UNKNOWN = "not judged: the row was not in the data that was screened"
_COLUMNS = ("aidefend_keep", "aidefend_score", "aidefend_reason")


def screen_batch(batch: Any, state: Mapping[str, Any], *, decode: Callable[[Any], Any] | None = None) -> Any:
    """Look up the verdict on every row of a batch by its content: same columns plus three.

    A pure function of (batch, state) that pickles: `functools.partial(screen_batch, state=report.state())` goes into
    Ray Data's `map_batches`, Hugging Face's `Dataset.map(batched=True)`, or a loop over pandas columns. Rows are never
    removed here: filter on `aidefend_keep`.

    Guarantee: fails closed: a row whose input and label were not screened as they stand gets keep = False, score NaN
        and a reason. A changed pixel, label or precision makes another row (numbers are first read in the dtype and
        shape that were screened, so that lists and flattened copies are recognised; what that dtype cannot hold is
        another row, but for digits beyond its precision).
    Args:
        batch: Columns by name (each an array, a tensor or a list with one entry a row), a pandas DataFrame, an arrow
            Table or RecordBatch. Columns are those of the screen, else found by the names that `Samples` knows.
        state: `report.state()` of a screen.
        decode: How the screen read an input, where it did: see `Samples`.
    Returns: A new batch of the same kind: the given columns unchanged, `aidefend_keep` (bool), `aidefend_score` (float,
        up = suspicious), `aidefend_reason` (text, empty where there is none). In a dict they are of the kind of the
        input column: tensors (texts as list), numpy arrays, or lists.
    Raises: ConfigurationError: no input or label column, lengths differ, another state.
    Cost: one hash a row.

    Example:
        >>> from aidefend.sanitize import screen
        >>> x, y = torch.rand(60, 3, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2
        >>> state = screen((x, y)).state()
        >>> screen_batch({"x": [[9.0, 9.0, 9.0], x[0].tolist()], "y": [0, 0]}, state)["aidefend_keep"]
        [False, True]
    """
    columns = _columns(batch)
    names = _names(columns, _checked(state), decode)
    places = _places(columns, names, state)
    known = places >= 0
    at = places.clamp(min=0)
    keep = state["keep"][at] & known if len(state["keep"]) else known
    suspicion = state["scores"]["structured_poison"]
    score = torch.where(known, suspicion[at], torch.nan) if len(suspicion) else torch.full((len(at),), torch.nan)
    reasons = ["; ".join(state["reasons"][place]) if place >= 0 else _UNKNOWN for place in places.tolist()]
    return _as_kind(batch, names, keep, score, reasons)


def _checked(state: Any) -> Mapping[str, Any]:
    parts = {"rows", "keep", "scores", "reasons", "parameters"}
    if not isinstance(state, Mapping) or not parts <= set(state) or "structured_poison" not in state["scores"]:
        raise refuse("the state() of a screen's report", "state", type(state).__name__, "Pass screen(...).state()")
    return state


def _columns(batch: Any) -> Mapping[str, Any]:
    if isinstance(batch, Mapping):
        return batch
    if not is_frame(batch) or not (hasattr(batch, "assign") or hasattr(batch, "append_column")):
        rule, cure = "batch to be a mapping from column names to columns, or a table", "Pass a dict of columns"
        raise refuse(rule, "batch", type(batch).__name__, cure)
    return next(column_batches(batch, max(len(batch), 1)))


def _names(columns: Mapping[str, Any], state: Mapping[str, Any], decode: Any) -> Samples:
    """The columns that were screened, where the batch has them; else those that data sets use."""
    told = state["parameters"].get("columns") or {}
    if state["parameters"].get("kind") == "text":
        texts = next((key for key in (told.get("inputs"), *TEXT_KEYS) if key in columns), TEXT_KEYS[0])
        return Samples(None, texts, told["label"] if told.get("label") in columns else None)
    inputs, label = told.get("inputs"), told.get("label")
    wanted = [inputs] if isinstance(inputs, str) else list(inputs or ())
    there = all(name in columns for name in [*wanted, *([label] if label is not None else [])])
    return Samples(None, inputs, label, decode, told.get("classes")) if there else Samples(None, decode=decode)


def _places(columns: Mapping[str, Any], names: Samples, state: Mapping[str, Any]) -> Tensor:
    """Row number in the screened data of every row of the batch, -1 where it was not screened."""
    inputs, label = names.columns_in(columns)
    if label is None:
        raise refuse("a label column", "batch", sorted(map(str, columns)), "Name the column y, label or target")
    used = [*inputs, label]
    count = check_same_rows(tuple(used), *(len(columns[name]) for name in used))
    if state["parameters"].get("kind") in ("text", "mixed"):
        found_rows = _written_ids(columns, inputs, label, state)
        return torch.tensor([state["rows"].get(row_id, -1) for row_id in found_rows], dtype=torch.int64)
    form = state["parameters"]["shape"], getattr(torch, state["parameters"]["dtype"])
    found = _ids(columns, count, names, *form)
    if found is None:  # some row is bad: each by itself
        rows = ({name: columns[name][row : row + 1] for name in used} for row in range(count))
        found = [(_ids(row, 1, names, *form) or [None])[0] for row in rows]
    return torch.tensor([state["rows"].get(row_id, -1) for row_id in found], dtype=torch.int64)


def _written_ids(
    columns: Mapping[str, Any], inputs: Sequence[str], label: str, state: Mapping[str, Any]
) -> list[str | None]:
    """Ids of texts, or of rows of a table with categories or gaps."""
    classes = (state["parameters"].get("columns") or {}).get("classes")
    place = None if classes is None else {name: number for number, name in enumerate(classes)}
    labels = (class_of(y) if place is None else place.get(str(y)) for (y,) in rows_of(columns, [label]))
    if state["parameters"]["kind"] == "text":
        texts: Iterable[Any] = columns[inputs[0]]
    else:
        texts = (row_text(inputs, row) for row in rows_of(columns, inputs))
    return [text_id(text, y) for text, y in zip(texts, labels, strict=True)]


def _ids(
    columns: Mapping[str, Any], count: int, names: Samples, shape: Sequence[int], dtype: torch.dtype
) -> Sequence[str | None] | None:
    """Ids of rows, None where one cannot be read; equal rows share a verdict, so their ordinal does not matter."""
    try:
        inputs, labels = names.pick(columns)
        if names.decode is not None:
            x = torch.stack([names.input_of(row) for row in inputs]) if count else torch.zeros(0, *shape, dtype=dtype)
        else:
            x = names.input_of(inputs)
        x, y = x.reshape(count, *shape), names.labels_of(labels, count)
        rows = x.to(dtype)
        exact = (rows.to(x.dtype) == x).flatten(1).all(dim=1) if not dtype.is_floating_point else None
    except MemoryError:
        raise
    except Exception:
        return None
    ids = [sample_id(row_id) for row_id in content_ids(rows, y)]
    return (
        ids if exact is None else [row_id if same else None for row_id, same in zip(ids, exact.tolist(), strict=True)]
    )


def _as_kind(batch: Any, names: Samples, keep: Tensor, score: Tensor, reasons: list[str]) -> Any:
    """The batch with its verdicts, in a batch of its kind."""
    if not isinstance(batch, Mapping):
        found = dict(zip(_COLUMNS, (keep.numpy(), score.numpy(), reasons), strict=True))
        if hasattr(batch, "assign"):
            return batch.assign(**found)
        return _with_arrow_columns(batch, found)
    like = batch[names.columns_in(batch)[0][0]]
    if isinstance(like, Tensor):
        columns: tuple[Any, Any, Any] = keep, score, reasons
    elif isinstance(like, list | tuple):
        columns = keep.tolist(), score.tolist(), reasons
    else:
        columns = keep.numpy(), score.numpy(), np.array(reasons, dtype=object)
    return {**batch, **dict(zip(_COLUMNS, columns, strict=True))}


def _with_arrow_columns(batch: Any, found: Mapping[str, Any]) -> Any:
    import pyarrow  # there, since the batch is one of its tables

    for name, values in found.items():
        batch = batch.append_column(name, pyarrow.array(values))
    return batch
