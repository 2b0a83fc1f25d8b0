"""Moving a guard to another dtype: its model follows, its calibration stays exact."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def kept_dtypes(modules: list[nn.Module]) -> Iterator[None]:
    """Whatever is applied to these modules inside may move their buffers to another device, and change nothing else."""
    kept = [(module, name, buffer) for module in modules for name, buffer in module._buffers.items()]
    yield
    for module, name, buffer in kept:
        if buffer is not None:
            moved = module._buffers[name]
            module._buffers[name] = buffer if moved is None else buffer.to(moved.device)
