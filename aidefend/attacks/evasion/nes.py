"""NES: projected ascent along a gradient that is estimated from pairs of opposite probes. Needs outputs alone."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.checks import check_int, check_number, refuse
from aidefend._core.errors import ThreatModelError
from aidefend._core.modules import Model
from aidefend._core.threat import Threat
from aidefend.attacks.evasion.access import Scored
from aidefend.attacks.evasion.checks import check_fields
from aidefend.attacks.evasion.goals import Goal, perturb, run
from aidefend.attacks.evasion.losses import IsSuccess, Loss
from aidefend.attacks.evasion.result import AttackResult
from aidefend.attacks.evasion.search import Search


@dataclasses.dataclass(frozen=True)
class NES:
    """Score-based ascent: each step follows the mean of differences between antithetic probes.

    Guarantee: the result, and every probe, lies inside the threat. Blind to masked gradients whose plateaus are
        narrower than `sigma`.
    Args:
        threat: The set of allowed points, norm linf or l2.
        steps: Steps, >= 1.
        pairs: Pairs of probes a step, >= 1.
        sigma: Standard deviation of a probe, in the units of x, > 0.
        step_size: As for `PGD`.
        restarts: Random starts, >= 1; the worst end point of each sample is kept.
        random_start: Start at a random point of the threat, else at x.
        loss: As for `PGD`; no gradient of it is taken.
        targeted: y holds the class to reach.
        is_success: As for `PGD`.
    Raises: ConfigurationError: a field is malformed. ThreatModelError: another norm.
    Cost: 2 * `pairs` * `steps` forward passes for each restart, and one for the last point where its score is needed;
        no backward pass.
    Source: Ilyas et al. 2018 ("Black-box adversarial attacks with limited queries"), section 2.1. Differs: probes are
        projected into the threat, so that each is a legitimate query, and the difference is taken along the step that
        was left.
    Example:
        >>> from aidefend import Threat
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> x, y = torch.tensor([[0.6, 0.5]]), torch.tensor([0])
        >>> NES(Threat("linf", 0.1), 10).run(model, x, y).success.item()
        True
    """

    threat: Threat
    steps: int = 50
    _: dataclasses.KW_ONLY
    pairs: int = 20
    sigma: float = 0.01
    step_size: float | None = None
    restarts: int = 1
    random_start: bool = False
    loss: Loss = "margin"
    targeted: bool = False
    is_success: IsSuccess | None = None

    def __post_init__(self) -> None:
        flags = {"random_start": self.random_start, "targeted": self.targeted}
        restarts = 1 if isinstance(self.restarts, int) and self.restarts > 1 else self.restarts  # probes are random
        check_fields(self.threat, self.steps, restarts, self.loss, self.is_success, **flags)
        check_int(self.pairs, "pairs")
        check_number(self.sigma, "sigma", 0.0, open_low=True)
        if self.step_size is not None:
            check_number(self.step_size, "step_size", 0.0, open_low=True)
        if self.threat.norm not in ("linf", "l2"):
            raise refuse("norm linf or l2", "threat", self.threat, "Use another attack for l1 and l0", ThreatModelError)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The last point for each sample, with restarts the worst; arguments as for `PGD`."""
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
        """Attack with a goal and count the passes; arguments as for `PGD.run`."""
        return run(self, model, x, y, goal=goal, generator=generator, logits=logits, row_seeds=row_seeds)

    def with_loss(self, loss: Loss) -> "NES":
        """The same attack on another loss."""
        return dataclasses.replace(self, loss=loss)

    def climb(self, search: Search) -> tuple[Tensor, Scored | None]:
        """One start, `steps` steps; the last iterate, not scored."""
        point = search.start(self.random_start)
        for done in range(1, self.steps + 1):
            slope = self._estimate(search, point)
            size = search.unit() * (2.5 / self.steps) if self.step_size is None else self.step_size
            point = search.threat.project(point + size * search.direction(slope, point), search.x)
            keep = search.compact(done)
            if keep is not None:
                point = point[keep]
            if search.active == 0:
                break
        return point, None

    def _estimate(self, search: Search, point: Tensor) -> Tensor:
        """Sum over pairs of (loss difference) * (step between the probes); scale does not matter."""
        slope = torch.zeros_like(point)
        flat = (len(point), *[1] * (point.ndim - 1))
        for _ in range(self.pairs):
            step = self.sigma * _normal(search, point)
            ahead = search.threat.project(point + step, search.x)
            back = search.threat.project(point - step, search.x)
            rise = search.score(ahead).climb - search.score(back).climb
            rise = rise.nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0).to(point)
            slope = slope + rise.reshape(flat) * ((ahead - back) / self.sigma)
        return slope


def _normal(search: Search, like: Tensor) -> Tensor:
    """N(0, 1) numbers of the active rows, in the shape of `like`."""
    shares = search.uniform(1, max(1, like[0].numel()))[:, 0, : like[0].numel()]
    numbers: Tensor = torch.special.ndtri(shares.double().clamp(1e-7, 1 - 1e-7))
    return numbers.to(like.dtype).reshape(like.shape)
