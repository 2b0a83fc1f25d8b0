"""The sum of clipped per-example gradients: the one quantity that noise is added to."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from aidefend.privacy.config import Clipping
from aidefend.privacy.gradient_parts import GradientPart
from aidefend.privacy.layer_gradients import gradient_parts
from aidefend.privacy.recorder import Calls, Recorder
from aidefend.privacy.step_book import Ticket

_STABILITY = 0.01
_ROUNDING = 1 - 1e-5  # a clipped gradient stays within the bound in spite of float32


@dataclasses.dataclass
class ClippedSum:
    """Sums by parameter name, and how many rows had no finite gradient."""

    sums: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    masked: int = 0

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add the part of one block."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value


def clipped_sum(recorder: Recorder, losses: Tensor, ticket: Ticket, bound: float, clipping: Clipping) -> ClippedSum:
    """The clipped gradients of all rows of a batch, summed.

    Guarantee: removing one row moves the result by at most `bound` in Euclidean norm, exchanging one by at most twice
        that, if losses[i] depends on row i alone. A row whose gradient is not finite counts as zero.
    """
    total = ClippedSum()
    for calls in recorder.example_calls(losses, ticket):
        clip_block(calls, recorder.layers, bound, clipping, total)
    return total


@torch.no_grad()
def clip_block(
    calls: Calls, layers: Mapping[str, nn.Module], bound: float, clipping: Clipping, total: ClippedSum
) -> None:
    """Add one block of rows to the total."""
    parts = parts_of(calls, layers)
    if not parts:
        return
    squared = norms_squared(parts)
    finite = torch.isfinite(squared)
    if not bool(finite.all()):
        total.masked += int((~finite).sum())
        if bool(finite.any()):
            rows = torch.nonzero(finite)[:, 0]
            healthy = {path: [call.rows(rows) for call in each] for path, each in calls.items()}
            clip_block(healthy, layers, bound, clipping, total)
        return
    total.add(weighted_sums(parts, _factors(squared.sqrt(), bound, clipping)))


def parts_of(calls: Calls, layers: Mapping[str, nn.Module]) -> dict[str, list[GradientPart]]:
    """The per-example gradients of each layer that took part."""
    return {path: gradient_parts(layers[path], each) for path, each in calls.items()}


def norms_squared(parts: Mapping[str, list[GradientPart]]) -> Tensor:
    """Squared length of each row's gradient over all layers, (n,)."""
    lengths = [part.norm_squared() for each in parts.values() for part in each]
    return torch.stack([length.to(lengths[0]) for length in lengths]).sum(dim=0)


def weighted_sums(parts: Mapping[str, list[GradientPart]], weights: Tensor) -> dict[str, Tensor]:
    """Sum over the rows of weights[i] * gradient[i], by full parameter name."""
    sums: dict[str, Tensor] = {}
    for path, each in parts.items():
        for part in each:
            for name, value in part.weighted_sum(weights).items():
                sums[f"{path}.{name}" if path else name] = value
    return sums


def _factors(norms: Tensor, bound: float, clipping: Clipping) -> Tensor:
    if clipping == "automatic":
        return bound * _ROUNDING / (norms + _STABILITY)
    return (bound * _ROUNDING / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
