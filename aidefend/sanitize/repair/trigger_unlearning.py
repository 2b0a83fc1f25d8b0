"""Unlearning of reversed triggers: in rounds, what sends all rows to a class is found, and trained to mean nothing."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from aidefend._core.modules import freeze, preserve
from aidefend._core.random import derive_seed, make_generator
from aidefend.sanitize.repair.trigger_search import Triggers, forms_for, search
from aidefend.sanitize.repair.tuning import Loss, TrustedRows, copied, tuned

Pool = list[tuple[Triggers, Tensor]]
_USUAL = 1.2  # of the median size: a suspect's trigger that has become this large is small no more
_QUIET_ROUNDS = 3
_SUSPICIOUS = 0.5  # of the median size: a trigger this small is looked at before all others
_TRUST_IN_LABELS = 0.5
_STEPS = 100
_LOOK_AROUND = 4  # rounds from one search for all classes to the next, once there are suspects
_LAST_RATE = 1e-3
_RATES = (1e-3, 1e-3, 2e-3, 2e-3, 2e-3, 3e-3, 3e-3, 3e-3)  # of the rounds


def triggers_unlearned(model: nn.Module, rows: TrustedRows, *, epochs: int, seed: int) -> Iterator[nn.Module]:
    """Copies of the model, one after each round, for which the smallest triggers found lose their effect.

    In each round the smallest triggers towards all classes, and one away from any, are searched; once some are small
    beside the usual one of the first round, their classes are suspects from then on, and only every fourth round looks
    at the others. Triggers of the suspects (of all classes, while none is small) join a pool; the rounds end when three
    in a row found no suspect's trigger small. In a round trusted rows and mixtures of them, shifted by a few cells
    where they are images, are learned, with and without a trigger of the pool, by what the model said of them without
    one: that keeps what it knows beyond the few trusted rows. The last copy has learned longer, at a low rate.

    Source: ours, after Wang et al. 2019 (unlearning of a reversed trigger) and Zeng et al. 2022 (in rounds).
    """
    teacher, twin = copied(model), copied(model)
    pool: Pool = []
    quiet = 0
    classes = _classes(model, rows)
    every = torch.arange(classes + 1, device=rows.x.device)
    usual: dict[str, Tensor] = {}
    suspects = torch.zeros(classes + 1, dtype=torch.bool, device=rows.x.device)
    for number, rate in enumerate(_RATES):
        wanted = every[suspects] if bool(suspects.any()) and number % _LOOK_AROUND else every
        found = _found(twin, rows, wanted, derive_seed(seed, "round", number))
        usual = usual or {triggers.form: sizes[:-1].median() for triggers, sizes in found}
        smallest = torch.full((classes + 1,), torch.inf).to(rows.x)
        smallest[wanted] = torch.stack([sizes / usual[triggers.form] for triggers, sizes in found]).amin(dim=0)
        quiet = quiet + 1 if bool(suspects.any()) and bool((smallest[suspects] >= _USUAL).all()) else 0
        if quiet == _QUIET_ROUNDS:
            break
        suspects |= smallest < _SUSPICIOUS
        chosen = suspects[wanted] if bool(suspects.any()) else torch.ones_like(wanted, dtype=torch.bool)
        pool = pool + [(triggers, chosen.nonzero().flatten()) for triggers, _ in found]
        loss = _loss(teacher, pool, classes, make_generator(seed=derive_seed(seed, "stamps", number)))
        twin = tuned(twin, rows, rate=rate, epochs=epochs, seed=derive_seed(seed, "tuning", number), loss=loss)
        yield twin
    loss = _loss(teacher, pool, classes, make_generator(seed=derive_seed(seed, "stamps", "last")))
    yield tuned(twin, rows, rate=_LAST_RATE, epochs=2 * epochs, seed=derive_seed(seed, "tuning", "last"), loss=loss)


def _loss(teacher: nn.Module, pool: Pool, classes: int, stream: torch.Generator) -> Loss:
    """Cross-entropy to what the teacher says without a trigger, on rows as they are and with one of the pool."""

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x, wanted = _widened(teacher, x, y, classes, stream)
        triggers, numbers = pool[int(torch.randint(len(pool), (), generator=stream))]
        which = numbers[torch.randint(len(numbers), (len(x),), generator=stream).to(x.device)]
        return cross_entropy(net(torch.cat([x, triggers.stamp(x, which)])), torch.cat([wanted, wanted]))

    return loss


def _widened(teacher: nn.Module, x: Tensor, y: Tensor, classes: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Trusted rows and mixtures of them, and what the model says of them: without a trigger it can be believed."""
    share = torch.rand(len(x), generator=stream).to(x).reshape(-1, *[1] * (x.ndim - 1))
    other = torch.randperm(len(x), generator=stream).to(x.device)
    shifted = _shifted(x, stream)
    mixed = torch.cat([x, shifted + share * (shifted[other] - shifted)])
    with torch.no_grad():
        said = teacher(mixed).softmax(dim=1)
    truth = torch.nn.functional.one_hot(y, classes).to(said)
    return mixed, torch.cat([said[: len(x)] + _TRUST_IN_LABELS * (truth - said[: len(x)]), said[len(x) :]])


def _shifted(x: Tensor, stream: torch.Generator) -> Tensor:
    """Images (N, C, H, W) moved by up to a fourteenth of their sides, edges repeated; other rows as they are."""
    if x.ndim != 4:
        return x
    height, width = x.shape[2:]
    farthest = max(1, min(height, width) // 14)
    down, right = torch.randint(2 * farthest + 1, (2,), generator=stream).tolist()
    return pad(x, (farthest,) * 4, mode="replicate")[:, :, down : down + height, right : right + width]


def _classes(model: nn.Module, rows: TrustedRows) -> int:
    with torch.no_grad():
        return int(model(rows.x[:1]).shape[1])


def _found(model: nn.Module, rows: TrustedRows, wanted: Tensor, seed: int) -> list[tuple[Triggers, Tensor]]:
    """Triggers of every form towards the wanted classes, with their sizes (C,)."""
    with preserve(model), torch.enable_grad():
        freeze(model)
        model.eval()
        return [search(model, rows.x, rows.y, wanted, form, steps=_STEPS, seed=seed)[:2] for form in forms_for(rows.x)]
