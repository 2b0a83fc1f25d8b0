"""The set-up of a robustness evaluation: model, rows and seeds, and the three things one can do with them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from aidefend import __version__
from aidefend._core.batches import gather
from aidefend._core.checks import check_int, check_labels, refuse
from aidefend._core.modules import Model, device_of
from aidefend._core.progress import progress
from aidefend._core.random import derive_seed
from aidefend._core.storage import canonical_json
from aidefend._core.threat import Threat
from aidefend.attacks.evasion import AttackResult
from aidefend.attacks.evasion.access import Access, quiet_access
from aidefend.attacks.evasion.goals import Goal
from aidefend.attacks.evasion.losses import Loss, misclassified
from aidefend.attacks.evasion.streams import RowStreams
from aidefend.audit.resuming import FinishedParts

_REPEATS = 10
_FIELDS = [field.name for field in dataclasses.fields(AttackResult)]


class Attack(Protocol):
    """What a stage needs of an attack."""

    def run(
        self, model: Model, x: Tensor, y: Tensor, *, goal: Goal, logits: Tensor | None, row_seeds: Tensor | None
    ) -> AttackResult:
        """Attack with a goal; a row's random numbers depend on its seed alone."""
        ...


MakeAttack = Callable[[Threat], Attack]


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """Model and labelled rows under one threat. Every random number belongs to a row, whatever order and batches."""

    model: Model
    threat: Threat
    ids: tuple[str, ...]
    x: Tensor
    y: Tensor
    logits: Tensor
    seed: int
    batch_size: int
    parts: FinishedParts = dataclasses.field(default_factory=FinishedParts)
    random: bool = False

    @classmethod
    def of(cls, model: Model, data: object, threat: Threat, seed: int, batch_size: int) -> "Bench":
        """Check the data, and run the clean pass."""
        check_int(seed, "seed", 0)
        check_int(batch_size, "batch_size")
        if not isinstance(threat, Threat):
            raise refuse("a Threat", "threat", threat, 'Pass Threat("linf", eps) first')
        ids, x, y, _ = gather(data)
        if y is None:
            raise refuse("data with labels", "data", "inputs alone", "Pass (x, y) or a loader of (x, y) batches")
        threat.check(x, "data")
        check_labels(y, len(x), name="labels")
        bench = cls(model, threat, ids, x, y, x, seed, batch_size)
        logits = bench.outputs(x)
        check_labels(y, len(x), logits.shape[1], name="labels")
        return dataclasses.replace(bench, logits=logits)

    def resuming(self, folder: Any, budget: str) -> "Bench":
        """The same bench with a folder of finished parts."""
        setting = [__version__, budget, self.seed, self.threat.to_dict()]
        parts = FinishedParts.of(folder, model=self.model, logits=self.logits, setting=setting)
        return dataclasses.replace(self, parts=parts)

    @property
    def correct(self) -> Tensor:
        """Rows that are right without an attack, (N,) bool."""
        return ~misclassified(self.logits, self.y)

    def outputs(self, x: Tensor, batch_size: int | None = None) -> Tensor:
        """Logits of any points, in batches, on the device of the data."""
        return self.passes(x, 1, batch_size)[0]

    def passes(self, x: Tensor, count: int, batch_size: int | None = None) -> list[Tensor]:
        """The logits of `count` passes in a row: the random streams go on between them, as they do in service."""
        device = device_of(self.model, x.device)
        with quiet_access(self.model):
            access = Access(self.model, "margin", targeted=False, is_success=None)
            parts = x.split(batch_size or self.batch_size)
            return [torch.cat([access.outputs(part.to(device)).to(x.device) for part in parts]) for _ in range(count)]

    def wrong(self, points: Tensor, rows: Tensor) -> Tensor:
        """Which of these points for x[rows] are misclassified."""
        return misclassified(self.outputs(points), self.y[rows])

    def gradients(self, rows: Tensor, loss: Loss) -> Tensor:
        """Input gradients of a loss at x[rows]."""
        device = device_of(self.model, self.x.device)
        parts = []
        with quiet_access(self.model):
            access = Access(self.model, loss, targeted=False, is_success=None)
            for part in rows.split(self.batch_size):
                _, grad = access.gradient(self.x[part].to(device), self.y[part].to(device))
                parts.append(grad.to(self.x.device))
        return torch.cat(parts)

    def attack(
        self,
        name: str,
        make: MakeAttack,
        rows: Tensor,
        threat: Threat | None = None,
        goal: Goal = "first_success",
        begin_at: Tensor | None = None,
    ) -> AttackResult:
        """A goal on x[rows]; `name` selects the random numbers. Successes outside the threat do not count.

        Where the outputs are random, a success counts only if it repeats in most of ten fresh passes. `begin_at`: a
        point for every row of x, for attacks that can begin at points.
        """
        allowed = threat or self.threat
        parts = [
            self._attack_part(name, make, part, allowed, goal, begin_at)
            for part in progress(rows.split(self.batch_size), f"attack: {name}")
        ]
        return AttackResult(*(torch.cat([getattr(part, field) for part in parts]) for field in _FIELDS))

    def _attack_part(
        self, name: str, make: MakeAttack, rows: Tensor, threat: Threat, goal: Goal, begin_at: Tensor | None
    ) -> AttackResult:
        local = threat.rows(self.x, rows)
        key = f"{name} {goal} {canonical_json(local.to_dict())}"

        def compute() -> dict[str, Tensor]:
            return vars(self._attack_now(name, make(local), rows, local, goal, begin_at))

        found = self.parts.get(key, [self.ids[i] for i in rows.tolist()], compute)
        return AttackResult(**{field: found[field].to(self.x.device) for field in _FIELDS})

    def _attack_now(
        self, name: str, attack: Attack, rows: Tensor, threat: Threat, goal: Goal, begin_at: Tensor | None
    ) -> AttackResult:
        device = device_of(self.model, self.x.device)
        x, y, logits = (part[rows].to(device) for part in (self.x, self.y, self.logits))
        seeds = self.row_seeds(name, rows)
        start: dict[str, Any] = {} if begin_at is None else {"begin_at": begin_at[rows].to(device)}
        result = attack.run(self.model, x, y, goal=goal, logits=logits, row_seeds=seeds, **start)
        success = result.success & threat.contains(result.x_adv, x)
        return dataclasses.replace(result, success=success & self._repeats(result.x_adv, rows).to(device))

    def _repeats(self, points: Tensor, rows: Tensor) -> Tensor:
        """Which of these points are misclassified in most of some fresh passes; all, where nothing is random."""
        if not self.random or len(rows) == 0:
            return torch.ones(len(rows), dtype=torch.bool)
        passes = [misclassified(outputs, self.y[rows].to(outputs.device)) for outputs in self.passes(points, _REPEATS)]
        return torch.stack(passes).float().mean(dim=0) > 0.5

    def noise(self, name: str, rows: Tensor, draws: int) -> tuple[Tensor, Tensor]:
        """Random allowed points, half inside and half on the surface of the threat: (points, broken) for x[rows]."""
        x, threat = self.x[rows], self.threat.rows(self.x, rows)
        streams = RowStreams.of(self.row_seeds(name, rows))
        found, broken = x.clone(), torch.zeros(len(rows), dtype=torch.bool, device=x.device)
        for draw in range(draws):
            points = streams.start(threat, x)
            if draw % 2:
                points = threat.project(x + 1e3 * (points - x), x)
            hit = self.wrong(points, rows) & threat.contains(points, x) & ~broken
            found[hit] = points[hit]
            broken |= hit
        return found, broken & self._repeats(found, rows).to(broken.device)

    def row_seeds(self, name: str, rows: Tensor) -> Tensor:
        """Seeds of these rows for one named part of the work."""
        return torch.tensor([derive_seed(self.seed, name, self.ids[i]) for i in rows.tolist()], dtype=torch.int64)

    def subset(self, rows: Tensor, count: int) -> Tensor:
        """At most `count` of these rows, chosen by their seeds: the same ones in any order of the data."""
        if len(rows) <= count:
            return rows
        return rows[self.row_seeds("subset", rows).argsort()[:count].to(rows.device)].sort().values
