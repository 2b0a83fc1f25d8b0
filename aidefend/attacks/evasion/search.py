"""The rows under attack: who is still active, what was found for each, which passes each has cost."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.discrete import outside
from aidefend._core.projection import project_l0
from aidefend._core.threat import Threat
from aidefend.attacks.evasion.access import Access, Scored
from aidefend.attacks.evasion.result import AttackResult
from aidefend.attacks.evasion.streams import Stream

_SHARE = 0.01
_LONG = 50.0
_CARRY = 4.0


class Search:
    """State of one run over N rows.

    `x`, `y` and `threat` are those of the active rows; `compact` drops rows that are broken (only when
    `stop_at_success`). Records of all rows are kept at full size.
    """

    def __init__(
        self,
        access: Access,
        threat: Threat,
        x: Tensor,
        y: Tensor,
        stream: Stream,
        *,
        stop_at_success: bool = False,
        begin_at: Tensor | None = None,
    ) -> None:
        self._access, self._stop = access, stop_at_success
        self.x, self.y, self.threat, self._stream = x, y, threat, stream
        self._begin_at = begin_at
        self._index = torch.arange(len(x), device=x.device)
        self._found = x.clone()
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self._climb = torch.full((len(x),), -torch.inf, dtype=wide, device=x.device)
        self._hit = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._total = AttackResult(*(part.clone() for part in self._active_records()), *_zeros(len(x), x.device, 2))
        self._passes = [0, 0]
        self._turn = 0
        self._detour = x

    @property
    def has_points(self) -> bool:
        """Whether the next start is at points that the run was given."""
        return self._begin_at is not None

    def start(self, random: bool) -> Tensor:
        """The first point of a restart, and the directions to take where there is no gradient.

        Points to begin at, where the run has them, take the place of the first start.
        """
        self._detour = self._stream.normal(self.x)
        if self._begin_at is not None:
            first, self._begin_at = self.threat.project(self._begin_at, self.x), None
            return first
        return self._stream.start(self.threat, self.x) if random else self.x.clone()

    def uniform(self, blocks: int, count: int) -> Tensor:
        """U(0, 1) numbers of the active rows: (n, blocks, count)."""
        numbers = self._stream.normal(self.x.new_empty(len(self.x), blocks, count))
        shares: Tensor = torch.special.ndtr(numbers.double()).clamp(max=1 - 1e-7)
        return shares.to(self.x.dtype)

    def advance(self, ahead: Tensor, radius: Tensor | None = None) -> Tensor:
        """The next iterate of a gradient attack: `ahead` projected, to another radius if that is given.

        A step of less than a half of a whole number or category would be rounded away for ever: such features keep
        what the projection took off, up to a limit, so that steps add up. `snap` gives the allowed point.
        """
        threat = self.threat if radius is None else self.threat.with_eps(radius)
        point, discrete = threat.project(ahead, self.x), threat.discrete(self.x)
        if discrete is None:
            return point
        return point + torch.where(discrete, (ahead - point).clamp(-_CARRY, _CARRY), 0)

    def snap(self, point: Tensor) -> Tensor:
        """The allowed point that an iterate of `advance` stands for; gradients there are taken as the iterate's own."""
        return point if self.threat.discrete(self.x) is None else self.threat.project(point, self.x)

    def gradient(self, point: Tensor, allowed: Tensor | None = None) -> tuple[Scored, Tensor]:
        """Score the active rows at `point` and give the gradient there; a success counts only where `allowed`."""
        point = self.snap(point)
        scored, grad = self._access.gradient(point, self.y)
        self._count(1, 1)
        if allowed is None:
            self._record_if_stopping(point, scored)
            return scored, grad
        self._record_if_stopping(point, Scored(scored.climb.masked_fill(~allowed, -torch.inf), scored.hit & allowed))
        return Scored(scored.climb, scored.hit & allowed), grad

    def score(self, point: Tensor) -> Scored:
        """Score the active rows at `point`, one forward pass."""
        point = self.snap(point)
        scored = self._access.score(point, self.y)
        self._count(1, 0)
        self._record_if_stopping(point, scored)
        return scored

    def offer(self, point: Tensor, scored: Scored) -> None:
        """Keep `point` for the active rows where it beats what is kept: success first, then the larger loss."""
        point = self.snap(point)
        climb = scored.ordered.to(self._climb)
        larger = climb > self._climb
        better = ~self._hit & (scored.hit | larger) if self._stop else larger
        self._found = torch.where(_as_rows(better, point), point, self._found)
        self._climb = torch.where(better, climb, self._climb)
        self._hit = torch.where(better, scored.hit, self._hit)

    def begin(self, logits: Tensor | None) -> Scored:
        """Take x itself as the first candidate: from its logits if they are known, else by one forward pass."""
        if logits is None:
            return self.score(self.x)
        scored = self._access.scored(logits, self.y)
        self._record_if_stopping(self.x, scored)
        return scored

    def direction(self, grad: Tensor, point: Tensor, share: float | Tensor = _SHARE) -> Tensor:
        """The steepest step of length one in the norm. Rows without a usable gradient get a random direction.

        l1: equal steps in this share of the features, those of the steepest gradient among those that are not at their
        bound. l0: along the gradient, the largest element as long as the range of the feature. linf: members of a
        one-hot group step by their share of the largest gradient, for the sign does not tell the best category.
        """
        norm = self.threat.norm
        if norm == "l1":
            grad = self.open_part(grad, point)
        step = self.steepest(grad, norm, share)
        if norm == "linf" and self.threat.groups is not None:
            members = ~outside(self.threat.groups, grad.flatten(1)).reshape(grad.shape[1:])
            step = torch.where(members, _scaled(torch.where(members, grad, 0)), step)
        return step

    def open_part(self, grad: Tensor, point: Tensor) -> Tensor:
        """The gradient without the features that stand at a bound and would step across it."""
        low, high = self.threat.limits(self.x)
        return torch.where(torch.where(grad > 0, point < high, point > low), grad, 0)

    def unit(self) -> Tensor | float:
        """The radius in steps of `direction`.

        l0: so long that the projection keeps the features of the largest gradient times change, not those that have
        changed already.
        """
        return _LONG if self.threat.norm == "l0" else self.threat.radius(self.x)

    def steepest(self, grad: Tensor, norm: str, share: float | Tensor = _SHARE) -> Tensor:
        """`direction` in a norm of choice."""
        grad = self.threat.unpriced(grad)
        if self.threat.mask is not None:
            grad = torch.where(self.threat.mask.to(grad.device), grad, 0)
        self._turn += 1
        peak = grad.abs().flatten(1).amax(dim=1)
        usable = peak.isfinite() & (peak > 0)
        # On the CPU a look at the flags is free and saves the detour; elsewhere it would wait for the device.
        if grad.device.type != "cpu" or not bool(usable.all()):
            detour = self._detour.flatten(1).roll(self._turn, dims=1).reshape(grad.shape)
            grad = torch.where(_as_rows(usable, grad), grad, detour)
        if norm == "l0":
            low, high = self.threat.limits(self.x)
            return _scaled(grad) * torch.where((high - low).isfinite(), high - low, 1.0)
        step = grad.sign() if norm == "linf" else _few(grad, share) if norm == "l1" else _unit(grad)
        return self.threat.unpriced(step)

    def compact(self, done: int) -> Tensor | None:
        """Drop broken rows after `done` steps; the kept rows (to index any state with), or None where nothing moved.

        Only at checkpoints (0, 1, 2, 4, 8, then every 8 steps), so that nothing waits for the device in between.
        """
        if not self._stop or (done % 8 and done not in (1, 2, 4)) or not bool(self._hit.any()):
            return None
        keep = (~self._hit).nonzero()[:, 0]
        self._store()
        self._found, self._climb, self._hit = self._found[keep], self._climb[keep], self._hit[keep]
        self.threat = self.threat.rows(self.x, keep)
        self.x, self.y, self._index = self.x[keep], self.y[keep], self._index[keep]
        self._stream, self._detour = self._stream.rows(keep), self._detour[keep]
        self._begin_at = None if self._begin_at is None else self._begin_at[keep]
        return keep

    @property
    def active(self) -> int:
        """Number of rows still under attack."""
        return len(self.x)

    def result(self) -> AttackResult:
        """What was found for all rows."""
        self._store()
        return dataclasses.replace(self._total, loss=self._access.loss_of(self._total.loss))

    def _count(self, forwards: int, backwards: int) -> None:
        self._passes[0] += forwards
        self._passes[1] += backwards

    def _record_if_stopping(self, point: Tensor, scored: Scored) -> None:
        if self._stop:
            self.offer(point, scored)

    def _active_records(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._found, self._hit, self._climb

    def _store(self) -> None:
        for target, value in zip(
            (self._total.x_adv, self._total.success, self._total.loss), self._active_records(), strict=True
        ):
            target[self._index] = value
        self._total.forwards[self._index] += self._passes[0]
        self._total.backwards[self._index] += self._passes[1]
        self._passes = [0, 0]


def _zeros(n: int, device: torch.device, count: int) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(n, dtype=torch.int64, device=device) for _ in range(count))


def _as_rows(flags: Tensor, like: Tensor) -> Tensor:
    """(N,) shaped to broadcast against (N, ...)."""
    return flags.reshape(-1, *[1] * (like.ndim - 1))


def _few(grad: Tensor, share: float | Tensor) -> Tensor:
    """Equal steps, together of length one, in the steepest features of each row; at least one."""
    size = grad.abs().flatten(1)
    count = (torch.as_tensor(share, dtype=size.dtype, device=size.device).reshape(-1, 1) * size.shape[1]).round()
    steep = project_l0(size, count.clamp(min=1).expand(len(size), 1)).to(size)
    signs = grad.sign().flatten(1) * steep
    step: Tensor = signs / steep.sum(dim=1, keepdim=True).clamp(min=1)
    return step.reshape(grad.shape)


def _scaled(grad: Tensor) -> Tensor:
    """The gradient with a largest element of one."""
    peak = grad.abs().flatten(1).amax(dim=1).clamp(min=torch.finfo(grad.dtype).tiny)
    return grad / _as_rows(peak, grad)


def _unit(grad: Tensor) -> Tensor:
    """Rows of Euclidean length one; divided by the largest element first, so that tiny gradients do not underflow."""
    flat = grad.flatten(1)
    flat = flat / flat.abs().amax(dim=1, keepdim=True)
    unit: Tensor = flat / flat.norm(dim=1, keepdim=True)
    return unit.reshape(grad.shape)
