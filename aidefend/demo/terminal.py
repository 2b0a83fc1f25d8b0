"""The summary as a table that fits the terminal."""

import shutil
import textwrap
from collections.abc import Sequence

HEADER = ("threat", "attack", "undefended", "defended", "limits")
_WEIGHTS = (3, 4, 4, 6, 5)


def summary_table(rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """The rows under a header, wrapped into columns; one block a row where the terminal is narrow.

    Args:
        rows: Five cells each.
        width: Characters a line; None asks the terminal.
    """
    total = shutil.get_terminal_size((140, 24)).columns if width is None else width
    if total < 100:
        blocks = ["\n".join(f"{name + ':':<12}{cell}" for name, cell in zip(HEADER, row, strict=True)) for row in rows]
        return "\n\n".join(blocks)
    spare = total - 3 * (len(HEADER) - 1)
    widths = [spare * weight // sum(_WEIGHTS) for weight in _WEIGHTS]
    lines = [*_wrapped(HEADER, widths), "-+-".join("-" * width for width in widths)]
    for row in rows:
        lines += [*_wrapped(row, widths), "-+-".join("-" * width for width in widths)]
    return "\n".join(lines[:-1])


def _wrapped(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    columns = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, widths, strict=True)]
    height = max(len(column) for column in columns)
    padded = [column + [""] * (height - len(column)) for column in columns]
    return [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*padded, strict=True)
    ]
