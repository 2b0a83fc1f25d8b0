"""Square attack: random search over squares that sit on the surface of the threat. Needs outputs, never gradients."""

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
from aidefend.attacks.evasion.windows import Grid, opposed_hills

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries: when the share of features halves
_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Square:
    """Random search that changes one window at a time and keeps what raises the loss.

    Guarantee: the result lies inside the threat. Blind to masked gradients: it uses outputs alone.
    Args:
        threat: The set of allowed points, norm linf or l2.
        queries: Forward passes a restart, >= 1.
        restarts: Random starts, >= 1; the worst point of each sample is kept.
        share: Share of the features in the first windows, in (0, 1]; it halves nine times on the way.
        loss: As for `PGD`.
        targeted: y holds the class to reach.
        is_success: As for `PGD`.
    Raises: ConfigurationError: a field is malformed. ThreatModelError: another norm.
    Cost: `queries` forward passes for each restart, no backward pass.
    Source: Andriushchenko et al. 2020. Differs: any input rank (2-d windows over the last two dimensions of images,
        runs over all other data), one window a row, and the numbers of a row can be keyed to the row.
    Example:
        >>> from aidefend import Threat
        >>> model = torch.nn.Linear(4, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]]))
        >>> x, y = torch.tensor([[0.6, 0.5, 0.6, 0.5]]), torch.tensor([0])
        >>> Square(Threat("linf", 0.1), 100).run(model, x, y, goal="first_success").success.item()
        True
    """

    threat: Threat
    queries: int = 5000
    _: dataclasses.KW_ONLY
    restarts: int = 1
    share: float = 0.8
    loss: Loss = "margin"
    targeted: bool = False
    is_success: IsSuccess | None = None

    def __post_init__(self) -> None:
        check_int(self.queries, "queries")
        check_fields(self.threat, self.queries, self.restarts, self.loss, self.is_success, targeted=self.targeted)
        check_number(self.share, "share", 0.0, 1.0, open_low=True)
        if self.threat.norm not in ("linf", "l2"):
            raise refuse("norm linf or l2", "threat", self.threat, "Use another attack for l1 and l0", ThreatModelError)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The point of the highest loss for each sample; arguments as for `PGD`."""
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

    def with_loss(self, loss: Loss) -> "Square":
        """The same attack on another loss."""
        return dataclasses.replace(self, loss=loss)

    def climb(self, search: Search) -> tuple[Tensor, Scored | None]:
        """One start and `queries` - 1 proposals; the best point with its score."""
        grid = Grid.of(search.x)
        start = _stripes(search, grid) if self.threat.norm == "linf" else _hills(search, grid)
        best = search.threat.project(start, search.x)
        scored = search.score(best)
        climb, hit = scored.climb, scored.hit
        numbers = best.new_empty(0)
        for done in range(1, self.queries):
            if (done - 1) % _BLOCK == 0:
                numbers = search.uniform(_BLOCK, grid.numbers)
            propose = _repainted if self.threat.norm == "linf" else _moved
            share = self.share / 2 ** sum(done * 10_000 > mark * self.queries for mark in _HALVINGS)
            trial = propose(best, search, grid, share, numbers[:, (done - 1) % _BLOCK])
            trial = search.threat.project(trial, search.x)
            scored = search.score(trial)
            better = scored.climb > climb
            best = torch.where(better.reshape(-1, *[1] * (best.ndim - 1)), trial, best)
            climb, hit = torch.where(better, scored.climb, climb), torch.where(better, scored.hit, hit)
            keep = search.compact(done)
            if keep is not None:
                best, climb, hit, numbers = best[keep], climb[keep], hit[keep], numbers[keep]
            if search.active == 0:
                break
        return best, Scored(climb, hit)


def _stripes(search: Search, grid: Grid) -> Tensor:
    """Every column of every channel up or down by the whole radius."""
    signs = _signs(search.uniform(1, grid.channels * grid.width)[:, 0]).reshape(-1, grid.channels, 1, grid.width)
    step = grid.image(torch.ones_like(search.x)) * signs
    return search.x + search.threat.reach(search.x) * grid.original(step)


def _repainted(best: Tensor, search: Search, grid: Grid, share: float, numbers: Tensor) -> Tensor:
    """A window in which each channel is up or down by the whole radius."""
    places = grid.window(numbers, *grid.size(share))
    signs = _signs(numbers[:, 4 : 4 + grid.channels])[:, :, None]
    radius = search.threat.reach(search.x)
    up, down = (grid.flat(part).gather(2, places) for part in (search.x + radius, search.x - radius))
    return grid.original(grid.flat(best).scatter(2, places, torch.where(signs > 0, up, down)))


def _hills(search: Search, grid: Grid) -> Tensor:
    """A lattice of five by five opposed hills with random signs, stretched to the radius."""
    height, width = max(1, grid.height // 5), max(1, grid.width // 5)
    hill = opposed_hills(height, width, along_rows=height > 1).to(search.x)
    rows, columns = grid.height // height, grid.width // width
    lattice = hill.repeat(rows, columns)
    signs = _signs(search.uniform(1, grid.channels * rows * columns)[:, 0]).reshape(-1, grid.channels, rows, columns)
    signs = signs.repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)
    step = search.x.new_zeros(len(search.x), grid.channels, grid.height, grid.width)
    step[:, :, : rows * height, : columns * width] = lattice * signs
    return search.x + search.threat.unpriced(grid.original(_stretched(step, search)))


def _moved(best: Tensor, search: Search, grid: Grid, share: float, numbers: Tensor) -> Tensor:
    """The budget of a second window and what was unused goes into hills in a first one."""
    size = grid.size(share, odd=True)
    first, second = grid.window(numbers, *size), grid.window(numbers[:, 2:], *size)
    step = grid.flat(search.threat.priced(best - search.x))
    radius = search.threat.radius(search.x).reshape(-1, 1, 1)
    unused = (radius**2 - step.square().sum(dim=(1, 2), keepdim=True)).clamp(min=0)
    inside = torch.zeros_like(step).scatter(2, first, 1.0).scatter(2, second, 1.0)
    budget = (unused / grid.channels + (step * inside).square().sum(dim=2, keepdim=True)).sqrt()
    old = step.gather(2, first)
    high, wide = (opposed_hills(*size, along_rows=rows).to(step).flatten() for rows in (True, False))
    upright = (numbers[:, 4 + grid.channels] < 0.5)[:, None, None]
    hills = torch.where(upright, high, wide) * _signs(numbers[:, 4 : 4 + grid.channels])[:, :, None]
    new = hills + old / _length(old, (1, 2))
    new = new / _length(new, (2,)) * budget
    step = step.scatter(2, second, 0.0).scatter(2, first, new)
    image = step.reshape(-1, grid.channels, grid.height, grid.width)
    return search.x + search.threat.unpriced(grid.original(_stretched(image, search)))


def _stretched(step: Tensor, search: Search) -> Tensor:
    """Rows of the length of their radius."""
    radius = search.threat.radius(search.x).reshape(-1, 1, 1, 1)
    return step / _length(step, (1, 2, 3)) * radius


def _length(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    return values.square().sum(dim=dims, keepdim=True).sqrt().clamp(min=1e-12)


def _signs(uniforms: Tensor) -> Tensor:
    return torch.where(uniforms < 0.5, -1.0, 1.0).to(uniforms.dtype)
