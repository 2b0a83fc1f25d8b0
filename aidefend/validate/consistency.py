"""How steady the answer is under small transformations of the input."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from aidefend._core.checks import check_int, check_number, refuse
from aidefend._core.modules import Model
from aidefend._core.random import make_generator
from aidefend.validate.asking_again import answer_changes
from aidefend.validate.detector import check_fit, check_wide_logits


@dataclasses.dataclass(frozen=True)
class Consistency:
    """The mean L1 change of the softmax under shifts and noise: high where the answer is a matter of luck.

    The noise patterns are the same for all rows and calls, so that a row's score does not depend on its batch.
    Guarantee: none under attack.
    Args:
        shift: Images (N, C, H, W) and sequences (N, C, L) move by this many places in each direction, edges repeated;
            0 = not at all. Inputs of other shapes never move.
        noise: Standard deviation of the noise in the units of x, >= 0; 0 = none.
        draws: Patterns of noise, >= 1.
        seed: Of the noise.
    Cost: One forward pass for each shift (4 for images) and each pattern.
    Source: Hu, Yu, Guo, Chao, Weinberger 2019, criterion 1 (noise); Tian, Yang, Cai 2018 (transformations).
    Example:
        >>> model = torch.nn.Linear(2, 2).eval()
        >>> _ = model.load_state_dict({"weight": 50 * torch.eye(2), "bias": torch.zeros(2)})
        >>> x = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
        >>> score = Consistency(noise=0.1).score(x, model(x), x=x, model=model)
        >>> bool(score[0] < 1e-6 < score[1])
        True
    """

    shift: int = 1
    noise: float = 0.02
    draws: int = 4
    seed: int = 0
    name: ClassVar[str] = "consistency"
    uses_features: ClassVar[bool] = False
    uses_logits: ClassVar[bool] = True
    uses_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_int(self.shift, "shift", 0)
        object.__setattr__(self, "noise", check_number(self.noise, "noise", 0.0))
        check_int(self.draws, "draws")
        check_int(self.seed, "seed", 0)
        if self.shift == 0 and self.noise == 0:
            raise refuse("shift or noise", "noise", self.noise, "With neither there is nothing to compare")

    def fit(self, features: Tensor, logits: Tensor | None = None, labels: Tensor | None = None) -> "Consistency":
        """Checks the rows; there is nothing to learn."""
        check_fit(features, check_wide_logits(features, logits), labels)
        return self

    def score(
        self, features: Tensor, logits: Tensor | None = None, *, x: Tensor | None = None, model: Model | None = None
    ) -> Tensor:
        """Mean over transformations |softmax f(x) - softmax f(t(x))|_1: (N,) in [0, 2], higher = stranger."""
        return answer_changes(features, logits, x, model, self._changed).mean(dim=0)

    def _changed(self, x: Tensor) -> list[Tensor]:
        if not x.is_floating_point():
            raise refuse("inputs that are floating point", "x", x, "Convert them, or take other detectors")
        moved = self._moved(x) if self.shift and x.ndim in (3, 4) else []
        if self.noise:
            stream = make_generator(seed=self.seed)
            shape = (self.draws, *x.shape[1:])
            patterns = self.noise * torch.randn(shape, generator=stream)
            moved += [x + pattern for pattern in patterns.to(x)]
        if not moved:
            raise refuse("noise > 0 for inputs that cannot be shifted", "noise", self.noise, "Pass noise=")
        return moved

    def _moved(self, x: Tensor) -> list[Tensor]:
        if min(x.shape[2:]) <= self.shift:
            raise refuse(f"inputs wider than shift={self.shift}", "x", x, "Take a smaller shift, or 0")
        step, spatial = self.shift, x.ndim - 2
        wide = pad(x, [step, step] * spatial, mode="replicate")
        found = []
        for axis in range(2, x.ndim):
            centred = wide
            for other in range(2, x.ndim):
                if other != axis:
                    centred = centred.narrow(other, step, x.shape[other])
            found += [centred.narrow(axis, start, x.shape[axis]) for start in (0, 2 * step)]
        return found

    def settings(self) -> Mapping[str, Any]:
        """Its configuration as JSON types."""
        return dataclasses.asdict(self)

    def arrays(self) -> Mapping[str, Tensor]:
        """Nothing: there is nothing to learn."""
        return {}
