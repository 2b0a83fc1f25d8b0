"""Carlini and Wagner's attack: length plus a constant times the margin, the constant found by bisection."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.checks import check_int, check_number, refuse
from aidefend._core.errors import ThreatModelError
from aidefend._core.modules import Model
from aidefend._core.threat import Threat
from aidefend.attacks.evasion.access import Scored
from aidefend.attacks.evasion.checks import check_fields
from aidefend.attacks.evasion.goals import Goal
from aidefend.attacks.evasion.losses import IsSuccess, Loss
from aidefend.attacks.evasion.minimum_norm import as_rows
from aidefend.attacks.evasion.result import AttackResult
from aidefend.attacks.evasion.roaming import Roaming, inside_bounds, run_roaming
from aidefend.attacks.evasion.search import Search

_DECAY, _SQUARE_DECAY = 0.9, 0.999


@dataclasses.dataclass(frozen=True)
class CarliniWagner:
    """Smallest l2 perturbation by Adam on length and margin together; rows in one batch, each with its own constant.

    Guarantee: the result lies inside the threat. None about strength.
    Args:
        threat: The set of allowed points, norm l2; for goal "min_norm" give an eps as large as you care for.
        steps: Steps for each constant, >= 1.
        searches: Constants that are tried, >= 1: times ten until the first success, then bisection.
        first_constant: The first one, > 0.
        step_size: Of Adam, > 0, in the units of x.
        loss: As for `PGD`; it is climbed until the sample is fooled.
        targeted: y holds the class to reach.
        is_success: As for `PGD`.
    Raises: ConfigurationError: a field is malformed. ThreatModelError: another norm.
    Cost: `searches` * `steps` forward and backward passes to the input, the clean pass where it is not given, and one
        forward pass more for rows whose successes are all beyond eps.
    Source: Carlini, Wagner 2017, section VI. Differs: clipping to the bounds in place of the tanh, which has no
        gradient for samples on the bounds; no confidence margin.
    Example:
        >>> from aidefend import Threat
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> x, y = torch.tensor([[0.7, 0.5]]), torch.tensor([0])
        >>> result = CarliniWagner(Threat("l2", 1.0), 60).run(model, x, y)
        >>> abs(Threat("l2", 1.0).distance(result.x_adv, x).item() - 0.2 / 2**0.5) < 0.01
        True
    """

    threat: Threat
    steps: int = 200
    _: dataclasses.KW_ONLY
    searches: int = 8
    first_constant: float = 0.1
    step_size: float = 0.01
    loss: Loss = "margin"
    targeted: bool = False
    is_success: IsSuccess | None = None

    def __post_init__(self) -> None:
        check_fields(self.threat, self.steps, 1, self.loss, self.is_success, targeted=self.targeted)
        check_int(self.searches, "searches")
        check_number(self.first_constant, "first_constant", 0.0, open_low=True)
        check_number(self.step_size, "step_size", 0.0, open_low=True)
        if self.threat.norm != "l2":
            raise refuse("norm l2", "threat", self.threat, "Use FMN for the other norms", ThreatModelError)

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

    def with_loss(self, loss: Loss) -> "CarliniWagner":
        """The same attack on another loss."""
        return dataclasses.replace(self, loss=loss)

    def climb(self, search: Search) -> tuple[Tensor, Scored | None]:
        """Not how this attack goes: see `roam`."""
        return search.x, None

    def roam(self, rows: Roaming) -> None:
        """A bisection for each row over its constant; every probe is a descent from x."""
        n, like = rows.active, rows.x.new_zeros(rows.active)
        constant, low, high = like + self.first_constant, like, like + torch.inf
        done = 0
        for _ in range(self.searches):
            first, second = torch.zeros_like(rows.x), torch.zeros_like(rows.x)
            point, ever = rows.x, torch.zeros(n, dtype=torch.bool, device=rows.x.device)
            for step in range(1, self.steps + 1):
                scored, grad = rows.gradient(point)
                ever = ever | scored.hit
                weight = as_rows(torch.where(scored.hit, 0.0, constant).to(constant), grad)
                slope = 2 * rows.threat.priced(rows.threat.priced(point - rows.x)) - weight * grad
                first = _DECAY * first + (1 - _DECAY) * slope
                second = _SQUARE_DECAY * second + (1 - _SQUARE_DECAY) * slope.square()
                scale = (second / (1 - _SQUARE_DECAY**step)).sqrt() + torch.finfo(second.dtype).eps
                ahead = point - self.step_size * first / (1 - _DECAY**step) / scale
                point = inside_bounds(ahead, rows.x, rows.threat)
                done += 1
                keep = rows.compact(done)
                if keep is not None:
                    point, first, second, ever = point[keep], first[keep], second[keep], ever[keep]
                    constant, low, high = constant[keep], low[keep], high[keep]
                if rows.active == 0:
                    return
            n = rows.active
            low, high = torch.where(ever, low, constant), torch.where(ever, constant, high)
            constant = torch.where(high.isfinite(), (low + high) / 2, constant * 10)
