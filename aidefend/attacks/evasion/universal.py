"""Universal perturbation: one step that is added to every sample."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_int, check_number, refuse
from aidefend._core.errors import ThreatModelError
from aidefend._core.modules import Model
from aidefend._core.random import derive_seed, make_generator
from aidefend._core.threat import Threat
from aidefend.attacks.evasion.access import Access, Scored, quiet_access
from aidefend.attacks.evasion.checks import check_fields
from aidefend.attacks.evasion.goals import GOALS, HALVINGS, Goal, check_rows, open_search
from aidefend.attacks.evasion.losses import IsSuccess, Loss
from aidefend.attacks.evasion.minimum_norm import as_rows
from aidefend.attacks.evasion.result import AttackResult
from aidefend.attacks.evasion.search import Search
from aidefend.attacks.evasion.streams import BatchStream, make_stream


@dataclasses.dataclass(frozen=True)
class UniversalPerturbation:
    """One perturbation for all rows, by projected ascent over minibatches.

    Guarantee: x plus the perturbation, projected, lies inside the threat. A row's result depends on all rows.
    Args:
        threat: The set of allowed points, norm linf or l2; eps must not be by sample.
        epochs: Passes over the rows, >= 1.
        batch_size: Rows a step, >= 1.
        step_size: Length of a step in the units of x, > 0; None means eps / 10.
        loss: As for `PGD`; the margin and the ratio of logits keep single rows from ruling the sum.
        targeted: y holds the class to reach.
        is_success: As for `PGD`.
    Raises: ConfigurationError: a field is malformed. ThreatModelError: another norm, or eps by sample.
    Cost: `epochs` forward and backward passes to the input; `run` one forward pass more, "min_norm" 10 more beyond
        that, and the last two goals the clean pass where it is not given.
    Source: Shafahi et al. 2020 ("Universal adversarial training"), section 3. Differs: steps of fixed length along the
        summed gradient; the loss is not clipped.
    Example:
        >>> from aidefend import Threat
        >>> attack, model = UniversalPerturbation(Threat("linf", 0.1)), torch.nn.Linear(4, 2)
        >>> x, y = torch.rand(32, 4), torch.randint(0, 2, (32,))
        >>> step = attack.perturbation(model, x, y)
        >>> step.shape, bool((step.abs() <= 0.1001).all())
        (torch.Size([1, 4]), True)
    """

    threat: Threat
    epochs: int = 5
    batch_size: int = 64
    _: dataclasses.KW_ONLY
    step_size: float | None = None
    loss: Loss = "cross_entropy"
    targeted: bool = False
    is_success: IsSuccess | None = None

    def __post_init__(self) -> None:
        check_fields(self.threat, 1, 1, self.loss, self.is_success, targeted=self.targeted)
        check_int(self.epochs, "epochs")
        check_int(self.batch_size, "batch_size")
        if self.step_size is not None:
            check_number(self.step_size, "step_size", 0.0, open_low=True)
        if self.threat.norm not in ("linf", "l2"):
            raise refuse("norm linf or l2", "threat", self.threat, "Use one of these norms", ThreatModelError)

    @property
    def restarts(self) -> int:
        """One: the perturbation starts at zero."""
        return 1

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Every sample with the same perturbation, projected; arguments as for `PGD`."""
        step = self.perturbation(model, x, y, generator=generator)
        return self.threat.project(x.detach() + step, x.detach())

    def perturbation(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The perturbation alone, (1, ...), to be added to other data; arguments as for `PGD`."""
        check_rows(self, x, y)
        _check_radius(self.threat, x)
        access = Access(model, self.loss, targeted=self.targeted, is_success=self.is_success, judge=False)
        with quiet_access(model):
            return _train(self, access, x.detach().clone(), y.detach().clone(), make_generator(generator))

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
        """Attack with a goal and count the passes; arguments as for `PGD.run`.

        No row leaves early, for all rows train the one perturbation. "first_success": x itself where it succeeds.
        "min_norm": that, or the smallest share of the perturbation that succeeds, by 10 halvings.
        """
        check_choice(goal, GOALS, "goal")
        stream = _one_stream(x, generator, row_seeds)
        with open_search(self, model, x, y, BatchStream(stream), logits) as search:
            _check_radius(self.threat, x)
            access = Access(model, self.loss, targeted=self.targeted, is_success=self.is_success)
            best = _judged(self, access, search, _train(self, access, search.x, search.y, stream), goal, logits)
            return dataclasses.replace(best, loss=access.loss_of(best.loss))

    def with_loss(self, loss: Loss) -> "UniversalPerturbation":
        """The same attack on another loss."""
        return dataclasses.replace(self, loss=loss)

    def climb(self, search: Search) -> tuple[Tensor, Scored | None]:
        """Not how this attack goes: no row climbs on its own."""
        return search.x, None


def _train(attack: UniversalPerturbation, access: Access, x: Tensor, y: Tensor, stream: torch.Generator) -> Tensor:
    """The perturbation, (1, ...)."""
    threat = attack.threat
    ball = dataclasses.replace(threat, integer=None, groups=None, bounds=(-torch.inf, torch.inf))
    origin = x.new_zeros(1, *x.shape[1:])
    step, size = origin, threat.radius(x) / 10 if attack.step_size is None else attack.step_size
    for _ in range(attack.epochs):
        order = torch.randperm(len(x), generator=stream, device=stream.device).to(x.device)
        for rows in order.split(attack.batch_size) if len(x) else ():
            point = threat.project(x[rows] + step, x[rows])
            _, grad = access.gradient(point, y[rows])
            slope = threat.unpriced(grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).sum(dim=0, keepdim=True))
            peak = slope.abs().amax().clamp(min=torch.finfo(slope.dtype).tiny) if slope.numel() else 1
            slope = slope / peak
            unit = slope.sign() if threat.norm == "linf" else slope / slope.norm().clamp(min=1e-12)
            step = ball.project(step + threat.unpriced(size * unit), origin)
    return step


def _judged(
    attack: UniversalPerturbation, access: Access, search: Search, step: Tensor, goal: Goal, logits: Tensor | None
) -> AttackResult:
    """Every row with the whole perturbation, or with none or the share that its goal asks for."""
    x, y, threat = search.x, search.y, attack.threat
    point = threat.project(x + step, x)
    none = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    best = AttackResult(point.clone(), none.bool(), x.new_zeros(len(x)), none + attack.epochs, none + attack.epochs)
    if len(x) == 0:
        return best
    everything = torch.ones_like(best.success)
    _take(best, point, access.score(point, y), everything)
    if goal == "max_loss":
        return best
    clean = access.score(x, y) if logits is None else access.scored(logits, y)
    _take(best, x, clean, clean.hit, passes=int(logits is None))
    low, high = torch.zeros_like(best.loss), torch.ones_like(best.loss)
    for _ in range(HALVINGS if goal == "min_norm" else 0):
        middle = (low + high) / 2
        trial = threat.project(x + as_rows(middle, x) * step, x)
        scored = access.score(trial, y)
        _take(best, trial, scored, scored.hit & ~clean.hit)
        low, high = torch.where(scored.hit, low, middle), torch.where(scored.hit, middle, high)
    return best


def _take(best: AttackResult, point: Tensor, scored: Scored, rows: Tensor, passes: int = 1) -> None:
    """Points of another forward pass over all rows, where `rows`."""
    best.forwards.add_(passes)
    best.x_adv[rows], best.success[rows] = point[rows], scored.hit[rows]
    best.loss[rows] = scored.climb[rows].to(best.loss)


def _one_stream(x: Tensor, generator: torch.Generator | None, row_seeds: Tensor | None) -> torch.Generator:
    """The generator, or one for all rows together from their seeds."""
    if row_seeds is None:
        return make_generator(generator)
    make_stream(len(x) if isinstance(x, Tensor) else 0, generator, row_seeds)
    return make_generator(seed=derive_seed(0, "universal", *sorted(row_seeds.tolist())))


def _check_radius(threat: Threat, x: Tensor) -> None:
    radius = threat.radius(x)
    if radius.ndim == x.ndim and radius.shape[0] == len(x) != 1:
        cure = "Pass one radius, or one for each feature"
        raise refuse("eps that is the same for all samples", "eps", threat.eps, cure, ThreatModelError)
