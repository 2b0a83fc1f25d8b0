"""Benign accounts of a small table world, an attacker in it, and a Redis that lives in this process."""

import torch
from torch import Tensor

FEATURES, CLASSES = 12, 3
WEIGHT = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(7))


def model(x: Tensor) -> Tensor:
    """Logits of a linear classifier over the flattened rows."""
    return x.flatten(1)[:, :FEATURES] @ WEIGHT


def day(seed: int, n: int = 20, shape: tuple[int, ...] = (FEATURES,)) -> Tensor:
    """The queries of a benign account: n unrelated rows, the last ones a burst of near duplicates for one in four."""
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=stream)
    if seed % 4 == 0:
        x[-5:] = x[-6] + 0.02 * torch.randn(5, *shape, generator=stream)
    return x


def days(count: int, first: int = 0, shape: tuple[int, ...] = (FEATURES,)) -> list[tuple[Tensor, Tensor]]:
    """Streams for `QueryMonitor.calibrate`."""
    return [(x, model(x)) for x in (day(first + i, shape=shape) for i in range(count))]


def probes(n: int, seed: int = 0, size: float = 0.05, shape: tuple[int, ...] = (FEATURES,)) -> Tensor:
    """An attacker's probes around one point."""
    stream = torch.Generator().manual_seed(10_000 + seed)
    return torch.randn(1, *shape, generator=stream) + size * torch.randn(n, *shape, generator=stream)


class WatchError(Exception):
    """Named as in redis."""


class FakeRedis:
    """The part of the protocol that `RedisStore` uses, with real transactions: a version for every key."""

    def __init__(self) -> None:
        self.values: dict[bytes, object] = {}
        self.versions: dict[bytes, int] = {}
        self.before_execute = None
        self.lives: dict[bytes, int] = {}

    def touch(self, key: bytes) -> None:
        self.versions[key] = self.versions.get(key, 0) + 1

    def pipeline(self, transaction: bool) -> "FakePipeline":
        return FakePipeline(self, transaction)

    def get(self, key: bytes) -> bytes | None:
        return self.values.get(key)

    def set(self, key: bytes, value: bytes, px: int | None) -> None:
        self.values[key], self.lives[key] = value, px
        self.touch(key)

    def delete(self, *keys: bytes) -> None:
        for key in keys:
            self.values.pop(key, None)
            self.touch(key)

    def zadd(self, key: bytes, scores: dict[bytes, float]) -> None:
        self.values.setdefault(key, {}).update(scores)

    def zrem(self, key: bytes, name: bytes) -> None:
        self.values.get(key, {}).pop(name, None)

    def zcard(self, key: bytes) -> int:
        return len(self.values.get(key, {}))

    def zremrangebyscore(self, key: bytes, low: float | str, high: str) -> None:
        assert high.startswith("(")  # the end itself stays
        known = self.values.get(key, {})
        for name in [name for name, score in known.items() if float(low) <= score < float(high[1:])]:
            del known[name]

    def zpopmin(self, key: bytes, count: int) -> list[tuple[bytes, float]]:
        order = sorted(self.values[key].items(), key=lambda item: (item[1], item[0]))[:count]
        for name, _ in order:
            del self.values[key][name]
        return order

    def hgetall(self, key: bytes) -> dict[bytes, bytes]:
        return {name.encode(): b"%d" % number for name, number in self.values.get(key, {}).items()}

    def hincrby(self, key: bytes, name: str, number: int) -> None:
        counts = self.values.setdefault(key, {})
        counts[name] = counts.get(name, 0) + number

    def close(self) -> None:
        self.values = {}


class FakePipeline:
    """Reads at once until `multi`, queues afterwards, and fails where a watched key has changed."""

    def __init__(self, server: FakeRedis, transaction: bool) -> None:
        self.server, self.watched, self.queued, self.queueing = server, {}, [], not transaction
        self.transaction = transaction

    def __enter__(self) -> "FakePipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.watched, self.queued = {}, []

    def watch(self, key: bytes) -> None:
        assert not self.queueing
        self.watched[key] = self.server.versions.get(key, 0)

    def get(self, key: bytes) -> bytes | None:
        assert not self.queueing and key in self.watched
        return self.server.get(key)

    def multi(self) -> None:
        self.queueing = True

    def execute(self) -> list[object]:
        if self.transaction and self.server.before_execute is not None:
            self.server.before_execute()
        if any(self.server.versions.get(key, 0) != version for key, version in self.watched.items()):
            raise WatchError
        return [getattr(self.server, name)(*arguments, **options) for name, arguments, options in self.queued]

    def __getattr__(self, name: str):
        def queue(*arguments: object, **options: object) -> None:
            assert self.queueing
            self.queued.append((name, arguments, options))

        return queue
