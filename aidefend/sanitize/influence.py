"""Influence: which rows pull the last layer away from what trusted rows need."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aidefend._core.checks import check_tensor, refuse
from aidefend.sanitize.block import check_kin, read_block


class Influence:
    """How much a step on the row would raise the loss of trusted rows, through the last layer, at one checkpoint.

    The gradient of the cross-entropy in the last layer is (p - y) h: no backward pass is needed, only "logits" (N, K)
    and "features" (N, d), the input of the layer. For several checkpoints of a training make one object for each, with
    the trusted rows' block of that checkpoint, and add the scores.

    Guarantee: none. The gradient in the last layer sees nothing of what lower layers learn; poison with gradients along
        those of trusted rows (gradient matching) is what this score is blind to.
    Args:
        trusted: A block {"ids", "features", "labels", "logits"} of trusted rows. None: the score is the length of the
            row's own gradient (self-influence), high for rows that the model resists.
    A score is the negative inner product with the gradient of the trusted class that the row harms most, in units of
    the mean length of the gradients seen in `partial_fit`. Rows with NaN or infinity score NaN, and all rows do before
    `partial_fit`, or where a row's class was never seen.
    Cost: O(N d K) operations; K d numbers of memory a trusted class.
    Source: Pruthi, Liu, Kale, Sundararajan 2020 (TracIn, last layer). Differs: the mean gradient of each trusted class
        in place of single trusted rows.

    Example:
        >>> features, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1, 1])
        >>> block = {"ids": tuple("abc"), "features": features, "labels": labels, "logits": torch.zeros(3, 2)}
        >>> trusted = {name: values[:2] for name, values in block.items()}
        >>> Influence(trusted).partial_fit(block).score(block).argmax().item()
        2
    """

    def __init__(self, trusted: Mapping[str, Any] | None = None) -> None:
        self.gradients: Tensor | None = None
        if trusted is not None:
            features, residuals, labels, usable = _parts(trusted)
            if not bool(usable.any()):
                raise refuse("trusted rows with finite features", "trusted", "none", "Pass some trusted rows")
            classes = labels[usable].unique().tolist()
            self.gradients = torch.stack([_mean_gradient(features, residuals, usable & (labels == c)) for c in classes])
        self.length, self.count, self.classes = 0.0, 0, frozenset[int]()

    def partial_fit(self, block: Mapping[str, Any]) -> "Influence":
        """Add the rows of a block to what is usual; returns self."""
        features, residuals, labels, usable = self._read(block)
        lengths = features[usable].norm(dim=1) * residuals[usable].norm(dim=1)
        self.length, self.count = self.length + float(lengths.sum()), self.count + len(lengths)
        self.classes |= frozenset(labels[usable].tolist())
        return self

    def merge(self, other: "Influence") -> "Influence":
        """A new detector that has seen what both have seen."""
        check_kin(self, other, ())
        mine, theirs = self.gradients, other.gradients
        if (mine is None) != (theirs is None) or (
            mine is not None and theirs is not None and not torch.equal(mine, theirs)
        ):
            raise refuse("a detector with the same trusted rows", "other", "other ones", "Pass the same trusted block")
        total = Influence()
        total.gradients, total.length = mine, self.length + other.length
        total.count, total.classes = self.count + other.count, self.classes | other.classes
        return total

    def score(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) float64, up = suspicious."""
        features, residuals, labels, usable = self._read(block)
        if not self.count:
            return torch.full((len(labels),), torch.nan, dtype=torch.float64)
        if self.gradients is None:
            harm = features.norm(dim=1) * residuals.norm(dim=1)
        else:
            pulls = torch.einsum("nk,ckd,nd->nc", residuals, self.gradients, features)
            harm = -pulls.min(dim=1).values if len(labels) else pulls.sum(dim=1)
        known = usable & torch.isin(labels, torch.tensor(sorted(self.classes)))
        unit = self.length / self.count
        return torch.where(known, harm / unit if unit > 0 else torch.zeros_like(harm), torch.nan)

    def _read(self, block: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = _parts(block)
        if self.gradients is not None and self.gradients.shape[1:] != (parts[1].shape[1], parts[0].shape[1]):
            found = f"{parts[0].shape[1]} features, {parts[1].shape[1]} logits"
            size = f"{self.gradients.shape[2]} features and {self.gradients.shape[1]} logits, as the trusted rows"
            raise refuse(size, "block", found, "Pass blocks of one model")
        return parts


def _parts(block: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (N, d), p - y (N, K) and labels (N,), zero in rows that are not finite; and which rows are."""
    rows = read_block(block)
    if "logits" not in block:
        cure = "Add what the model says of each row, (N, K)"
        raise refuse('a block with the key "logits"', "block", sorted(map(str, block)), cure)
    logits = check_tensor(block["logits"], "logits", ndim=2, floating=True, finite=False, rows=len(rows.ids))
    logits = logits.detach().cpu().double()
    if len(rows.labels) and int(rows.labels.max()) >= logits.shape[1]:
        cure = "Give the logits one column for each label"
        raise refuse(f"labels below {logits.shape[1]}", "labels", int(rows.labels.max()), cure)
    usable = rows.usable & torch.isfinite(logits).all(dim=1)
    wanted = torch.nn.functional.one_hot(rows.labels, logits.shape[1])
    residuals = torch.softmax(logits.nan_to_num(0.0, 0.0, 0.0), dim=1) - wanted
    features = torch.where(usable[:, None], rows.features, 0.0)
    return features, torch.where(usable[:, None], residuals, 0.0), rows.labels, usable


def _mean_gradient(features: Tensor, residuals: Tensor, rows: Tensor) -> Tensor:
    gradient: Tensor = residuals[rows].T @ features[rows] / int(rows.sum())
    return gradient
