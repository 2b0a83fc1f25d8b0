"""What every search of one data set reads."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aidefend._core.random import derive_seed, make_generator
from aidefend.sanitize.features import Features
from aidefend.sanitize.trigger import FORMS, Trigger
from aidefend.sanitize.view import Conformity, IndependentView

Predict = Callable[[Tensor], Tensor]
_PROBES = 100


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """The usable rows of a data set.

    Args:
        x: Inputs (N, ...), finite.
        labels: (N,).
        features: (N, d) of the suspect model.
        view: The independent view.
        conformity: How well each row fits each class in that view.
        predict: Predicted classes of the suspect model.
        probes: Row numbers that receive patterns when proposals are ranked; no test uses them.
        low, high: Range of the inputs, shape of one sample.
        seed: Of everything that is drawn.
    """

    x: Tensor
    labels: Tensor
    features: Tensor
    view: IndependentView
    conformity: Conformity
    predict: Predict
    probes: Tensor
    low: Tensor
    high: Tensor
    seed: int


def world_of(found: Features, view: IndependentView, predict: Predict, seed: int) -> World:
    """The usable rows of `found`, ready to be searched."""
    rows = found.usable
    x, labels = found.x[rows], found.labels[rows]
    conformity = Conformity(view.coordinates(x), labels, seed=seed)
    wide = x if x.is_floating_point() else x.float()
    low, high = wide.amin(dim=0), wide.amax(dim=0)
    return World(x, labels, found.features[rows], view, conformity, predict, _probes(labels, seed), low, high, seed)


def shuffled(world: World, rows: Tensor) -> World:
    """The given rows with their labels permuted among them: a world in which no label has to do with its input."""
    stream = make_generator(seed=derive_seed(world.seed, "control") % 2**63)
    labels = world.labels[rows][torch.randperm(len(rows), generator=stream)]
    return dataclasses.replace(
        world,
        x=world.x[rows],
        labels=labels,
        features=world.features[rows],
        conformity=Conformity(world.conformity.coordinates[rows], labels, seed=world.seed),
        probes=_probes(labels, world.seed),
    )


def _probes(labels: Tensor, seed: int) -> Tensor:
    """The same number of rows of every class, about 100 in all, at most a fifth of a class."""
    stream = make_generator(seed=derive_seed(seed, "probes") % 2**63)
    classes = labels.unique().tolist()
    wanted = max(2, _PROBES // len(classes))
    chosen = []
    for label in classes:
        rows = (labels == label).nonzero().flatten()
        chosen.append(rows[torch.randperm(len(rows), generator=stream)[: min(wanted, len(rows) // 5)]])
    return torch.cat(chosen)


def turned(world: World, x: Tensor, triggers: Sequence[Trigger], label: int) -> list[Tensor]:
    """For each trigger (3, n) bool, one row a form: rows predicted as `label` with it that were not without.

    A row that is `label` without it counts as not turned, which makes the share of turned rows a cautious one.
    Cost: one forward pass of x, and three more for each trigger.
    """
    if not len(x):
        return [torch.zeros(FORMS, 0, dtype=torch.bool) for _ in triggers]
    eligible = world.predict(x) != label
    found = []
    for trigger in triggers:
        moved = world.predict(torch.cat(trigger.forms(x, world.low, world.high)))
        found.append((moved.reshape(FORMS, len(x)) == label) & eligible)
    return found
