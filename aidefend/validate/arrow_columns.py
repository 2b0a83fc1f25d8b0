"""A column of arrow as Python values, in memory that is bounded by the column itself, whatever its buffers claim."""

import sys
from collections.abc import Sequence
from typing import Any

from aidefend.validate.no_table import NoTable

MOST_BYTES = 256 * 2**20  # of all columns together, counted by shape: a text that all rows share counts for each
_OTHER = object()  # stands for a value of a kind that no rule of a column knows
_SHARING = ("is_string_view", "is_binary_view")  # rows may point to the same bytes
_TEXTS = ("is_string", "is_large_string")
_PLAIN = ("is_null", "is_boolean", "is_integer", "is_floating", *_TEXTS, "is_string_view")


def arrow_values(column: Any) -> Sequence[Any]:
    """The values of a pyarrow.Array or ChunkedArray, None where they are missing.

    A dictionary is turned into Python values once, and rows share them, as they do in arrow.
    Kinds that no rule of a column knows, such as nested ones, become objects that satisfy none.
    Raises: NoTable: buffers that contradict themselves, or more text than 256 MiB.
    """
    parts = column.chunks if hasattr(column, "chunks") else [column]
    return [value for part in parts for value in _values(part)]


def _values(part: Any) -> list[Any]:
    types = sys.modules["pyarrow"].types
    words = part.type.value_type if types.is_dictionary(part.type) else part.type
    if not any(getattr(types, name, _never)(words) for name in _PLAIN):
        return [_OTHER] * len(part)
    try:
        part.validate(full=True)  # offsets that leave their buffer would read foreign memory
    except Exception:
        raise NoTable("input: cannot be inspected") from None
    if types.is_dictionary(part.type):
        known = _values(part.dictionary)
        return [None if place is None else known[place] for place in part.indices.to_pylist()]
    if any(getattr(types, name, _never)(words) for name in _SHARING):
        _check_shared(part)
    found: list[Any] = part.to_pylist()
    return found


def _check_shared(part: Any) -> None:
    """Views are as long as they say, and may all say the same bytes: read the lengths first."""
    pyarrow = sys.modules["pyarrow"]
    sizes = pyarrow.Array.from_buffers(pyarrow.binary(16), len(part) + part.offset, [None, part.buffers()[1]])
    total = sum(int.from_bytes(view.as_py()[:4], "little") for view in sizes[part.offset :])
    if total > MOST_BYTES:
        raise NoTable("input: too many bytes")


def _never(_: Any) -> bool:
    """For kinds that an older pyarrow does not know."""
    return False
