"""Sigma-zero: gradient steps on a smooth count of the changed features, small ones set to zero on the way."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.checks import check_number, refuse
from aidefend._core.errors import ThreatModelError
from aidefend._core.modules import Model
from aidefend._core.threat import Threat
from aidefend.attacks.evasion.access import Scored
from aidefend.attacks.evasion.checks import check_fields
from aidefend.attacks.evasion.goals import Goal
from aidefend.attacks.evasion.losses import IsSuccess, Loss
from aidefend.attacks.evasion.minimum_norm import ORDERS, as_rows, cosine
from aidefend.attacks.evasion.result import AttackResult
from aidefend.attacks.evasion.roaming import Roaming, inside_bounds, run_roaming
from aidefend.attacks.evasion.search import Search

_DECAY, _SQUARE_DECAY = 0.9, 0.999


@dataclasses.dataclass(frozen=True)
class SigmaZero:
    """Fewest changed features: the margin and a smooth l0 norm descended together.

    Guarantee: the result lies inside the threat. None about strength.
    Args:
        threat: The set of allowed points, norm l0; eps counts features. For goal "min_norm" give an eps as large as
            you care for.
        steps: Steps, >= 1.
        step_size: Length of the first steps as a share of the range of the bounds, > 0; it falls to a tenth.
        sigma: Smoothness of the count, > 0; smaller = nearer to the true one.
        threshold: Changes below this share of the range are set to zero at first, in [0, 1); it grows while the sample
            is fooled and shrinks while it is not.
        threshold_rate: By this share of the step size, > 0.
        loss: As for `PGD`; it is climbed until the sample is fooled.
        targeted: y holds the class to reach.
        is_success: As for `PGD`.
    Raises: ConfigurationError: a field is malformed. ThreatModelError: another norm, or infinite bounds.
    Cost: `steps` forward and backward passes to the input, the clean pass where it is not given, and one forward pass
        more for rows whose successes are all beyond eps.
    Source: Cina et al. 2024, Algorithm 1. Differs: the normalised gradient goes through Adam, and bounds other than
        [0, 1] are scaled.
    Example:
        >>> from aidefend import Threat
        >>> model = torch.nn.Linear(4, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 2, 1, 3], [0, 0, 0, 0]]))
        >>> x, y = torch.full((1, 4), 0.2), torch.tensor([0])
        >>> _ = model.weight.data[1, 3].fill_(6.9)
        >>> SigmaZero(Threat("l0", 4), 60).run(model, x, y).success.item()
        True
    """

    threat: Threat
    steps: int = 200
    _: dataclasses.KW_ONLY
    step_size: float = 1.0
    sigma: float = 1e-3
    threshold: float = 0.3
    threshold_rate: float = 0.01
    loss: Loss = "margin"
    targeted: bool = False
    is_success: IsSuccess | None = None

    def __post_init__(self) -> None:
        check_fields(self.threat, self.steps, 1, self.loss, self.is_success, targeted=self.targeted)
        check_number(self.step_size, "step_size", 0.0, open_low=True)
        check_number(self.sigma, "sigma", 0.0, open_low=True)
        check_number(self.threshold, "threshold", 0.0, 1.0, open_high=True)
        check_number(self.threshold_rate, "threshold_rate", 0.0, open_low=True)
        if ORDERS[self.threat.norm] != 0:
            raise refuse("norm l0", "threat", self.threat, "Use FMN for the other norms", ThreatModelError)
        if not self.threat.bounded:
            raise refuse("finite bounds", "threat", self.threat, "State the range of x", ThreatModelError)

    @property
    def restarts(self) -> int:
        """One: the path starts at x."""
        return 1

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The allowed point of the largest loss on the way, for each sample; arguments as for `PGD`."""
        return self.run(model, x, y, goal="max_loss", generator=generator).x_adv

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        goal: Goal = "min_norm",
        generator: torch.Generator | None = None,
        logits: Tensor | None = None,
        row_seeds: Tensor | None = None,
    ) -> AttackResult:
        """Attack with a goal and count the passes; arguments as for `PGD.run`.

        "min_norm": the smallest success; where that is beyond eps, the point of the largest loss inside the threat.
        "first_success": the same, but rows leave at the checkpoints once a success inside the threat is known.
        "max_loss": the point of the largest loss inside the threat on the way.
        """
        return run_roaming(self, model, x, y, goal=goal, generator=generator, logits=logits, row_seeds=row_seeds)

    def with_loss(self, loss: Loss) -> "SigmaZero":
        """The same attack on another loss."""
        return dataclasses.replace(self, loss=loss)

    def climb(self, search: Search) -> tuple[Tensor, Scored | None]:
        """Not how this attack goes: see `roam`."""
        return search.x, None

    def roam(self, rows: Roaming) -> None:
        """All steps from x, in units of the range."""
        point, first, second = rows.x, torch.zeros_like(rows.x), torch.zeros_like(rows.x)
        threshold = torch.full((rows.active,), self.threshold, dtype=point.dtype, device=point.device)
        for done in range(1, self.steps + 1):
            low, high = rows.threat.limits(rows.x)
            scored, grad = rows.gradient(point)
            share = (point - rows.x) / (high - low)
            slope = self._slope(rows, scored, grad * (high - low), share)
            first = _DECAY * first + (1 - _DECAY) * slope
            second = _SQUARE_DECAY * second + (1 - _SQUARE_DECAY) * slope.square()
            scale = (second / (1 - _SQUARE_DECAY**done)).sqrt() + 1e-8
            size = cosine(done - 1, self.steps, self.step_size, self.step_size / 10)
            ahead = rows.x + (share - size * first / (1 - _DECAY**done) / scale) * (high - low)
            ahead = inside_bounds(ahead, rows.x, rows.threat)
            turn = self.threshold_rate * size
            threshold = (threshold + torch.where(scored.hit, turn, -turn).to(threshold)).clamp(0, 1)
            small = (ahead - rows.x).abs() < as_rows(threshold, ahead) * (high - low)
            point = torch.where(small, rows.x, ahead)
            keep = rows.compact(done)
            if keep is not None:
                point, first, second, threshold = point[keep], first[keep], second[keep], threshold[keep]
            if rows.active == 0:
                return

    def _slope(self, rows: Roaming, scored: Scored, grad: Tensor, share: Tensor) -> Tensor:
        """Gradient of smooth count per feature less the loss of samples that are not fooled, largest element one."""
        features = max(1, share[0].numel())
        count = 2 * self.sigma * share / (share.square() + self.sigma) ** 2 / features
        climb = torch.where(as_rows(scored.hit, grad), 0, grad)
        slope = torch.where(rows.threat.changeable(rows.x), count - climb, 0)
        peak = slope.abs().flatten(1).amax(dim=1).clamp(min=torch.finfo(slope.dtype).tiny)
        return slope / as_rows(peak, slope)
