"""Small boxes around adversarial points: most of the robustness of interval training at less cost in accuracy."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.checks import check_labels, check_number, refuse
from aidefend._core.modules import Model
from aidefend._core.threat import Threat
from aidefend.adversarial.bound_operations import Box
from aidefend.adversarial.crafting import (
    Attack,
    AttackMode,
    PerExampleLoss,
    check_batch,
    check_fields,
    craft_for,
    cross_entropy,
)
from aidefend.adversarial.linear_bounds import Region
from aidefend.adversarial.worst_logits import bound_losses


@dataclasses.dataclass(frozen=True)
class SABR:
    """As `IBPTraining`, on a box of `share` times eps around the worst point that the attack finds.

    Guarantee: none by itself: certify the net with `certify_bounds` (small shares need method "crown").
    Args:
        attack: An attack with a linf threat, such as PGD; it climbs the criterion.
        share: Radius of the box as a share of eps, in (0, 1]; 1 is `IBPTraining`.
        kappa: Weight of the clean loss, in [0, 1].
        criterion: (outputs, y) -> (N,), y class labels.
        attack_mode: As for `PGDTraining`.
    Raises: ConfigurationError: an argument is malformed, or the attack has no linf threat. Else as for `IBPTraining`.
    Cost: The attack and an `IBPTraining` step.
    Source: Mueller et al. 2023, section 3. Differs: the box is cut at the bounds of the data and of the threat.
    Example:
        >>> from aidefend.attacks import PGD
        >>> model, objective = torch.nn.Linear(4, 3), SABR(PGD(Threat("linf", 0.1), 2), share=0.4)
        >>> objective.per_example(model, torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5])
    """

    attack: Attack
    share: float = 0.4
    kappa: float = 0.0
    criterion: PerExampleLoss = cross_entropy
    _: dataclasses.KW_ONLY
    attack_mode: AttackMode = "eval"

    def __post_init__(self) -> None:
        check_fields(self.attack, self.criterion, self.attack_mode)
        check_number(self.share, "share", 0.0, 1.0, open_low=True)
        check_number(self.kappa, "kappa", 0.0, 1.0)
        threat = getattr(self.attack, "threat", None)
        if not isinstance(threat, Threat) or threat.norm != "linf":
            raise refuse("an attack with a linf threat", "attack", self.attack, 'Use PGD(Threat("linf", eps))')

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean of `per_example`: a scalar to call backward on."""
        return self.per_example(model, x, y, generator=generator).mean()

    def per_example(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each sample, (N,); arguments as for `PGDTraining`, y class labels."""
        check_batch(x, y)
        check_labels(y, len(x))
        x_adv = craft_for(self.criterion, self.attack, model, x, y, self.attack_mode, generator)
        return bound_losses(model, x, y, self.region(x.detach(), x_adv), self.criterion, self.kappa, 0.0)

    def region(self, x: Tensor, x_adv: Tensor) -> Region:
        """The small box: its centre is x_adv, moved so far inwards that the box lies inside the threat."""
        threat: Threat = self.attack.threat  # type: ignore[attr-defined]  # checked at construction
        whole = Region.around(x, threat, clean=True)
        radius = whole.box.radius * self.share
        centre = torch.minimum(torch.maximum(x_adv, whole.box.lower + radius), whole.box.upper - radius)
        return dataclasses.replace(whole, box=Box(centre - radius, centre + radius, x))
