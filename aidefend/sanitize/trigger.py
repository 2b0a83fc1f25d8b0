"""What a group of rows has in common, as something to put on other rows: added everywhere, or written in a spot."""

import dataclasses

import torch
from torch import Tensor

FORMS = 3
_SPOT = 0.05
_FEW = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Trigger:
    """The common part of a group, told from its content by rows that look alike and have other labels.

    Args:
        pattern: Shape of one sample: mean of the group less mean of the rows that look like it.
        values: Shape of one sample: mean or median of the group.
        spot: Bool, shape of one sample: where the pattern, in units of its spread over the group, is at least half as
            strong as at its strongest, at most 5 % of the cells (in short rows a fifth, up to 4 cells). A pattern that
            was written over the content shows in full only where it is put down like that.
    """

    pattern: Tensor
    values: Tensor
    spot: Tensor

    @classmethod
    def between(cls, group: Tensor, alike: Tensor, exact: bool = False) -> "Trigger":
        """From the rows (m, ...) of a group and the mean of the rows that look like it.

        Args:
            group: Rows with the trigger.
            alike: Shape of one sample.
            exact: Write the group's median and not its mean: what was written comes back to the last digit.
        """
        mean = group.mean(dim=0)
        pattern, spread = mean - alike, group.std(dim=0, correction=0)
        strength = (pattern.abs() / (spread + 0.1 * spread.max()).clamp(min=1e-12)).flatten()
        count = max(1, min(_FEW, len(strength) // 5), int(_SPOT * len(strength)))
        least = torch.maximum(strength.topk(count).values[-1], strength.max() / 2)
        spot = (strength >= least).reshape(pattern.shape) & (pattern != 0)
        return cls(pattern, group.median(dim=0).values if exact else mean, spot)

    def added(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Rows (n, ...) with the pattern added, inside the range of the data and in its dtype."""
        return _like(torch.clamp(x.float() + self.pattern, low.float(), high.float()), x)

    def forms(self, x: Tensor, low: Tensor, high: Tensor) -> list[Tensor]:
        """The rows with the pattern added, added twice, and written: adaptive poison is fainter in training."""
        twice = dataclasses.replace(self, pattern=2 * self.pattern)
        return [self.added(x, low, high), twice.added(x, low, high), self.written(x)]

    def written(self, x: Tensor) -> Tensor:
        """Rows (n, ...) with the group's mean written into the spot, in their dtype."""
        return _like(torch.where(self.spot, self.values, x.float()), x)

    def likeness(self, other: "Trigger") -> float:
        """In [-1, 1]: cosine between two patterns, or if that is more, how far they write the same cells alike.

        A pattern is what was written less what was there before, which differs from class to class under one stamp.
        """
        cosine = float(torch.nn.functional.cosine_similarity(self.pattern.flatten(), other.pattern.flatten(), dim=0))
        return max(cosine, self._written_alike(other))

    def _written_alike(self, other: "Trigger") -> float:
        """Share of the smaller spot, of four cells or more, that the other holds alike, to a twentieth of the range."""
        scale = max(float(one.values.max() - one.values.min()) for one in (self, other))
        alike = self.spot & other.spot & ((self.values - other.values).abs() <= 0.05 * scale)
        smaller = min(int(self.spot.sum()), int(other.spot.sum()))
        return int(alike.sum()) / smaller if smaller >= _FEW else 0.0

    def hit(self, x: Tensor) -> Tensor:
        """(n,) float64, how exactly rows hold the written values, on a log scale, in standard deviations."""
        gap = (x.float() - self.values).flatten(1)[:, self.spot.flatten()].double()
        miss = gap.square().sum(dim=1).sqrt()
        exactness = -(miss + 0.02 * miss.mean() + 1e-12).log()
        spread = exactness.std(correction=0)
        return (exactness - exactness.mean()) / spread if spread > 0 else torch.zeros_like(exactness)


def _like(moved: Tensor, x: Tensor) -> Tensor:
    return moved.to(x.dtype) if x.is_floating_point() else moved.round().to(x.dtype)
