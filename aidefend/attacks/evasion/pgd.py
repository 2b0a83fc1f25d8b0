"""Projected gradient descent: steps of fixed size along the input gradient, projected into the threat."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.checks import check_number
from aidefend._core.modules import Model
from aidefend._core.threat import Threat
from aidefend.attacks.evasion.access import Scored
from aidefend.attacks.evasion.checks import check_fields
from aidefend.attacks.evasion.goals import Goal, perturb, run
from aidefend.attacks.evasion.losses import IsSuccess, Loss
from aidefend.attacks.evasion.result import AttackResult
from aidefend.attacks.evasion.search import Search


@dataclasses.dataclass(frozen=True)
class PGD:
    """Projected gradient descent. `PGD(threat, steps=1, random_start=False)` is FGSM.

    Guarantee: x_adv is inside the threat and holds no NaN; the model, its gradients, buffers, modes and all random
        streams are as before, also after an exception. None about strength: it gives a lower bound of the worst loss.
    Args:
        threat: The set of allowed points, in any norm. Whole numbers and one-hot groups: small steps add up, and every
            point that the model sees, like the result, is an allowed one.
        steps: Gradient steps, >= 1.
        step_size: Length of a step in the units of the norm, > 0; None means 2.5 * eps / steps, by sample and feature.
            In l2 and l1 few small steps from a random start end before the optimum: use APGD. An l1 step goes equally
            into the steepest hundredth of the features. l0: the step of the steepest feature in ranges of the bounds,
            before the projection cuts it; None means 50.
        restarts: Random starts, >= 1; the worst end point of each sample is kept.
        random_start: Start at a random point of the threat (uniform in cube or ball), else at x.
        loss: What to climb: a name, or a function (outputs, y) -> (N,) of yours; then y may be anything with N rows.
        targeted: y holds the class to reach, and the loss is descended.
        is_success: (outputs, y) -> (N,) bool, where success is not about the top class of logits.
    Raises: ConfigurationError: a field is malformed.
    Cost: `attack(model, x, y)`: exactly `steps` forward and backward passes to the input (2F each, no weight
        gradients); with restarts r > 1, r * (steps + 1) forward and r * steps backward. `run(goal="max_loss")`: one
        forward more a restart. `first_success`: at most that and the clean pass. `min_norm`: at most 11 times that.
    Source: Madry et al. 2018; Goodfellow et al. 2015 (one step); Tramer, Boneh 2019 (l1); Croce, Hein 2019 (l0).
        Differs: the last iterate is scored where a score is needed, and a sample whose gradient is zero or not finite
        takes a random step.
    Example:
        >>> from aidefend import Threat
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> attack = PGD(Threat("linf", 0.1), steps=1, random_start=False)
        >>> attack(model, torch.tensor([[0.5, 0.5]]), torch.tensor([0])).tolist()
        [[0.4000000059604645, 0.6000000238418579]]
    """

    threat: Threat
    steps: int = 10
    step_size: float | None = None
    _: dataclasses.KW_ONLY
    restarts: int = 1
    random_start: bool = True
    loss: Loss = "cross_entropy"
    targeted: bool = False
    is_success: IsSuccess | None = None

    def __post_init__(self) -> None:
        flags = {"random_start": self.random_start, "targeted": self.targeted}
        check_fields(self.threat, self.steps, self.restarts, self.loss, self.is_success, **flags)
        if self.step_size is not None:
            check_number(self.step_size, "step_size", 0.0, open_low=True)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The worst point found for each sample (goal max_loss): x_adv (N, ...), detached, inside the threat.

        Args:
            model: Callable on x, used in the mode in which it is given.
            x: (N, ...), floating point, inside the bounds.
            y: Class indices (N,), or what the loss takes.
            generator: Source of the random starts; None = a fresh one.
        Raises: AidefendError: malformed arguments, or the model raised (its error is the cause).
        """
        return perturb(self, model, x, y, generator)

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        goal: Goal = "max_loss",
        generator: torch.Generator | None = None,
        logits: Tensor | None = None,
        row_seeds: Tensor | None = None,
        begin_at: Tensor | None = None,
    ) -> AttackResult:
        """Attack with a goal and count the passes.

        Args:
            model: As for the call, like x, y and generator.
            x: (N, ...).
            y: (N,).
            generator: Source of the random starts.
            goal: "max_loss": the worst end point. "first_success": stop at the first success of each row (x itself
                counts); broken rows leave the batch after 0, 1, 2, 4, 8, 16, 24, ... steps. "min_norm": the smallest
                radius at which the attack succeeds, found by 10 halvings of the radius, so within eps / 1024.
            logits: Clean outputs, if you have them; saves the clean pass of the last two goals.
            row_seeds: (N,) int64 in place of generator: the random numbers of a row then depend on its seed alone.
            begin_at: (N, ...) points in place of the first start, such as those of an attack by queries; projected
                into the threat. Not with "min_norm".
        Returns: AttackResult.
        """
        return run(
            self, model, x, y, goal=goal, generator=generator, logits=logits, row_seeds=row_seeds, begin_at=begin_at
        )

    def with_loss(self, loss: Loss) -> "PGD":
        """The same attack on another loss."""
        return dataclasses.replace(self, loss=loss)

    def climb(self, search: Search) -> tuple[Tensor, Scored | None]:
        """One start, `steps` steps; the last iterate, not scored."""
        point = search.start(self.random_start)
        for done in range(1, self.steps + 1):
            _, grad = search.gradient(point)
            point = search.advance(point + self._size(search) * search.direction(grad, point))
            keep = search.compact(done)
            if keep is not None:
                point = point[keep]
            if search.active == 0:
                break
        return point, None

    def _size(self, search: Search) -> float | Tensor:
        if self.step_size is not None:
            return self.step_size
        return search.unit() * (1.0 if self.threat.norm == "l0" else 2.5 / self.steps)
