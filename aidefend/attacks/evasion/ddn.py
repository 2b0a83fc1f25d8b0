"""Decoupled direction and norm: the direction follows the gradient, the length only whether the sample is fooled."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.checks import check_number, refuse
from aidefend._core.errors import ThreatModelError
from aidefend._core.modules import Model
from aidefend._core.threat import Threat
from aidefend.attacks.evasion.access import Scored
from aidefend.attacks.evasion.checks import check_fields
from aidefend.attacks.evasion.goals import Goal, perturb
from aidefend.attacks.evasion.losses import IsSuccess, Loss
from aidefend.attacks.evasion.minimum_norm import Smallest, as_rows, climb_shrinking, cosine, length, run_shrinking
from aidefend.attacks.evasion.result import AttackResult
from aidefend.attacks.evasion.search import Search


@dataclasses.dataclass(frozen=True)
class DDN:
    """Decoupled direction and norm attack: the smallest l2 perturbation in `steps` passes.

    Guarantee: as for `FMN`.
    Args:
        threat: The set of allowed points, norm l2; for goal "min_norm" give an eps as large as you care for.
        steps: Steps, >= 1.
        first_norm: Length of the perturbation at the start, > 0, in the units of x.
        rate: Share by which the length shrinks after a success and grows after a failure, in (0, 1).
        loss: As for `PGD`.
        targeted: y holds the class to reach.
        is_success: As for `PGD`.
    Raises: ConfigurationError: a field is malformed. ThreatModelError: another norm.
    Cost: As for `FMN`.
    Source: Rony et al. 2019. Differs: no rounding to 256 levels; the threat caps the length.
    Example:
        >>> from aidefend import Threat
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> x, y = torch.tensor([[0.7, 0.5]]), torch.tensor([0])
        >>> result = DDN(Threat("l2", 1.0), 200).run(model, x, y)
        >>> abs(Threat("l2", 1.0).distance(result.x_adv, x).item() - 0.2 / 2**0.5) < 0.01
        True
    """

    threat: Threat
    steps: int = 100
    _: dataclasses.KW_ONLY
    first_norm: float = 1.0
    rate: float = 0.05
    loss: Loss = "cross_entropy"
    targeted: bool = False
    is_success: IsSuccess | None = None

    def __post_init__(self) -> None:
        check_fields(self.threat, self.steps, 1, self.loss, self.is_success, targeted=self.targeted)
        check_number(self.first_norm, "first_norm", 0.0, open_low=True)
        check_number(self.rate, "rate", 0.0, 1.0, open_low=True)
        if self.threat.norm != "l2":
            raise refuse("norm l2", "threat", self.threat, "Use FMN for the other norms", ThreatModelError)

    @property
    def restarts(self) -> int:
        """One: the path starts at x."""
        return 1

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The point of the largest loss on the way, for each sample; arguments as for `PGD`."""
        return perturb(self, model, x, y, generator)

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
        """Attack with a goal and count the passes; arguments as for `PGD.run`."""
        return run_shrinking(self, model, x, y, goal=goal, generator=generator, logits=logits, row_seeds=row_seeds)

    def with_loss(self, loss: Loss) -> "DDN":
        """The same attack on another loss."""
        return dataclasses.replace(self, loss=loss)

    def climb(self, search: Search) -> tuple[Tensor, Scored | None]:
        """The point of the largest loss on the way."""
        return climb_shrinking(self, search)

    def shrink(self, search: Search, found: Smallest) -> None:
        """All steps from x."""
        point = search.start(random=False)
        size = torch.full((len(point),), self.first_norm, dtype=point.dtype, device=point.device)
        for done in range(self.steps):
            scored, grad = search.gradient(point)
            found.offer(search.snap(point), scored, search.threat.distance(search.snap(point), search.x))
            if done + 1 == self.steps:
                return
            step = point - search.x + cosine(done, self.steps, 1.0, 0.01) * search.steepest(grad, "l2")
            factor = torch.where(scored.hit, 1 - self.rate, 1 + self.rate).to(size)
            limit = search.threat.radius(search.x).reshape(-1).to(size)
            size = torch.minimum(size * factor, limit)
            whole = length(search.threat.priced(step), 2.0).clamp(min=torch.finfo(step.dtype).tiny)
            point = search.advance(search.x + step * as_rows(size / whole, step))
            keep = search.compact(done + 1)
            if keep is not None:
                point, size = point[keep], size[keep]
                found.take(keep)
            if search.active == 0:
                return
