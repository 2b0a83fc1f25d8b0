"""Search for the smallest change, one for all rows, that sends them to a class: written into cells, or added."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from aidefend._core.random import derive_seed, make_generator

Form = Literal["written", "added"]
FORMS: tuple[Form, ...] = ("written", "added")
_BATCH = 32
_WANTED = 0.9  # share of a batch that must go to the class before size may cost more
_RATES: dict[Form, float] = {"written": 0.3, "added": 0.1}


@dataclasses.dataclass(frozen=True, eq=False)
class Triggers:
    """One change for each class, and a last one that leads away from any: parameters of K + 1 triggers of one form.

    Args:
        form: What kind of change.
        first, second: (K + 1, ...): mask and values of what is written; what is added (first alone).
        low, high: Range of the rows, which no trigger leaves.
    """

    form: Form
    first: Tensor
    second: Tensor
    low: float
    high: float

    def stamp(self, x: Tensor, which: Tensor) -> Tensor:
        """Rows (N, ...) with the trigger of class which (N,) on each."""
        if self.form == "added":
            return (x + self._change()[which]).clamp(self.low, self.high)
        mask, values = self._written()
        return x + mask[which] * (values[which] - x)

    def size(self) -> Tensor:
        """(K + 1,): share of the cells that is written, by weight; root mean square of what is added over the range."""
        if self.form == "added":
            change = self._change().flatten(1)
            return change.square().mean(dim=1).add(1e-12).sqrt() / (self.high - self.low)
        return self._written()[0].flatten(1).mean(dim=1)

    def _written(self) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(self.first), self.low + (self.high - self.low) * torch.sigmoid(self.second)

    def _change(self) -> Tensor:
        return (self.high - self.low) * torch.tanh(self.first)


def start(form: Form, like: Tensor, classes: int, low: float, high: float, stream: torch.Generator) -> Triggers:
    """Triggers of almost no effect, for samples of the shape of `like`."""
    shape = (classes, *like.shape)
    noise = torch.randn(shape, generator=stream).to(like)
    if form == "written":
        mask_shape = (classes, 1, *like.shape[1:]) if like.ndim > 2 else shape  # one mask for all channels
        first = torch.full(mask_shape, -2.0).to(like) + 0.1 * torch.randn(mask_shape, generator=stream).to(like)
        return Triggers(form, first, noise, low, high)
    return Triggers(form, 0.01 * noise, noise, low, high)


def search(
    model: nn.Module, x: Tensor, y: Tensor, classes: int, form: Form, *, steps: int, seed: int
) -> tuple[Triggers, Tensor, Tensor]:
    """Smallest triggers found for all classes at once, with their sizes and the share of rows that they send there.

    Args:
        model: Frozen, in eval mode.
        x: (N, ...).
        y: (N,).
        classes: K.
        form: Kind of change.
        steps: Steps of Adam.
        seed: Of starts and batches.
    Returns: triggers, sizes (K + 1,), success (K + 1,) on rows of other classes; of each the smallest trigger that
        sent the wanted share of the latest rows there, else the last one.
    Cost: steps x (K + 1) x 32 rows forward and backward.
    Source: Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao 2019 (mask and values, weight of the size raised while the
        trigger works and lowered while it does not). All classes at once, the trigger away from any class,
        and the form "added" are ours.
    """
    stream = make_generator(seed=derive_seed(seed, "search", form))
    low, high = float(x.amin()), float(x.amax())
    count = classes + 1
    now = start(form, x[0], count, low, high, stream)
    optimizer = torch.optim.Adam([now.first.requires_grad_(True), now.second.requires_grad_(True)], lr=_RATES[form])
    weight = torch.full((count,), 1.0).to(x)
    best = Triggers(form, now.first.detach().clone(), now.second.detach().clone(), low, high)
    smallest, recent = torch.full((count,), torch.inf).to(x), torch.zeros(count).to(x)
    for _ in range(steps):
        rows = torch.randint(len(x), (_BATCH,), generator=stream).to(x.device)
        loss, hit = _round(model, now, x[rows], y[rows], weight)
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
        return best, best.size(), success(model, best, x, y)


def _round(model: nn.Module, now: Triggers, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of all triggers on a batch, and the share (K + 1,) of rows that each one sends where it shall."""
    count, rows = len(weight), len(x)
    which = torch.arange(count, device=x.device).repeat_interleave(rows)
    labels = y.repeat(count)
    logits = model(now.stamp(x.repeat(count, *[1] * (x.ndim - 1)), which))
    others = (labels != which).to(logits).reshape(count, rows)
    losses = _losses(logits, which, labels).reshape(count, rows)
    there = _there(logits, which, labels).to(logits).reshape(count, rows)
    share = others.sum(dim=1).clamp(min=1)
    hit = (there * others).sum(dim=1) / share
    return ((losses * others).sum(dim=1) / share + weight * now.size()).sum(), hit.detach()


def _losses(logits: Tensor, which: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy towards the wanted class; for the last trigger minus the log chance of any class but the own."""
    classes = logits.shape[1]
    towards = cross_entropy(logits, which.clamp(max=classes - 1), reduction="none")
    own = torch.nn.functional.one_hot(labels, classes).bool()
    away = logits.logsumexp(dim=1) - logits.masked_fill(own, -torch.inf).logsumexp(dim=1)
    return torch.where(which == classes, away, towards)


def _there(logits: Tensor, which: Tensor, labels: Tensor) -> Tensor:
    answer = logits.argmax(dim=1)
    return torch.where(which == logits.shape[1], answer != labels, answer == which)


@torch.no_grad()
def success(model: nn.Module, triggers: Triggers, x: Tensor, y: Tensor) -> Tensor:
    """(K + 1,): share of the rows of other classes that each trigger sends to its class; the last: to any other."""
    found = []
    for label in range(len(triggers.first)):
        rows, labels = x[y != label], y[y != label]
        which = torch.full((len(rows),), label, device=x.device)
        parts = zip(rows.split(256), which.split(256), labels.split(256), strict=True)
        hits = [_there(model(triggers.stamp(a, b)), b, c) for a, b, c in parts]
        found.append(torch.cat(hits).double().mean() if hits else torch.tensor(0.0))
    return torch.stack(found)
