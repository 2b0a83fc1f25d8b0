"""Query state in Redis, which the workers of several machines share."""

from collections.abc import Callable
from typing import Any, TypeVar

from aidefend._core.checks import check_kind, refuse
from aidefend._core.errors import AidefendError, MissingExtra
from aidefend.validate.queries.crowds import Session
from aidefend.validate.queries.store import FLAG, TABLES, WEIGHTS, Buffered, Capacity, StoreHealth

T = TypeVar("T")
_TRIES = 50
_LATER = 1e11  # seconds: an order in which every weight comes after all times of the weight below


class RedisStore:
    """Query state that the workers of several hosts share.

    Guarantee: optimistic transactions (WATCH, MULTI, EXEC): a call whose values changed under it runs again, and raises
        after 50 tries (so that a guard fails closed). Values but flags end `ttl` after their last use. Not more than
        `capacity`, plus what calls at the same moment add; those without evidence go first; what goes early is counted
        in `health()`. Nobody but the workers should reach the server: who writes there can clear an account. It holds
        keyed sketches, no input and no name.
    Args:
        client: A `redis.Redis` (or what behaves like one) without `decode_responses`.
        capacity: See `Capacity`.
        prefix: Of all names in the server.
    Example:
        >>> RedisStore("redis://localhost")  # an address goes to RedisStore.connect
        Traceback (most recent call last):
        aidefend._core.errors.ConfigurationError: ...
    """

    def __init__(self, client: Any, capacity: Capacity | None = None, prefix: str = "aidefend:queries:") -> None:
        needed = ("pipeline", "get", "hgetall", "hincrby", "zcard", "zpopmin", "delete")
        if not all(callable(getattr(client, name, None)) for name in needed):
            raise refuse("client to be a redis.Redis", "client", client, "Pass one, or use RedisStore.connect(url)")
        self._client = client
        self._capacity = Capacity() if capacity is None else check_kind(capacity, Capacity, "capacity")
        self._prefix = check_kind(prefix, str, "prefix", "Pass a text").encode()

    @classmethod
    def connect(cls, url: str, capacity: Capacity | None = None, prefix: str = "aidefend:queries:") -> "RedisStore":
        """A store at an address such as "redis://localhost:6379/0".

        Raises: MissingExtra: the package redis is not installed.
        """
        check_kind(url, str, "url", 'Pass "redis://host:port/0"')
        try:
            import redis
        except ImportError as error:
            raise MissingExtra("redis", "redis") from error
        try:
            return cls(redis.Redis.from_url(url), capacity, prefix)
        except ValueError as error:
            raise refuse("the address of a Redis server", "url", url, f"{error}", AidefendError) from error

    def run(self, work: Callable[[Session], T], now: float, ttl: float) -> T:
        """See `QueryStore`."""
        for _ in range(_TRIES):
            with self._client.pipeline(transaction=True) as pipe:
                seen: set[bytes] = set()
                result, written = self._ask(pipe, work, seen)
                if self._commit(pipe, written, now, ttl):
                    self._evict(now - ttl)
                    return result
        raise refuse("a Redis server that takes a transaction", "tries", _TRIES, "Lower the load", AidefendError)

    def delete(self, table: str, name: bytes) -> None:
        """Forget a value."""
        with self._client.pipeline(transaction=True) as pipe:
            pipe.multi()
            pipe.delete(self._key(table, name))
            pipe.zrem(self._order(table), name)
            pipe.execute()

    def health(self) -> StoreHealth:
        """What is held and what was lost, over all workers."""
        counts = {key: int(value) for key, value in self._client.hgetall(self._prefix + b"counts").items()}
        principals, shared = (int(self._client.zcard(self._order(table))) for table in TABLES)
        return StoreHealth(principals, shared, counts.get(b"evicted", 0), counts.get(b"lost", 0))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _ask(self, pipe: Any, work: Callable[[Session], T], seen: set[bytes]) -> tuple[T, dict[Any, Any]]:
        """Run the work on values that are watched from the moment they are read."""

        def read(table: str, name: bytes) -> bytes | None:
            key = self._key(table, name)
            if key not in seen:
                pipe.watch(key)
                seen.add(key)
            value = pipe.get(key)
            return None if value is None else bytes(value)

        session = Buffered(read)
        return work(session), session.written

    def _commit(self, pipe: Any, written: dict[Any, Any], now: float, ttl: float) -> bool:
        """Write everything unless a watched value has changed."""
        pipe.multi()
        for (table, name), (value, weight) in written.items():
            life = None if weight == FLAG else max(1, int(1000 * ttl))
            pipe.set(self._key(table, name), value, px=life)
            pipe.zadd(self._order(table), {name: weight * _LATER + now})
        try:
            pipe.execute()
        except Exception as error:
            if type(error).__name__ == "WatchError":
                return False
            raise
        return True

    def _evict(self, since: float) -> None:
        for table, held in zip(TABLES, self._held(since), strict=True):
            over = held - self._capacity.of(table)
            if over <= 0:
                continue
            gone = self._client.zpopmin(self._order(table), over)
            self._client.delete(*(self._key(table, name) for name, _ in gone))
            levels = [min(WEIGHTS - 1, int(order // _LATER)) for _, order in gone]
            early = [level for level, (_, order) in zip(levels, gone, strict=True) if order - level * _LATER > since]
            if early:
                self._client.hincrby(self._prefix + b"counts", "evicted", len(early))
                self._client.hincrby(self._prefix + b"counts", "lost", sum(level > 0 for level in early))

    def _held(self, since: float) -> list[int]:
        """How many values each table holds, once those that have ended are off its order.

        The server drops a value by itself, but not its place: places of evidence that is long gone would leave none for
        newcomers, who come before them.
        """
        with self._client.pipeline(transaction=False) as pipe:
            for table in TABLES:
                for level in range(FLAG):
                    begin = level * _LATER if level else "-inf"
                    pipe.zremrangebyscore(self._order(table), begin, f"({level * _LATER + since!r}")
            for table in TABLES:
                pipe.zcard(self._order(table))
            return [int(count) for count in pipe.execute()[-len(TABLES) :]]

    def _key(self, table: str, name: bytes) -> bytes:
        return self._prefix + table.encode() + b":" + name

    def _order(self, table: str) -> bytes:
        return self._prefix + b"order:" + table.encode()
