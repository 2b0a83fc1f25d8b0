"""Train the user's own model again, reproducibly, without touching the user's random streams."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from aidefend._core.checks import refuse
from aidefend._core.modules import Model, preserve

TrainFn = Callable[[Any, int], Model]


def train_isolated(train_fn: TrainFn, dataset: Any, seed: int) -> Model:
    """`train_fn(dataset, seed)` with its own random streams; a module comes back in eval mode.

    The global streams start from `seed` inside the call, so that a train_fn which forgets its seed argument repeats
    all the same, and are put back afterwards, also when it raises.
    """
    if not callable(train_fn):
        raise refuse("train_fn to be callable", "train_fn", train_fn, "Pass train_fn(dataset, seed) -> model")
    with isolated_streams(seed):
        model = train_fn(dataset, seed)
    if not callable(model):
        raise refuse("train_fn to return a model", "train_fn(...)", model, "Return the trained callable")
    return model.eval() if isinstance(model, nn.Module) else model


@contextmanager
def isolated_streams(seed: int) -> Iterator[None]:
    """Inside: the global random streams are a function of `seed`. Afterwards: they are as before."""
    with preserve(_nothing):
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        np.random.set_state(np.random.RandomState(seed % 2**32).get_state())  # noqa: NPY002 - the stream user code reads
        random.setstate(random.Random(seed).getstate())  # noqa: S311 - repeatable, not secret
        yield


def _nothing() -> None:
    """A callable without state: what `preserve` keeps besides a model is the random streams."""
