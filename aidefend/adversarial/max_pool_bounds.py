"""Bounds through max pooling."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aidefend.adversarial.bound_operations import Box


class Largest:
    """Max pooling over windows."""

    affine = False

    def __init__(self, module: nn.MaxPool2d) -> None:
        self.module = module

    def forward(self, boxes: Sequence[Box]) -> Box:
        """Each end on its own."""
        return boxes[0].raised(self.module)

    def back(self, form: Tensor, boxes: Sequence[Box]) -> tuple[list[Tensor], Tensor]:
        """Below: the member with the largest lower end. Above: that one where no other can pass it, else the top."""
        lower, upper = boxes[0].lower, boxes[0].upper
        pooled = nn.MaxPool2d(
            self.module.kernel_size, self.module.stride, self.module.padding, self.module.dilation,
            return_indices=True, ceil_mode=self.module.ceil_mode,
        )  # fmt: skip
        _, best = pooled(lower)
        sure = self._sure(upper, lower, best)
        top = self.module(upper)
        positive, negative = form.clamp(min=0), form.clamp(max=0)
        through = positive + torch.where(sure[:, None], negative, 0)
        constant = torch.where(sure[:, None], 0, negative * top[:, None]).flatten(2).sum(dim=2)
        inner = form.new_zeros(*form.shape[:2], lower.shape[1], lower[0, 0].numel())
        places = best.flatten(2)[:, None].expand(-1, form.shape[1], -1, -1)
        inner = inner.scatter_add(3, places, through.flatten(3))
        return [inner.reshape(*form.shape[:2], *lower.shape[1:])], constant

    def rounding(self, boxes: Sequence[Box], unit: float) -> Tensor | None:
        """None: it only chooses."""
        return None

    def _sure(self, upper: Tensor, lower: Tensor, best: Tensor) -> Tensor:
        """Windows in which no other member's upper end exceeds the best lower end."""
        floor = lower.flatten(2).gather(2, best.flatten(2)).reshape(best.shape)
        windows = nn.functional.unfold(
            nn.functional.pad(upper.flatten(0, 1)[:, None], self._padding(upper), value=-torch.inf),
            self.module.kernel_size, self.module.dilation, 0, self.module.stride,
        )  # fmt: skip
        count = (windows > floor.flatten(0, 1).flatten(1)[:, None]).sum(dim=1).reshape(best.shape)
        own = upper.flatten(2).gather(2, best.flatten(2)).reshape(best.shape) > floor
        return count <= own.to(count)

    def _padding(self, x: Tensor) -> tuple[int, int, int, int]:
        pad = self.module.padding
        down, right = (pad, pad) if isinstance(pad, int) else pad
        return right, right, down, down
