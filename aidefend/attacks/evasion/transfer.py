"""Transfer: examples made on a surrogate, judged on the model. Needs no access to the model but its answers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aidefend._core.checks import check_callable, check_tensor, refuse
from aidefend._core.modules import Model
from aidefend._core.threat import Threat
from aidefend.attacks.evasion.access import Scored, quiet_access
from aidefend.attacks.evasion.checks import check_fields
from aidefend.attacks.evasion.goals import Goal, perturb, run
from aidefend.attacks.evasion.losses import IsSuccess, Loss
from aidefend.attacks.evasion.result import AttackResult
from aidefend.attacks.evasion.search import Search


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Crafts on a surrogate with any attack; the model under attack only judges.

    Guarantee: the result lies inside the threat; both models are left without a trace. Blind to masked gradients of
        the model. None about strength: it depends on how alike the models are.
    Args:
        surrogate: The model to craft on, used in the mode in which it is given.
        attack: A configuration of this room, or any callable (model, x, y) -> x_adv, which always runs at its own
            radius and is projected into the threat.
        threat: The set of allowed points; None = the attack's own.
        loss: What is reported for the model and compared between restarts; as for `PGD`.
        targeted: y holds the class to reach; give the attack the same flag.
        is_success: As for `PGD`, on the model.
        restarts: Times the attack is run, >= 1; the worst point of each sample on the model is kept.
    Raises: ConfigurationError: a field is malformed, or neither threat is known.
    Cost: The attack's cost on the surrogate, which is not counted; on the model one forward pass a restart, and the
        clean pass of the last two goals. `min_norm`: at most 11 times that.
    Source: Papernot et al. 2016, "Transferability in machine learning".
    Example:
        >>> from aidefend import Threat
        >>> from aidefend.attacks import PGD
        >>> model = torch.nn.Linear(2, 2)
        >>> Transfer(model, PGD(Threat("linf", 0.1)))(model, torch.rand(3, 2), torch.tensor([0, 1, 0])).shape
        torch.Size([3, 2])
    """

    surrogate: Model
    attack: Callable[..., Any]
    _: dataclasses.KW_ONLY
    threat: Threat = None  # type: ignore[assignment]  # filled in below, so that users and goals see a Threat
    loss: Loss = "margin"
    targeted: bool = False
    is_success: IsSuccess | None = None
    restarts: int = 1

    def __post_init__(self) -> None:
        check_callable(self.surrogate, "surrogate", "Pass a model")
        check_callable(self.attack, "attack", "Pass an attack, or a function (model, x, y) -> x_adv")
        if self.threat is None:
            object.__setattr__(self, "threat", getattr(self.attack, "threat", None))
        check_fields(self.threat, 1, self.restarts, self.loss, self.is_success, targeted=self.targeted)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """What the attack made on the surrogate; arguments as for `PGD`."""
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
    ) -> AttackResult:
        """Attack with a goal and count the passes of the model; arguments as for `PGD.run`.

        On the surrogate the worst loss is sought whatever the goal: a point that barely crosses the surrogate's
        boundary seldom crosses the model's.
        """
        return run(self, model, x, y, goal=goal, generator=generator, logits=logits, row_seeds=row_seeds)

    def with_loss(self, loss: Loss) -> "Transfer":
        """The same attack, judged by another loss."""
        return dataclasses.replace(self, loss=loss)

    def climb(self, search: Search) -> tuple[Tensor, Scored | None]:
        """One run on the surrogate; the point is not scored."""
        seeds = (search.uniform(1, 2)[:, 0].double() * 2**24).long()
        seeds = seeds[:, 0] * 2**24 + seeds[:, 1]
        with torch.enable_grad(), quiet_access(self.surrogate):
            point = self._craft(search, seeds)
        if not isinstance(point, Tensor) or point.shape != search.x.shape:
            cure = "Return the adversarial examples alone, one for each row"
            raise refuse(f"examples of shape {tuple(search.x.shape)}", "attack(surrogate, x, y)", point, cure)
        check_tensor(point, "attack(surrogate, x, y)")
        return search.threat.project(point.detach().to(search.x), search.x), None

    def _craft(self, search: Search, seeds: Tensor) -> Any:
        ours = dataclasses.is_dataclass(self.attack) and hasattr(self.attack, "run") and hasattr(self.attack, "threat")
        if not ours:
            return self.attack(self.surrogate, search.x.clone(), search.y)
        attack: Any = dataclasses.replace(self.attack, threat=search.threat)  # type: ignore[type-var]
        return attack.run(self.surrogate, search.x, search.y, goal="max_loss", row_seeds=seeds).x_adv
