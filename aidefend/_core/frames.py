"""Tables of other libraries as a stream of column batches: DataFrames, arrow, Parquet, Ray and Hugging Face."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from aidefend._core.checks import refuse
from aidefend._core.errors import AidefendError, MissingExtra
from aidefend._core.samples import Columns, widths

_ARROW_NUMBERS = ("int", "uint", "float", "double", "halffloat", "bool")
_ENDINGS = (".parquet", ".pq")


def is_frame(data: Any) -> bool:
    """Whether this is one table in memory: pandas and what resembles it, an arrow Table or RecordBatch."""
    if isinstance(data, type | Mapping | Sequence | Tensor | np.ndarray) or is_hugging_face(data):
        return False
    arrow = hasattr(data, "to_pydict") and hasattr(data, "schema") and hasattr(data, "column_names")
    return arrow or (hasattr(data, "columns") and hasattr(data, "to_numpy") and hasattr(data, "__getitem__"))


def is_hugging_face(data: Any) -> bool:
    """Whether this is a `datasets.Dataset` or `IterableDataset`: they give samples as dicts."""
    return not isinstance(data, type) and hasattr(data, "with_format") and hasattr(data, "features")


def is_stored(data: Any) -> bool:
    """Whether this names or opens tables that are read in parts: Parquet files, arrow and Ray data sets, readers."""
    if isinstance(data, str | os.PathLike):
        place = Path(data)
        return place.suffix in _ENDINGS or place.is_dir()
    return not isinstance(data, type) and any(
        hasattr(data, how) and hasattr(data, "schema") for how in ("to_batches", "iter_batches", "read_next_batch")
    )


def column_batches(data: Any, rows: int) -> Iterator[Columns]:
    """Columns of a frame or of stored tables, at most `rows` rows at once; the whole is never in memory twice.

    Raises: ConfigurationError: a column name stands twice, no such file, a damaged one. MissingExtra: pyarrow is not
        installed.
    """
    for part in _read_parts(data, rows):
        if isinstance(part, Mapping):
            yield Columns(part)
            continue
        names = [str(name) for name in (part.column_names if hasattr(part, "column_names") else part.columns)]
        if len(set(names)) != len(names):
            raise refuse("each column name once", "data", names, "Rename the columns")
        yield Columns({str(name): raw_column(part[name]) for name in names_of(part)})


def names_of(frame: Any) -> list[Any]:
    """Column names of a table in memory, as it spells them."""
    return list(frame.column_names if hasattr(frame, "column_names") else frame.columns)


def _read_parts(data: Any, rows: int) -> Iterator[Any]:
    try:
        yield from _parts(data, rows)
    except (AidefendError, MemoryError):
        raise
    except Exception as error:  # whatever the library raises on what it finds in the file
        raise _unread(error) from error


def _parts(data: Any, rows: int) -> Iterator[Any]:
    """Slices of a table, each a table."""
    if isinstance(data, str | os.PathLike):
        data = _opened(Path(data))
    if hasattr(data, "iter_batches"):  # pyarrow.parquet.ParquetFile, ray.data.Dataset
        yield from data.iter_batches(batch_size=rows)
    elif hasattr(data, "read_next_batch"):  # an arrow stream, read once
        yield from _sliced(data, rows)
    elif hasattr(data, "to_batches") and not hasattr(data, "to_pydict"):  # pyarrow.dataset.Dataset
        # one batch after the other: reading ahead would hold most of a file in memory
        yield from data.to_batches(batch_size=rows, batch_readahead=1, fragment_readahead=1)
    else:
        yield from _sliced([data], rows)


def _sliced(tables: Iterable[Any], rows: int) -> Iterator[Any]:
    for table in tables:
        for start in range(0, max(len(table), 1), rows):
            if hasattr(table, "iloc"):
                yield table.iloc[start : start + rows]
            else:
                yield table.slice(start, rows) if hasattr(table, "slice") else table[start : start + rows]


def _opened(place: Path) -> Any:
    try:
        from pyarrow import dataset
    except ImportError as error:
        raise MissingExtra("pyarrow", "arrow") from error
    if not place.exists():
        raise refuse("the path of a Parquet file or of a folder of them", "data", str(place), "Correct the path")
    files = sorted(str(file) for ending in _ENDINGS for file in place.rglob(f"*{ending}")) if place.is_dir() else place
    if not files:
        raise refuse("a folder with Parquet files", "data", str(place), f"Name one with files {_ENDINGS}")
    try:
        return dataset.dataset(files if isinstance(files, Path) else list(files), format="parquet")
    except Exception as error:  # whatever arrow finds in the file
        raise _unread(error) from error


def _unread(error: Exception) -> AidefendError:
    found = f"{type(error).__name__}: {error}"[:300]
    return refuse("a table that can be read", "data", found, "Write the file again, or leave it out")


def raw_column(values: Any) -> Any:
    """A column as tensor, array or list; columns of other libraries are read by what they can do."""
    if isinstance(values, Tensor | np.ndarray | list | tuple):
        return values
    if hasattr(values, "to_pylist"):  # an arrow column: numbers without holes as they are, all else by value
        plain = str(values.type).rstrip("0123456789") in _ARROW_NUMBERS and not values.null_count
        return values.to_numpy(zero_copy_only=False) if plain else values.to_pylist()
    return values.to_numpy()


def column_widths(data: Any) -> dict[str, bool] | None:
    """Each column of a table and whether it holds more than one number a row; None where the data is no table."""
    if isinstance(data, str | os.PathLike) and is_stored(data):
        data = _opened(Path(data))
    if is_hugging_face(data):
        return None if data.features is None else {str(n): not _scalar(kind) for n, kind in data.features.items()}
    if is_stored(data) and callable(data.schema):  # ray.data.Dataset
        return widths(next(column_batches(data, 1)))
    if is_stored(data) and hasattr(data, "schema"):
        schema = getattr(data, "schema_arrow", data.schema)
        return {field.name: "list" in str(field.type) or "binary" in str(field.type) for field in schema}
    if is_frame(data):
        return widths(next(column_batches(data, 1)))
    return None


def _scalar(kind: Any) -> bool:
    """Whether a feature of a Hugging Face data set is one number, text or class."""
    return getattr(kind, "dtype", None) is not None and type(kind).__name__ in ("Value", "ClassLabel")
