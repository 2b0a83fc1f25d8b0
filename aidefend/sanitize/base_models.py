"""Base models of a partition ensemble: each is a function of its own rows and its own number, bit for bit."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.functional import cross_entropy

from aidefend._core.checks import check_kind, check_tensor, refuse
from aidefend._core.random import derive_seed, own_stream

MakeModel = Callable[[], nn.Module]


class Bases(Protocol):
    """Fitted base models."""

    def logits(self, x: Tensor) -> Iterator[Tensor]:
        """(N, K) of each model in turn, for inputs (N, ...)."""


class RidgeBases:
    """Ridge regression of class indicators on centred rows of unit length, in closed form.

    Args:
        classes: K.
        ridge: Strength, relative to rows of length one.
    Source: representer theorem; the n x n system of a part with n rows is solved, whatever the number of features.
    """

    def __init__(self, classes: int, ridge: float) -> None:
        self.classes, self.ridge = classes, ridge
        self._fitted: list[tuple[Tensor, Tensor] | None] = []

    def add(self, x: Tensor, y: Tensor, number: int) -> None:
        """Fit the next model on rows (n, d) and labels; one without rows answers alike for all classes."""
        if not len(x):
            self._fitted.append(None)
            return
        rows = _unit_rows(x)
        wanted = torch.nn.functional.one_hot(y, self.classes).double()
        shares = wanted.mean(dim=0)
        system = rows @ rows.T + self.ridge * torch.eye(len(rows), dtype=torch.float64)
        weights = rows.T @ torch.linalg.solve(system, wanted - shares)
        self._fitted.append((weights.float(), shares.float()))

    def logits(self, x: Tensor) -> Iterator[Tensor]:
        """(N, K) of each model."""
        rows = _unit_rows(x).float()
        for fitted in self._fitted:
            yield rows.new_zeros(len(rows), self.classes) if fitted is None else rows @ fitted[0] + fitted[1]


def _unit_rows(x: Tensor) -> Tensor:
    rows = x.flatten(1).double()
    rows = rows - rows.mean(dim=1, keepdim=True)
    length: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / length.clamp(min=1e-12)


class NetworkBases:
    """Networks of one architecture, each trained on its own rows with its own scale, order and first weights.

    They answer in batches of models, but are trained one by one: parts differ in size, so which models could train
    together, and with them the order in which a batched product sums, would follow from rows of other parts; a model
    has to be a function of its own rows to the last bit.

    Args:
        make_model: Makes a module from x (n, ...) to logits (n, K).
        classes: K.
        steps: Steps of Adam for each model, on batches of at most 64 rows.
        rate: Learning rate.
        seed: Of first weights and orders, with the model's number.
    """

    def __init__(self, make_model: MakeModel, classes: int, steps: int, rate: float, seed: int) -> None:
        self.make_model, self.classes, self.steps, self.rate, self.seed = make_model, classes, steps, rate, seed
        self._models: list[nn.Module] = []
        self._scales: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, y: Tensor, number: int) -> None:
        """Train the next model; one without rows keeps its first weights."""
        model, stream = self._made(number), torch.Generator().manual_seed(derive_seed(self.seed, "order", number))
        rows = x.float()
        mean = rows.mean() if len(rows) else torch.zeros(())
        spread = rows.std(correction=0).clamp(min=1e-6) if len(rows) else torch.ones(())
        optimizer = torch.optim.Adam(model.parameters(), lr=self.rate)
        with torch.enable_grad(), own_stream(derive_seed(self.seed, "training", number)):
            for _ in range(self.steps if len(rows) else 0):
                batch = torch.randperm(len(rows), generator=stream)[:64]
                optimizer.zero_grad()
                cross_entropy(model((rows[batch] - mean) / spread), y[batch]).backward()
                optimizer.step()
        self._models.append(model.requires_grad_(False).eval())
        self._scales.append((mean, spread))

    def _made(self, number: int) -> nn.Module:
        with own_stream(derive_seed(self.seed, "weights", number)):
            return check_kind(self.make_model(), nn.Module, "make_model", "Return a module").train()

    def logits(self, x: Tensor, together: int = 64) -> Iterator[Tensor]:
        """(N, K) of each model; up to 64 models answer in one batched pass (torch.func) where their layers allow it."""
        for start in range(0, len(self._models), together):
            models, scales = self._models[start : start + together], self._scales[start : start + together]
            yield from self._answers(models, scales, x.float())

    def _answers(self, models: list[nn.Module], scales: list[tuple[Tensor, Tensor]], x: Tensor) -> Iterator[Tensor]:
        means, spreads = (torch.stack(list(part)) for part in zip(*scales, strict=True))
        with torch.no_grad():
            parameters, buffers = stack_module_state(models)
            skeleton = models[0]

            def one(weights: dict[str, Tensor], state: dict[str, Tensor], mean: Tensor, spread: Tensor) -> Tensor:
                found: Tensor = functional_call(skeleton, (weights, state), ((x - mean) / spread,))
                return found

            try:
                answers = torch.vmap(one)(parameters, buffers, means, spreads)
            except RuntimeError:  # a layer that has no batched form
                answers = torch.stack([model((x - m) / s) for model, (m, s) in zip(models, scales, strict=True)])
        for found in answers:
            logits = check_tensor(found, "make_model()(x)", ndim=2, floating=True, finite=False, rows=len(x))
            if logits.shape[1] != self.classes:
                cure = "Give the networks one output for each class, or name the number in classes="
                raise refuse(f"{self.classes} outputs", "make_model()(x)", logits, cure)
            yield logits.nan_to_num()  # a part whose training went astray has a vote like any other
