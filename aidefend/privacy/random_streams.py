"""Torch's global streams, set back for a pass that runs a second time: its dropout must fall the same way again."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def current_streams() -> tuple[Tensor, list[Tensor]]:
    """Where torch's global streams stand: the processor's, and those of the graphics cards in use."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []


@contextmanager
def replayed(states: tuple[Tensor, list[Tensor]]) -> Iterator[None]:
    """The global streams as they were, for dropout that must fall the same way again; then as they are now."""
    now = current_streams()
    _set_streams(states)
    try:
        yield
    finally:
        _set_streams(now)


def _set_streams(states: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
