"""Times several ways to do one thing, interleaved in one run."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """Seconds per round of each candidate, in rounds that all candidates shared; `reference` is the one to beat."""

    seconds: Mapping[str, tuple[float, ...]]
    reference: str
    seed: int

    def ratios(self, name: str) -> list[float]:
        """Time of `name` over time of the reference, round by round: what slows a whole round cancels out."""
        return [own / other for own, other in zip(self.seconds[name], self.seconds[self.reference], strict=True)]

    def rows(self) -> list[dict[str, Any]]:
        """Per candidate: median seconds, the median of the ratios and their interquartile range."""
        return [self._row(name) for name in self.seconds]

    def table(self) -> str:
        """The rows for a terminal; a ratio below 1 is faster than the reference."""
        width = max(len(name) for name in self.seconds)
        lines = [f"{'':{width}}  median ms  ratio to {self.reference} [quartiles]"]
        for row in self.rows():
            low, high = row["ratio_quartiles"]
            lines.append(
                f"{row['name']:{width}}  {1e3 * row['median_seconds']:9.3f}  {row['ratio']:.3f} [{low:.3f}, {high:.3f}]"
            )
        return "\n".join(lines)

    def _row(self, name: str) -> dict[str, Any]:
        ratios, seconds = self.ratios(name), list(self.seconds[name])
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        medians = {"median_seconds": statistics.median(seconds), "ratio": statistics.median(ratios)}
        return {"name": name, **medians, "ratio_quartiles": [low, high], "seconds": seconds}


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    reference: str,
    rounds: int = 20,
    warmup: int = 2,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Run every candidate once per round, in an order shuffled anew each round, so that drift favours nobody.

    Args:
        candidates: What to time, by name; called without arguments, and finished when it returns (on an accelerator it
            must synchronise by itself).
        reference: The name that the others are compared with.
        rounds: Timed rounds, >= 2.
        warmup: Rounds before these, untimed.
        seed: Of the order alone.
        clock: Seconds, monotonic.
    """
    if reference not in candidates or rounds < 2:
        raise ValueError(
            f"Expected reference to be one of {list(candidates)} and rounds >= 2, got {reference=}, {rounds=}."
        )
    order, stream = list(candidates), random.Random(seed)  # noqa: S311 - an order, not a secret
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(-warmup, rounds):
        stream.shuffle(order)
        for name in order:
            start = clock()
            candidates[name]()
            if round_number >= 0:
                seconds[name].append(clock() - start)
    return Comparison({name: tuple(values) for name, values in seconds.items()}, reference, seed)
