"""An ensemble that poison cannot outvote: base models on parts of the data, with a certificate for each prediction."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aidefend._core.checks import (
    check_callable,
    check_choice,
    check_int,
    check_labels,
    check_number,
    check_tensor,
    refuse,
)
from aidefend._core.random import derive_seed
from aidefend.sanitize.base_models import Bases, MakeModel, NetworkBases, RidgeBases
from aidefend.sanitize.block import LARGEST_CLASS
from aidefend.sanitize.election import Certificate, Method, majority, run_off, spread_majority
from aidefend.sanitize.features import finite_rows, read_samples


class PartitionEnsemble:
    """Base models on disjoint parts of the data, which vote; a row that is put in or taken out reaches one part only.

    Guarantee: for every input, no training set that differs from the fitted one by at most `radius` rows, put in or
        taken out in any mixture and of any content and label, leads to another prediction: a changed label or a
        changed input counts twice, as one row out and one in. It holds for an adversary who knows everything here, the
        seed included. It holds because a base model is a function of the set of its rows alone: rows find their part
        by a hash of their bytes, stand in the order of their hashes, and are scaled by their own part; first weights
        and orders come from the seed and the number of the part. It does not hold if `features` was learnt from the
        same data, if preparation before this class depends on other rows (mean of the data set, removal of
        duplicates), if rows hold NaN (they are left out, row by row, which is safe) or across machines that round
        differently.
    Args:
        make_model: Makes a fresh module from x to logits (n, K); None: ridge regression in closed form, which suits
            parts of few rows.
        partitions: Number k of parts. More parts: larger radii, weaker base models.
        method: "dpa": every model on its own part, most votes win. "finite-aggregation": k x `spread` smaller parts,
            each model on `spread` of them, k x `spread` models. "run-off": parts as in "dpa", and the two classes with
            most votes meet in a second round, in which each model says which of them it prefers.
        features: Fixed function from a batch of inputs to what the base models see, (n, ...); None: the inputs.
        classes: Number of classes, a public number. None: the largest label + 1; the guarantee then speaks of rows with
            labels among these only.
        spread: Degree d of "finite-aggregation".
        ridge: Strength of the ridge regression, rows being of length one.
        steps, rate: Steps and learning rate of the networks.
        seed: Public. Of parts, first weights and orders.
    Cost: `fit` is one training on all the data, shared out (`spread` times that for "finite-aggregation"); `certify` is
        one forward pass of each base model.
    Source: Levine, Feizi 2021 (DPA); Wang, Levine, Feizi 2022 (Finite Aggregation); Rezaei, Banihashem, Chegini, Feizi
        2023 (Run-Off Election).

    Example:
        >>> stream = torch.Generator().manual_seed(0)
        >>> y = torch.arange(600) % 2
        >>> x = torch.randn(600, 5, generator=stream) + 6.0 * torch.nn.functional.one_hot(y, 5)
        >>> ensemble = PartitionEnsemble(partitions=30).fit((x, y))
        >>> found = ensemble.certify(x[:2])
        >>> found.prediction.tolist(), bool((found.radius >= 10).all())
        ([0, 1], True)
    """

    def __init__(
        self,
        make_model: MakeModel | None = None,
        partitions: int = 50,
        method: Method = "dpa",
        *,
        features: Callable[[Tensor], Tensor] | None = None,
        classes: int | None = None,
        spread: int = 4,
        ridge: float = 0.1,
        steps: int = 200,
        rate: float = 1e-3,
        seed: int = 0,
    ) -> None:
        cure = "Pass a function without arguments that returns a fresh module"
        self.make_model = None if make_model is None else check_callable(make_model, "make_model", cure)
        self.partitions = check_int(partitions, "partitions")
        self.method: Method = check_choice(method, ("dpa", "finite-aggregation", "run-off"), "method")
        cure = "Pass a function from a batch of inputs to a batch of features"
        self.features = None if features is None else check_callable(features, "features", cure)
        self.classes = None if classes is None else check_int(classes, "classes", 2)
        self.spread = check_int(spread, "spread", 1)
        self.ridge = check_number(ridge, "ridge", 0.0, open_low=True)
        self.steps, self.rate = check_int(steps, "steps"), check_number(rate, "rate", 0.0, open_low=True)
        self.seed = check_int(seed, "seed", 0)
        self._bases: Bases | None = None
        self._classes, self._shape = 0, tuple[int, ...]()

    @property
    def models(self) -> int:
        """Number of base models."""
        return self.partitions * (self.spread if self.method == "finite-aggregation" else 1)

    def fit(self, dataset: Any) -> "PartitionEnsemble":
        """Train the base models; returns self.

        Args:
            dataset: Map-style data set of (x, y) samples, tensors (x, y), or a DataLoader (its data set).
        Raises: ConfigurationError: no labels, a label outside `classes`, features with other numbers of rows.
        """
        samples = read_samples(dataset)
        usable = finite_rows(samples.x)
        x, y = samples.x[usable], check_labels(samples.y, len(usable), name="labels")[usable]
        if self.classes is None and len(y) and int(y.max()) > LARGEST_CLASS:
            cure = "Number the classes from 0 on, or pass classes="
            raise refuse(f"labels up to {LARGEST_CLASS}", "dataset", f"label {int(y.max())}", cure)
        classes = self.classes or max(2, int(y.max()) + 1 if len(y) else 2)
        if len(y) and int(y.max()) >= classes:
            raise refuse(f"labels below {classes}", "dataset", f"label {int(y.max())}", "Raise classes=")
        names = _digests(x, self.seed)
        order = sorted(range(len(names)), key=lambda row: (names[row], int(y[row])))
        seen = self._seen(x)
        parts = self._parts(names, order)
        bases = (
            RidgeBases(classes, self.ridge)
            if self.make_model is None
            else NetworkBases(self.make_model, classes, self.steps, self.rate, self.seed)
        )
        for number, rows in enumerate(parts):
            bases.add(seen[rows], y[rows], number)
        self._bases, self._classes, self._shape = bases, classes, tuple(x.shape[1:])
        return self

    def certify(self, x: Any, batch_size: int = 1024) -> Certificate:
        """Predictions (N,), radii (N,) and votes (N, K) for inputs (N, ...).

        Raises: ConfigurationError: not fitted, x of another shape, or with NaN or infinity.
        """
        if self._bases is None:
            raise refuse("a fitted ensemble", "certify", "no base models", "Call fit first")
        check_int(batch_size, "batch_size")
        inputs = check_tensor(x, "x").detach().cpu()
        if inputs.ndim < 2 or tuple(inputs.shape[1:]) != self._shape:
            raise refuse(f"x of shape (N, {self._shape}), as fitted", "x", inputs, "Pass a batch of such inputs")
        parts = [self._elected(self._bases, part) for part in inputs.split(batch_size)]
        prediction, radius, votes = (torch.cat([part[i] for part in parts]) for i in range(3))
        return Certificate(prediction, radius, votes)

    def _elected(self, bases: Bases, x: Tensor) -> Certificate:
        seen = self._seen(x)
        if self.method == "run-off":
            return run_off(torch.stack(list(bases.logits(seen))))
        choices = torch.stack([found.argmax(dim=1) for found in bases.logits(seen)])
        if self.method == "dpa":
            return majority(choices, self._classes)
        return spread_majority(choices, self._classes, self._touched())

    def _parts(self, names: list[bytes], order: list[int]) -> list[list[int]]:
        """Row numbers of each base model, in the order of their content."""
        small: list[list[int]] = [[] for _ in range(self.models)]
        for row in order:
            small[int.from_bytes(names[row], "big") % self.models].append(row)
        if self.method != "finite-aggregation":
            return small
        place = {row: at for at, row in enumerate(order)}
        seen_by: list[list[int]] = [[] for _ in range(self.models)]
        for part, models in enumerate(self._touched().tolist()):
            for model in models:
                seen_by[model] += small[part]
        return [sorted(rows, key=place.__getitem__) for rows in seen_by]

    def _touched(self) -> Tensor:
        """(P, d): which models see each part: shifts by d numbers that the seed draws, so that each model sees d."""
        stream = torch.Generator().manual_seed(derive_seed(self.seed, "spread") % 2**63)
        shifts = torch.randperm(self.models, generator=stream)[: self.spread]
        return (torch.arange(self.models)[:, None] + shifts[None, :]) % self.models

    def _seen(self, x: Tensor) -> Tensor:
        """What base models see; row by row, so that no row shapes another."""
        if self.features is None:
            return x
        parts = [self.features(part) for part in x.split(512)]
        return check_tensor(torch.cat(parts) if parts else x, "features(x)", rows=len(x)).detach()


def _digests(x: Tensor, seed: int) -> list[bytes]:
    """A hash of the bytes of each row, as it is given, with shape and dtype."""
    header = f"{x.dtype}{tuple(x.shape[1:])}".encode()
    salt = seed.to_bytes(8, "big")
    if not x.numel():
        return [hashlib.blake2b(header, digest_size=16, salt=salt).digest()] * len(x)
    rows = x.detach().cpu().contiguous().reshape(len(x), -1).view(torch.uint8).numpy()
    return [hashlib.blake2b(header + row.tobytes(), digest_size=16, salt=salt).digest() for row in rows]
