"""A smooth displacement that a group of pictures has in common, and how to take it off again."""

import dataclasses

import torch
from torch import Tensor, nn

_CONTROLS = 5
_STEPS = 40
_RATE = 0.15
_LARGEST = 64
_SMALLEST = 8
_STIFFNESS = 1e-3
_INVERSIONS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Bend:
    """A field that moves the cells of pictures (N, C, H, W).

    Args:
        field: (2, H, W) where each cell is read from, right and down, less its own place, in units of half a side.
        left: Mean squared difference that remains between the bent sources and what they should look like.
        left_by_adding: The same if the mean difference is added to the sources instead.
    """

    field: Tensor
    left: float
    left_by_adding: float

    @staticmethod
    def possible(x: Tensor) -> bool:
        """Whether the inputs are pictures that are large enough."""
        return x.ndim == 4 and min(x.shape[-2:]) >= _SMALLEST

    @classmethod
    def between(cls, sources: Tensor, aims: Tensor, weights: Tensor) -> "Bend":
        """The field that makes the sources look like the aims, as far as five by five control points allow.

        The mean of bent pictures is the mean picture, bent: means of classes tell the field, no model has a say.

        Args:
            sources: (S, C, H, W) mean pictures of classes.
            aims: (S, C, H, W) mean pictures of the group's rows that look like those classes.
            weights: (S,) how much each pair counts.
        Cost: 40 steps of gradient descent on S pictures of at most 64 x 64.
        """
        small, aimed = _pooled(sources.float()), _pooled(aims.float())
        share = (weights / weights.sum()).reshape(-1, 1, 1, 1)
        sides = torch.tensor([2 / small.shape[-1], 2 / small.shape[-2]]).reshape(1, 2, 1, 1)
        unit = (share * small.square()).sum().clamp(min=1e-9) / small[0].numel()
        steps = torch.zeros(1, 2, _CONTROLS, _CONTROLS, requires_grad=True)
        optimizer = torch.optim.Adam([steps], lr=_RATE)
        with torch.enable_grad():
            for _ in range(_STEPS):
                gap = _moved(small, _field(steps * sides, small)) - aimed
                loss = (share * gap.square()).sum() / gap[0].numel() / unit + _STIFFNESS * steps.square().mean()
                (steps.grad,) = torch.autograd.grad(loss, steps)
                optimizer.step()
        field = _field(steps.detach() * sides, sources)
        gap = aims.float() - sources.float()
        added = gap - (share * gap).sum(dim=0)
        left = [
            float((share * rest.square()).sum() / gap[0].numel())
            for rest in (_moved(sources.float(), field) - aims.float(), added)
        ]
        return cls(field, *left)

    def put_on(self, x: Tensor) -> Tensor:
        """Rows (n, C, H, W), bent, in their dtype."""
        bent = _moved(x.float(), self.field)
        return bent.to(x.dtype) if x.is_floating_point() else bent.round().to(x.dtype)

    def taken_off(self, x: Tensor) -> Tensor:
        """Rows (n, C, H, W) float32, bent back: the inverse field by fixed-point steps."""
        back = -self.field
        for _ in range(_INVERSIONS):
            back = -_moved(self.field.unsqueeze(0), back)[0]
        return _moved(x.float(), back)


def _pooled(x: Tensor) -> Tensor:
    size = (min(_LARGEST, x.shape[-2]), min(_LARGEST, x.shape[-1]))
    return x if size == tuple(x.shape[-2:]) else nn.functional.adaptive_avg_pool2d(x, size)


def _field(steps: Tensor, like: Tensor) -> Tensor:
    return nn.functional.interpolate(steps, size=like.shape[-2:], mode="bicubic", align_corners=True)[0]


def _moved(x: Tensor, field: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    down, right = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    places = (torch.stack([right, down], dim=2) + field.permute(1, 2, 0)).clamp(-1, 1)
    return nn.functional.grid_sample(
        x, places.expand(len(x), -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=True
    )
