"""Progress for long work: a tqdm bar on a terminal, silence elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(
    items: Iterable[T], description: str, total: int | None = None, enabled: bool | None = None
) -> Iterator[T]:
    """Iterate with a bar on standard error. `enabled=None` shows it on a terminal only."""
    from tqdm.auto import tqdm

    show = sys.stderr.isatty() if enabled is None else enabled
    yield from tqdm(items, desc=description, total=total, disable=not show, leave=False)
