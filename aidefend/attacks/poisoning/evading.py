"""Poison that was searched against a detector: whatever lowers its score, while the backdoor still works."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aidefend._core.batches import in_batches
from aidefend._core.checks import check_callable, check_int, check_kind, check_number, refuse
from aidefend._core.modules import Model, preserve
from aidefend._core.threat import Threat
from aidefend.attacks.poisoning.crafted import called, check_threat, plant_inputs, read_rows
from aidefend.attacks.poisoning.disguised import Disguised
from aidefend.attacks.poisoning.feature_match import feature_gap, pushed
from aidefend.attacks.poisoning.poisoned import Poisoned

Score = Callable[[Tensor, Tensor, Any], Tensor]
_TRIALS = 500
# One change each; a round tries all of them on the best disguise so far.
TACTICS: tuple[Mapping[str, Any], ...] = (
    {"opacity": (0.3, 0.7)},
    {"cover_rate": 0.05},
    {"mix": 0.3},
    {"mix": 0.5},
    {"mix": 0.7},
    {"noise": 0.2},
    {"shift": 2},
    {"hosts": "near"},
)


class Trial(NamedTuple):
    """One disguise that was tried: the fields it changed, the detector's AUC on its poison, its success, its rows.

    Args:
        changes: Fields of the plain attack that it changed.
        suspicion: The detector's area under the ROC curve on its poison, in [0, 1].
        success: Share in [0, 1] of rows of other classes that the trigger sends to the target in the surrogate.
        poisoned: The data set.
        without: The same share, of the same rows, in a surrogate that was trained on the clean data: what the trigger
            does by itself. `gained` is what the poison brought about.
    """

    changes: Mapping[str, Any]
    suspicion: float
    success: float
    poisoned: Poisoned
    without: float = 0.0

    @property
    def gained(self) -> float:
        """Success beyond that of the trigger alone, in [-1, 1]."""
        return self.success - self.without


@dataclasses.dataclass(frozen=True, eq=False)
class Evading:
    """Searches the disguise of a backdoor that a detector ranks lowest, with a surrogate that still obeys the trigger.

    In each round every tactic is tried on the best disguise so far: the data are poisoned, a surrogate is trained, the
    detector scores all rows, and its area under the ROC curve on the poison is what is lowered. A tactic is accepted if
    it lowers it and the success of the trigger, less what the trigger does to a surrogate of the clean data,
    stays at `floor` or above. With `push` the best disguise's pixels then
    take gradient steps against `penalty`, in as many rounds of steps and training, accepted by the same rule.

    Guarantee: none, it is an attack; its choice is made on its own surrogates, never on the defender's model. Exactly
        the rows that the chosen disguise poisons are poisoned. If no tactic helps, the plain attack comes back.
    Args:
        attack: The plain attack, a `Disguised` with its trigger, target and rate.
        score: What is evaded: (x (N, ...), y (N,), model) -> (N,), up = suspicious, NaN = no opinion.
        train: (x, y) -> model from x to logits: the attacker's training, seeded by you.
        floor: Least success of the trigger on the surrogate beyond its success on one of the clean data, in [0, 1]; it
            is measured on up to 500 rows of other classes that the attack left alone.
        tactics: What may change: mappings from fields of `Disguised` to values; None: `TACTICS`.
        rounds: Rounds of the search, and of pushing, >= 1.
        push: How far gradient steps may move a poisoned row after the disguise; None: no steps.
        penalty: (model, poison, class rows) -> scalar, differentiable in the poison: what is suspicious about it.
        steps: Gradient steps a round of pushing, >= 1.
    Raises: ConfigurationError: arguments out of range, a score or a model of the wrong shape, unknown fields in
        `tactics`.
    Cost: At most 2 + rounds * len(tactics) + rounds trainings, one score less, and rounds * steps passes of the poison.
    Source: the procedure of Tramer, Carlini, Brendel, Madry 2020 (evaluate against an attack that knows the defense),
        for training data.

    Example:
        >>> from aidefend.attacks import Patch
        >>> x = torch.rand(60, 1, 6, 6, generator=torch.Generator().manual_seed(0))
        >>> y = torch.arange(60) % 3
        >>> train = lambda x, y: lambda rows: rows.flatten(1)[:, -9:-6]  # bright last cells: class 0
        >>> brightness = lambda x, y, model: x.flatten(1).amax(dim=1)
        >>> attack = Evading(Disguised(Patch(size=2).stamp), brightness, train, floor=0.0, rounds=1)
        >>> trials = attack.search((x, y), seed=0)
        >>> trials[-1].suspicion < trials[0].suspicion
        True
    """

    attack: Disguised
    score: Score
    train: Callable[[Tensor, Tensor], Model]
    _: dataclasses.KW_ONLY
    floor: float = 0.7
    tactics: tuple[Mapping[str, Any], ...] | None = None
    rounds: int = 2
    push: Threat | None = None
    penalty: Callable[[Any, Tensor, Tensor], Tensor] = feature_gap
    steps: int = 30

    def __post_init__(self) -> None:
        check_kind(self.attack, Disguised, "attack", "Pass for example Disguised(Patch().stamp)")
        check_callable(self.score, "score", "Pass a function (x, y, model) -> (N,)")
        check_callable(self.train, "train", "Pass a function (x, y) -> model")
        check_callable(self.penalty, "penalty", "Pass a function (model, poison, class rows) -> scalar")
        check_number(self.floor, "floor", 0, 1)
        check_int(self.rounds, "rounds")
        check_int(self.steps, "steps")
        if self.push is not None:
            check_threat(self.push)
        fields = {field.name for field in dataclasses.fields(Disguised)} - {"target"}
        known = isinstance(self._tactics, tuple) and all(isinstance(t, Mapping) for t in self._tactics)
        if not known or any(not set(tactic) <= fields for tactic in self._tactics):
            raise refuse(
                "a tuple of mappings from fields of Disguised", "tactics", self.tactics, 'Pass ({"mix": 0.5},)'
            )
        for tactic in self._tactics:
            dataclasses.replace(self.attack, **tactic)  # values are checked before the first training

    @property
    def _tactics(self) -> tuple[Mapping[str, Any], ...]:
        return TACTICS if self.tactics is None else self.tactics

    def poison(self, dataset: Any, seed: int = 0) -> Poisoned:
        """The poison of the last accepted trial, its ground truth, and the trigger for testing."""
        return self.search(dataset, seed)[-1].poisoned

    def search(self, dataset: Any, seed: int = 0) -> list[Trial]:
        """The plain attack, then every accepted trial: suspicion falls from one to the next."""
        clean = self._trained(*_in_memory(dataset, self.attack))
        accepted = [self._tried(dataset, {}, seed, clean)]
        for _ in range(self.rounds):
            last = accepted[-1][0]
            tries = [self._tried(dataset, {**last.changes, **tactic}, seed, clean) for tactic in self._tactics]
            better = [tried for tried in tries if self._improves(tried[0], last)]
            if not better:
                break
            accepted.append(min(better, key=lambda tried: tried[0].suspicion))
        trials = [trial for trial, _ in accepted]
        return trials if self.push is None else self._pushed(dataset, trials, accepted[-1][1], clean)

    def _improves(self, trial: Trial, last: Trial) -> bool:
        return trial.gained >= self.floor and trial.suspicion < last.suspicion

    def _trained(self, x: Tensor, y: Tensor) -> Model:
        return check_callable(self.train(x, y), "train(x, y)", "Return a model from x to logits")

    def _tried(self, dataset: Any, changes: Mapping[str, Any], seed: int, clean: Model) -> tuple[Trial, Model]:
        poisoned = dataclasses.replace(self.attack, **changes).poison(dataset, seed)
        return self._judged(poisoned, changes, clean)

    def _judged(self, poisoned: Poisoned, changes: Mapping[str, Any], clean: Model) -> tuple[Trial, Model]:
        """Train on the poisoned data, ask the detector, try the trigger."""
        x, y = _in_memory(poisoned.dataset, self.attack)
        model = self._trained(x, y)
        scores = self.score(x, y, model)
        if not isinstance(scores, Tensor) or scores.shape != (len(x),):
            raise refuse(f"score(x, y, model) of shape ({len(x)},)", "score", scores, "Return one number for each row")
        suspicion = _area(scores.detach().double().cpu(), poisoned.is_poison)
        marked = self._marked(x, y, poisoned)
        success, without = (self._success(net, marked) for net in (model, clean))
        return Trial(changes, suspicion, success, poisoned, without), model

    def _marked(self, x: Tensor, y: Tensor, poisoned: Poisoned) -> Tensor:
        """Rows of other classes, untouched by the attack, with the trigger of the test."""
        left = (y != self.attack.target) & ~poisoned.is_poison
        if poisoned.is_cover is not None:
            left = left & ~poisoned.is_cover
        if self.attack.source_class is not None:
            left = left & (y == self.attack.source_class)
        rows = left.nonzero().flatten()[:_TRIALS]
        with torch.no_grad():
            return poisoned.trigger(x[rows]) if len(rows) else x[:0]

    def _success(self, model: Model, marked: Tensor) -> float:
        """Share of the rows that the model puts into the target class."""
        if not len(marked):
            return 0.0
        with preserve(model), torch.no_grad():
            answers = in_batches(lambda part: called(model, part, "train(x, y)").argmax(dim=1), marked, 512)
        return float((answers.cpu() == self.attack.target).double().mean())

    def _pushed(self, dataset: Any, accepted: list[Trial], model: Model, clean_model: Model) -> list[Trial]:
        """Rounds of gradient steps on the pixels of the best disguise, each on a model trained on the last one."""
        last = accepted[-1]
        base, clean, labels = read_rows(dataset, Threat("linf", 0.0, bounds=self.attack.bounds))
        x, y = _in_memory(last.poisoned.dataset, self.attack)
        origin, point, poison = x[last.poisoned.is_poison], x[last.poisoned.is_poison], last.poisoned.is_poison
        for _ in range(self.rounds if len(origin) else 0):
            ours = clean[(labels == self.attack.target) & ~poison]
            point = pushed(model, self.penalty, point, origin, ours, self._push, self.steps)
            x[poison] = point
            changed = poison if last.poisoned.is_cover is None else poison | last.poisoned.is_cover
            rows = changed.nonzero().flatten()
            held = plant_inputs(base, len(y), rows, x[rows], y[rows], self.attack.target, last.poisoned.stamp)
            held = dataclasses.replace(held, is_poison=poison, is_cover=last.poisoned.is_cover)
            trial, model = self._judged(held, {**last.changes, "push": self.push}, clean_model)
            if self._improves(trial, accepted[-1]):
                accepted.append(trial)
        return accepted

    @property
    def _push(self) -> Threat:
        return check_threat(self.push)


def _in_memory(dataset: Any, attack: Disguised) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a data set."""
    low, high = attack.bounds
    _, x, y = read_rows(dataset, Threat("linf", 0.0, bounds=(low, high)))
    return x.clone(), y


def _area(scores: Tensor, is_poison: Tensor) -> float:
    """Chance that a poisoned row scores above a clean one; ties count half, no opinion counts as the lowest score."""
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    poison, clean = scores[is_poison], scores[~is_poison].sort().values
    if not len(poison) or not len(clean):
        return 0.5
    below = torch.searchsorted(clean, poison).double()
    at_most = torch.searchsorted(clean, poison, right=True).double()
    return float(((below + at_most) / 2 / len(clean)).mean())
