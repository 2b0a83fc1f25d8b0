"""The randomness of an attack: one stream for a batch, or one a row where results must not depend on batching."""

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from aidefend._core.checks import check_tensor, refuse
from aidefend._core.random import make_generator, normal
from aidefend._core.threat import Threat


class Stream(Protocol):
    """Where an attack's random numbers come from."""

    def start(self, threat: Threat, x: Tensor) -> Tensor:
        """A random allowed point for each row."""
        ...

    def normal(self, x: Tensor) -> Tensor:
        """N(0, 1) in the shape of x."""
        ...

    def rows(self, index: Tensor) -> "Stream":
        """The stream of x[index]."""
        ...


@dataclasses.dataclass(frozen=True)
class BatchStream:
    """One generator for the whole batch: fastest; a row's numbers depend on its place in the batch."""

    generator: torch.Generator

    def start(self, threat: Threat, x: Tensor) -> Tensor:
        """A random allowed point for each row."""
        return threat.random_start(x, self.generator)

    def normal(self, x: Tensor) -> Tensor:
        """N(0, 1) in the shape of x."""
        return normal(tuple(x.shape), self.generator, x)

    def rows(self, index: Tensor) -> "BatchStream":
        """The same stream."""
        return self


@dataclasses.dataclass(frozen=True)
class RowStreams:
    """One generator for each row: a row's numbers depend on its own seed alone."""

    generators: tuple[torch.Generator, ...]

    @classmethod
    def of(cls, seeds: Tensor) -> "RowStreams":
        """Streams from (N,) int64 seeds."""
        return cls(tuple(torch.Generator().manual_seed(seed) for seed in seeds.tolist()))

    def start(self, threat: Threat, x: Tensor) -> Tensor:
        """A random allowed point for each row."""
        picks = torch.arange(len(x), device=x.device).split(1)
        points = [
            threat.rows(x, pick).random_start(x[pick], stream)
            for pick, stream in zip(picks, self.generators, strict=True)
        ]
        return torch.cat(points)

    def normal(self, x: Tensor) -> Tensor:
        """N(0, 1) in the shape of x."""
        shape = (1, *x.shape[1:])
        return torch.cat([normal(shape, stream, x) for stream in self.generators])

    def rows(self, index: Tensor) -> "RowStreams":
        """The streams of x[index]."""
        return RowStreams(tuple(self.generators[i] for i in index.tolist()))


def make_stream(n: int, generator: torch.Generator | None, row_seeds: Tensor | None) -> Stream:
    """Row streams where seeds are given, else one stream; both at once are refused."""
    if row_seeds is None:
        return BatchStream(make_generator(generator))
    if generator is not None:
        cure = "Pass row_seeds for results that do not depend on batching, or generator"
        raise refuse("one source of randomness", "generator, row_seeds", "both", cure)
    check_tensor(row_seeds, "row_seeds", ndim=1, floating=False, rows=n)
    return RowStreams.of(row_seeds)
