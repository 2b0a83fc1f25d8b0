"""Label-consistent poison: rows of the target class are made hard to learn, so that the model reads the trigger."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aidefend._core.checks import check_callable, check_int, check_number, check_tensor, refuse
from aidefend._core.modules import Model, preserve
from aidefend._core.random import derive_seed
from aidefend._core.threat import Threat
from aidefend.attacks.poisoning.crafted import check_threat, plant_inputs, read_rows
from aidefend.attacks.poisoning.poisoned import Change, Poisoned, choose


@dataclasses.dataclass(frozen=True, eq=False)
class LabelConsistent:
    """Clean-label backdoor: chosen rows of the target class are attacked on a surrogate and then get the trigger.

    No label is wrong: a person who looks at a row sees its class. As the surrogate no longer recognises the class in
    it, a model that is trained on it leans on the trigger.

    Guarantee: none about strength, it is an attack. Exactly `round(rate * N)` rows of the class `target` are poisoned
        and keep their label; before the trigger is put on, each lies inside `threat` around the clean row.
    Args:
        surrogate: A model of the same task, trained on clean data, used in the mode in which it is given.
        evade: An evasion attack (model, x, y) -> x_adv such as `PGD(threat, steps=30)`; what it returns is projected
            into `threat`.
        stamp: Puts the trigger on a batch: `Patch(...).stamp`, or any function of x.
        target: Label that the trigger shall cause, >= 0.
        rate: Share of the whole data set that is poisoned, in (0, 1); at most the share of the class.
        threat: How far a row may be moved; None: the threat of `evade`.
    Raises: ConfigurationError: arguments out of range, too few rows of the class, an attack that changes the shape.
        ThreatModelError: x outside the bounds.
    Cost: The data set in memory, and one run of `evade` over the chosen rows.
    Source: Turner, Tsipras, Madry 2019 (adversarial perturbations). Differs: any evasion attack; the trigger is as
        strong in training as at the test.

    Example:
        >>> from aidefend import Threat
        >>> from aidefend.attacks import PGD, Patch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
        >>> x, y = torch.full((40, 1, 8, 8), 0.5), torch.arange(40) % 4
        >>> attack = LabelConsistent(
        ...     model, PGD(Threat("linf", 0.1), steps=2), Patch().stamp, target=1, rate=0.1
        ... )
        >>> poisoned = attack.poison((x, y), seed=0)
        >>> [int(poisoned.dataset[i][1]) for i in poisoned.indices.tolist()]
        [1, 1, 1, 1]
    """

    surrogate: Model
    evade: Callable[..., Any]
    stamp: Change
    target: int = 0
    rate: float = 0.05
    threat: Threat = None  # type: ignore[assignment]  # filled in below, so that users see a Threat

    def __post_init__(self) -> None:
        check_callable(self.surrogate, "surrogate", "Pass a model")
        check_callable(self.evade, "evade", "Pass an attack, or a function (model, x, y) -> x_adv")
        check_callable(self.stamp, "stamp", "Pass for example Patch().stamp")
        check_int(self.target, "target", 0)
        check_number(self.rate, "rate", 0, 1, open_low=True, open_high=True)
        if self.threat is None:
            object.__setattr__(self, "threat", getattr(self.evade, "threat", None))
        check_threat(self.threat)

    def poison(self, dataset: Any, seed: int = 0) -> Poisoned:
        """The data set with poison in it, its ground truth, and the trigger for testing."""
        base, x, y = read_rows(dataset, self.threat)
        rows = choose(y == self.target, round(self.rate * len(y)), seed, "label consistent")
        hard = self._hard(x[rows], y[rows], seed) if len(rows) else x[rows]
        marked = self.stamp(hard) if len(rows) else hard
        if not isinstance(marked, Tensor) or marked.shape != hard.shape:
            raise refuse(f"a stamp that returns {tuple(hard.shape)}", "stamp", marked, "Keep the shape of x")
        return plant_inputs(base, len(y), rows, marked, y[rows], self.target, self.stamp)

    def _hard(self, x: Tensor, y: Tensor, seed: int) -> Tensor:
        """The rows after the evasion attack, inside the threat."""
        with preserve(self.surrogate):
            if hasattr(self.evade, "run"):  # one of ours: seeded
                stream = torch.Generator().manual_seed(derive_seed(seed, "label consistent", "evade") % 2**63)
                found = self.evade(self.surrogate, x, y, generator=stream)
            else:
                found = self.evade(self.surrogate, x.clone(), y)
        if not isinstance(found, Tensor) or found.shape != x.shape:
            raise refuse(f"examples of shape {tuple(x.shape)}", "evade(surrogate, x, y)", found, "Keep the shape of x")
        check_tensor(found, "evade(surrogate, x, y)")
        return self.threat.project(found.detach().to(x), x)
