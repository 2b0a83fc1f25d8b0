"""Adversarial patch: only the features in one window change, at the weakest place or wherever it lands."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_flag, check_int, check_items, check_number, refuse
from aidefend._core.errors import ThreatModelError
from aidefend._core.modules import Model
from aidefend._core.threat import Threat
from aidefend.attacks.evasion.access import Scored
from aidefend.attacks.evasion.checks import check_fields
from aidefend.attacks.evasion.goals import Goal, perturb, run
from aidefend.attacks.evasion.losses import IsSuccess, Loss
from aidefend.attacks.evasion.result import AttackResult
from aidefend.attacks.evasion.search import Search
from aidefend.attacks.evasion.windows import Grid


@dataclasses.dataclass(frozen=True)
class AdversarialPatch:
    """A patch for each sample, or one for all, by projected ascent on the features inside a window.

    Guarantee: inside the threat, and nothing outside one window of each sample changes.
    Args:
        threat: Norm linf; eps caps the change inside the window: the whole range of x for a patch that hides what is
            under it.
        size: Height and width of the window, for images (N, C, H, W); for all other data the number of neighbouring
            features is the width. Larger than the sample = all of it.
        steps: Steps, >= 1.
        step_size: As for `PGD`.
        place: "optimised": the window with the largest input gradient at x, or with restarts a random one among the
            best tenth. "random": one patch for any place, trained on `places` random ones a step, put down at one more.
        places: Places a step for "random", >= 1.
        shared: One patch for all rows; rows are then no longer independent of their batch.
        restarts: Runs, >= 1; the worst end point of each sample is kept.
        loss: As for `PGD`.
        targeted: y holds the class to reach.
        is_success: As for `PGD`.
    Raises: ConfigurationError: a field is malformed. ThreatModelError: another norm.
    Cost: For each restart "optimised" `steps` + 1, "random" `places` * `steps` forward and backward passes to the
        input, and one forward pass for the last point where its score is needed.
    Source: Brown et al. 2017. Differs: no rotation or scaling; the place can be chosen by saliency.
    Example:
        >>> from aidefend import Threat
        >>> attack = AdversarialPatch(Threat("linf", 1.0), (2, 2), 5)
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
        >>> x = torch.rand(1, 1, 4, 4)
        >>> int((attack(model, x, torch.tensor([0])) != x).sum()) <= 4
        True
    """

    threat: Threat
    size: tuple[int, int] = (5, 5)
    steps: int = 40
    _: dataclasses.KW_ONLY
    step_size: float | None = None
    place: Literal["optimised", "random"] = "optimised"
    places: int = 4
    shared: bool = False
    restarts: int = 1
    loss: Loss = "cross_entropy"
    targeted: bool = False
    is_success: IsSuccess | None = None

    def __post_init__(self) -> None:
        check_fields(self.threat, self.steps, self.restarts, self.loss, self.is_success, targeted=self.targeted)
        sides = check_items(self.size, int, "size", "Pass (height, width)")
        if len(sides) != 2:
            raise refuse("size to be (height, width)", "size", self.size, "Pass two whole numbers")
        for side in sides:
            check_int(side, "size")
        check_choice(self.place, ("optimised", "random"), "place")
        check_int(self.places, "places")
        check_flag(self.shared, "shared")
        if self.step_size is not None:
            check_number(self.step_size, "step_size", 0.0, open_low=True)
        if self.threat.norm != "linf":
            cure = 'Pass Threat("linf", eps): the window limits how many features change'
            raise refuse("norm linf", "threat", self.threat, cure, ThreatModelError)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Each sample with its patch; arguments as for `PGD`."""
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

    def with_loss(self, loss: Loss) -> "AdversarialPatch":
        """The same attack on another loss."""
        return dataclasses.replace(self, loss=loss)

    def climb(self, search: Search) -> tuple[Tensor, Scored | None]:
        """One patch for each row, trained and put down; the last point, not scored."""
        grid = Grid.of(search.x)
        if grid.height * grid.width == 0:
            return search.x, None
        start = grid.flat(search.start(random=True))
        fixed = self._best_places(search, grid) if self.place == "optimised" else None
        count = self._height(grid) * self._width(grid)
        patch = start[:, :, :count] if fixed is None else start.gather(2, fixed)
        if self.shared:
            patch = patch[:1].expand_as(patch)
        for done in range(1, self.steps + 1):
            patch = patch + self._step_of(search) * self._ascent(search, grid, patch, fixed)
            keep = search.compact(done)
            if keep is not None:
                patch, fixed = patch[keep], None if fixed is None else fixed[keep]
            if search.active == 0:
                break
        return _put(search, grid, patch, self._drawn(search, grid) if fixed is None else fixed), None

    def _ascent(self, search: Search, grid: Grid, patch: Tensor, fixed: Tensor | None) -> Tensor:
        """Sign of the gradient, averaged over places and, if shared, over rows."""
        total = torch.zeros_like(patch)
        for _ in range(1 if fixed is not None else self.places):
            window = self._drawn(search, grid) if fixed is None else fixed
            _, grad = search.gradient(_put(search, grid, patch, window))
            total = total + grid.flat(grad).gather(2, window).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return (total.sum(dim=0, keepdim=True).expand_as(total) if self.shared else total).sign()

    def _best_places(self, search: Search, grid: Grid) -> Tensor:
        """For each row the window whose input gradients are largest in sum; with restarts one of the best."""
        _, grad = search.gradient(search.x)
        if self.threat.mask is not None:
            grad = torch.where(self.threat.mask.to(grad.device), grad, 0)
        size = self._height(grid), self._width(grid)
        strength = grid.image(grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)).abs().sum(dim=1, keepdim=True)
        sums = torch.nn.functional.avg_pool2d(strength.float(), size, stride=1).flatten(1)
        if self.shared:
            sums = sums.sum(dim=0, keepdim=True).expand_as(sums)
        order = sums.argsort(dim=1, descending=True)
        among = 1 if self.restarts == 1 else max(1, order.shape[1] // 10)
        pick = (search.uniform(1, 1)[:, 0] * among).long().clamp(max=among - 1)
        corner = order.gather(1, pick[:1].expand_as(pick) if self.shared else pick)
        columns = grid.width - size[1] + 1
        rows = grid.height - size[0] + 1
        share = torch.cat([(corner // columns + 0.5) / rows, (corner % columns + 0.5) / columns], dim=1)
        return grid.window(share, *size)

    def _drawn(self, search: Search, grid: Grid) -> Tensor:
        return grid.window(search.uniform(1, 2)[:, 0], self._height(grid), self._width(grid))

    def _height(self, grid: Grid) -> int:
        return min(self.size[0], grid.height)

    def _width(self, grid: Grid) -> int:
        wanted = self.size[1] if grid.height > 1 else self.size[0] * self.size[1]
        return min(wanted, grid.width)

    def _step_of(self, search: Search) -> Tensor | float:
        """Radii by feature have no place in a patch that moves: the largest one is used."""
        if self.step_size is not None:
            return self.step_size
        radius = search.threat.reach(search.x).expand_as(search.x).flatten(1)
        return radius.amax(dim=1)[:, None, None] * (2.5 / self.steps)


def _put(search: Search, grid: Grid, patch: Tensor, window: Tensor) -> Tensor:
    """X with the patch over a window, projected into the threat."""
    covered = grid.flat(search.x).scatter(2, window, patch)
    return search.threat.project(grid.original(covered), search.x)
