"""Unlearning of reversed triggers: in rounds, what sends all rows to a class is found, and trained to mean nothing."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from aidefend._core.modules import freeze, preserve
from aidefend._core.random import derive_seed, make_generator
from aidefend.sanitize.repair.trigger_search import FORMS, Triggers, search
from aidefend.sanitize.repair.tuning import Loss, TrustedRows, copied, tuned

Pool = list[tuple[Triggers, Tensor]]
_USUAL = 1.2  # of the median size: a suspect's trigger that has become this large is small no more
_QUIET_ROUNDS = 3
_SUSPICIOUS = 0.5  # of the median size: a trigger this small is looked at before all others
_TRUST_IN_LABELS = 0.5
_STEPS = 100
_RATES = (1e-3, 1e-3, 2e-3, 2e-3, 2e-3, 3e-3, 3e-3, 3e-3)  # of the rounds


def triggers_unlearned(model: nn.Module, rows: TrustedRows, *, epochs: int, seed: int) -> Iterator[nn.Module]:
    """Copies of the model, one after each round, for which the smallest triggers found lose their effect.

    In each round the smallest triggers towards all classes, and one away from any, are searched. Classes whose trigger
    is small beside the usual one of the first round are suspects from then on (all of them, while none is small), and
    their triggers join a pool; the rounds end when three in a row found no suspect's trigger small. Then trusted rows
    and mixtures of them are learned, with and without a trigger of the pool, by what the model said of them without
    one: that keeps what it knows beyond the few trusted rows.

    Source: ours, after Wang et al. 2019 (unlearning of a reversed trigger) and Zeng et al. 2022 (in rounds).
    """
    teacher, twin = copied(model), copied(model)
    pool: Pool = []
    quiet = 0
    classes = _classes(model, rows)
    usual: dict[str, Tensor] = {}
    suspects = torch.zeros(classes + 1, dtype=torch.bool, device=rows.x.device)
    for number, rate in enumerate(_RATES):
        found = _found(twin, rows, classes, _STEPS, derive_seed(seed, "round", number))
        usual = usual or {triggers.form: sizes[:-1].median() for triggers, sizes in found}
        smallest = torch.stack([sizes / usual[triggers.form] for triggers, sizes in found]).amin(dim=0)
        quiet = quiet + 1 if bool(suspects.any()) and bool((smallest[suspects] >= _USUAL).all()) else 0
        if quiet == _QUIET_ROUNDS:
            return
        suspects |= smallest < _SUSPICIOUS
        labels = (suspects if bool(suspects.any()) else ~suspects).nonzero().flatten()
        pool = pool + [(triggers, labels) for triggers, _ in found]
        loss = _loss(teacher, pool, classes, make_generator(seed=derive_seed(seed, "stamps", number)))
        twin = tuned(twin, rows, rate=rate, epochs=epochs, seed=derive_seed(seed, "tuning", number), loss=loss)
        yield twin


def _loss(teacher: nn.Module, pool: Pool, classes: int, stream: torch.Generator) -> Loss:
    """Cross-entropy to what the teacher says without a trigger, on rows as they are and with one of the pool."""

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x, wanted = _widened(teacher, x, y, classes, stream)
        triggers, labels = pool[int(torch.randint(len(pool), (), generator=stream))]
        which = labels[torch.randint(len(labels), (len(x),), generator=stream).to(x.device)]
        return cross_entropy(net(torch.cat([x, triggers.stamp(x, which)])), torch.cat([wanted, wanted]))

    return loss


def _widened(teacher: nn.Module, x: Tensor, y: Tensor, classes: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Trusted rows and mixtures of them, and what the model says of them: without a trigger it can be believed."""
    share = torch.rand(len(x), generator=stream).to(x).reshape(-1, *[1] * (x.ndim - 1))
    other = torch.randperm(len(x), generator=stream).to(x.device)
    mixed = torch.cat([x, x + share * (x[other] - x)])
    with torch.no_grad():
        said = teacher(mixed).softmax(dim=1)
    truth = torch.nn.functional.one_hot(y, classes).to(said)
    return mixed, torch.cat([said[: len(x)] + _TRUST_IN_LABELS * (truth - said[: len(x)]), said[len(x) :]])


def _classes(model: nn.Module, rows: TrustedRows) -> int:
    with torch.no_grad():
        return int(model(rows.x[:1]).shape[1])


def _found(model: nn.Module, rows: TrustedRows, classes: int, steps: int, seed: int) -> list[tuple[Triggers, Tensor]]:
    """Triggers of every form, with their sizes (K + 1,)."""
    with preserve(model), torch.enable_grad():
        freeze(model)
        model.eval()
        return [search(model, rows.x, rows.y, classes, form, steps=steps, seed=seed)[:2] for form in FORMS]
