"""Search for the smallest change, one for all rows, that sends them to a class: written, added, or a bend."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, grid_sample, interpolate

from aidefend._core.random import derive_seed, make_generator

Form = Literal["written", "added", "bent"]
FORMS: tuple[Form, ...] = ("written", "added", "bent")
_BATCH = 32
_WANTED = 0.9  # share of a batch that must go to the class before size may cost more
_RATES: dict[Form, float] = {"written": 0.3, "added": 0.1, "bent": 0.02}
_CONTROLS = 4  # points of a bend along each side of an image
_FARTHEST = 0.5  # what a bend may move a cell by, as a share of half the side


@dataclasses.dataclass(frozen=True, eq=False)
class Triggers:
    """One change for each of C wanted classes: parameters of C triggers of one form.

    Args:
        form: What kind of change.
        first, second: (C, ...): mask and values of what is written; what is added, or the bend of images (first alone).
        low, high: Range of the rows, which no trigger leaves.
        sides: Height and width of images, for a bend.
    """

    form: Form
    first: Tensor
    second: Tensor
    low: float
    high: float
    sides: tuple[int, ...] = ()

    def stamp(self, x: Tensor, which: Tensor) -> Tensor:
        """Rows (N, ...) with trigger number which (N,) on each."""
        if self.form == "added":
            return (x + self._change()[which]).clamp(self.low, self.high)
        if self.form == "bent":
            return grid_sample(x, self._places()[which], padding_mode="border", align_corners=True)
        mask, values = self._written()
        return x + mask[which] * (values[which] - x)

    def size(self) -> Tensor:
        """(C,): share of the cells that is written, by weight; root mean square of what is added over the range, or of
        the way that a bend moves cells over half the side.
        """
        if self.form == "written":
            return self._written()[0].flatten(1).mean(dim=1)
        change = self._change().flatten(1)
        return change.square().mean(dim=1).add(1e-12).sqrt() / (1 if self.form == "bent" else self.high - self.low)

    def _written(self) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(self.first), self.low + (self.high - self.low) * torch.sigmoid(self.second)

    def _change(self) -> Tensor:
        return (_FARTHEST if self.form == "bent" else self.high - self.low) * torch.tanh(self.first)

    def _places(self) -> Tensor:
        """(C, height, width, 2): where each cell of a bent image comes from, in [-1, 1]."""
        flow = interpolate(self._change(), size=self.sides, mode="bicubic", align_corners=True)
        axes = [torch.linspace(-1, 1, side).to(flow) for side in self.sides]
        rows, columns = torch.meshgrid(*axes, indexing="ij")
        return torch.stack([columns, rows], dim=-1) + flow.permute(0, 2, 3, 1)


def forms_for(x: Tensor) -> tuple[Form, ...]:
    """The forms that fit the rows: only images (N, C, H, W) bend."""
    return FORMS if x.ndim == 4 and min(x.shape[2:]) >= _CONTROLS else FORMS[:2]


def start(form: Form, like: Tensor, classes: int, low: float, high: float, stream: torch.Generator) -> Triggers:
    """Triggers of almost no effect, for samples of the shape of `like`."""
    if form == "bent":
        controls = 0.01 * torch.randn((classes, 2, _CONTROLS, _CONTROLS), generator=stream).to(like)
        return Triggers(form, controls, controls.clone(), low, high, tuple(like.shape[1:]))
    shape = (classes, *like.shape)
    noise = torch.randn(shape, generator=stream).to(like)
    if form == "written":
        mask_shape = (classes, 1, *like.shape[1:]) if like.ndim > 2 else shape  # one mask for all channels
        first = torch.full(mask_shape, -2.0).to(like) + 0.1 * torch.randn(mask_shape, generator=stream).to(like)
        return Triggers(form, first, noise, low, high)
    return Triggers(form, 0.01 * noise, noise, low, high)


def search(
    model: nn.Module, x: Tensor, y: Tensor, wanted: Tensor, form: Form, *, steps: int, seed: int
) -> tuple[Triggers, Tensor, Tensor]:
    """Smallest triggers found for all wanted classes at once, with their sizes and the share of rows they send there.

    Args:
        model: Frozen, in eval mode.
        x: (N, ...).
        y: (N,).
        wanted: (C,) classes; K, one beyond the last, stands for "away from the own class, to any".
        form: Kind of change.
        steps: Steps of Adam.
        seed: Of starts and batches.
    Returns: triggers, sizes (C,), success (C,) on rows of other classes; of each the smallest trigger that
        sent the wanted share of the latest rows there, else the last one.
    Cost: steps x C x 32 rows forward and backward.
    Source: Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao 2019 (mask and values, weight of the size raised while the
        trigger works and lowered while it does not). All classes at once, the trigger away from any class,
        and the forms "added" and "bent" are ours.
    """
    stream = make_generator(seed=derive_seed(seed, "search", form))
    low, high = float(x.amin()), float(x.amax())
    count = len(wanted)
    now = start(form, x[0], count, low, high, stream)
    optimizer = torch.optim.Adam([now.first.requires_grad_(True), now.second.requires_grad_(True)], lr=_RATES[form])
    weight = torch.full((count,), 1.0).to(x)
    best = dataclasses.replace(now, first=now.first.detach().clone(), second=now.second.detach().clone())
    smallest, recent = torch.full((count,), torch.inf).to(x), torch.zeros(count).to(x)
    for _ in range(steps):
        rows = torch.randint(len(x), (_BATCH,), generator=stream).to(x.device)
        loss, hit = _round(model, now, x[rows], y[rows], wanted, weight)
        optimizer.zero_grad()
        loss.backward()
        recent = 0.8 * recent + 0.2 * hit
        with torch.no_grad():
            size = now.size()
            better = (recent >= _WANTED) & (hit >= _WANTED) & (size < smallest)
            best.first[better], best.second[better] = now.first[better], now.second[better]
            smallest = torch.where(better, size, smallest)
            weight *= torch.where(recent >= _WANTED, 1.1, 0.9)
            weight.clamp_(1e-3, 1e3)
        optimizer.step()
    with torch.no_grad():
        never = smallest.isinf()
        best.first[never], best.second[never] = now.first[never], now.second[never]
        return best, best.size(), success(model, best, x, y, wanted)


def _round(
    model: nn.Module, now: Triggers, x: Tensor, y: Tensor, wanted: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss of all triggers on a batch, and the share (C,) of rows that each one sends where it shall."""
    count, rows = len(weight), len(x)
    which = torch.arange(count, device=x.device).repeat_interleave(rows)
    labels, aims = y.repeat(count), wanted[which]
    logits = model(now.stamp(x.repeat(count, *[1] * (x.ndim - 1)), which))
    others = (labels != aims).to(logits).reshape(count, rows)
    losses = _losses(logits, aims, labels).reshape(count, rows)
    there = _there(logits, aims, labels).to(logits).reshape(count, rows)
    share = others.sum(dim=1).clamp(min=1)
    hit = (there * others).sum(dim=1) / share
    return ((losses * others).sum(dim=1) / share + weight * now.size()).sum(), hit.detach()


def _losses(logits: Tensor, aims: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy towards the wanted class; for the last trigger minus the log chance of any class but the own."""
    classes = logits.shape[1]
    towards = cross_entropy(logits, aims.clamp(max=classes - 1), reduction="none")
    own = torch.nn.functional.one_hot(labels, classes).bool()
    away = logits.logsumexp(dim=1) - logits.masked_fill(own, -torch.inf).logsumexp(dim=1)
    return torch.where(aims == classes, away, towards)


def _there(logits: Tensor, aims: Tensor, labels: Tensor) -> Tensor:
    answer = logits.argmax(dim=1)
    return torch.where(aims == logits.shape[1], answer != labels, answer == aims)


@torch.no_grad()
def success(model: nn.Module, triggers: Triggers, x: Tensor, y: Tensor, wanted: Tensor) -> Tensor:
    """(C,): share of the rows of other classes that each trigger sends to its class, or away from their own."""
    found = []
    for number, aim in enumerate(wanted.tolist()):
        rows, labels = x[y != aim], y[y != aim]
        which = torch.full((len(rows),), number, device=x.device)
        parts = zip(rows.split(256), which.split(256), labels.split(256), strict=True)
        hits = [_there(model(triggers.stamp(a, b)), torch.full_like(b, aim), c) for a, b, c in parts]
        found.append(torch.cat(hits).double().mean() if hits else torch.tensor(0.0))
    return torch.stack(found)
