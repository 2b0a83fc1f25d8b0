"""Which training samples are behind a decision: TracIn on the last layer."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softmax

from aidefend._core.batches import Batch, iterate
from aidefend._core.checks import (
    check_flag,
    check_int,
    check_kind,
    check_labels,
    check_logits,
    check_not_empty,
    check_tensor,
    refuse,
)
from aidefend._core.modules import InputCapture, evaluate, find_module, last_linear, naming_the_model, preserve


@dataclasses.dataclass(frozen=True, eq=False)
class Influence:
    """The most influential training samples of each decision.

    Args:
        helpful: (M, k) row numbers in the training data, most helpful first: a step on them lowers the loss at (x, y).
        helpful_scores: (M, k) their influence, >= 0 in the usual case.
        harmful: (M, k) row numbers, most harmful first.
        harmful_scores: (M, k) their influence, most negative first.
        ids: Content ids of all training rows.
    """

    helpful: Tensor
    helpful_scores: Tensor
    harmful: Tensor
    harmful_scores: Tensor
    ids: tuple[str, ...]


class _Gradients(NamedTuple):
    """Last-layer gradients in their two factors: the gradient of one row is the outer product errors x features."""

    features: Tensor
    errors: Tensor


def influence(
    model: nn.Module,
    train: Any,
    x: Tensor,
    y: Tensor,
    *,
    top: int = 10,
    normalised: bool = False,
    layer: str | nn.Module | None = None,
    batch_size: int = 256,
) -> Influence:
    """Score training samples by the inner product of last-layer gradients with each decision's.

    Guarantee: for a model that is one linear layer, the score times a small learning rate is the exact first-order drop
        of the loss at (x, y) after one plain gradient step on the training sample. For deeper models the layers below
        are left out; it is a hint for triage.
    Args:
        model: Module whose `layer` is an nn.Linear that returns the logits; run in eval mode and left as it was.
        train: Training data with labels, any form of `iterate`; row i keeps its number.
        x: (M, ...) the decisions to explain.
        y: (M,) the class whose loss is asked for: the true label, or the model's own answer.
        normalised: Cosine instead of inner product of the gradients. A model that fits its training data leaves tiny
            gradients on them, and the inner product then ranks the few badly fitted rows first: use the cosine to find
            what a decision resembles, such as the poison behind a trigger.
        top: Number of samples each way, >= 1; cut to the size of the training data.
        layer: Name or module of the output layer; None finds the Linear that runs last.
        batch_size: Rows a pass.
    Returns: Helpful and harmful training samples.
    Raises: ConfigurationError: no labels, empty data, a layer that is not the output layer.
    Cost: One forward pass over both data; M x N x (d + K) multiplications; memory M x batch.
    Source: Pruthi et al. 2020 (TracIn), one checkpoint, last layer; softmax cross-entropy.
    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> train = (torch.eye(2), torch.tensor([0, 1]))
        >>> influence(model, train, torch.eye(2)[:1], torch.tensor([0]), top=1).helpful.item()
        0
    """
    check_int(top, "top")
    check_flag(normalised, "normalised")
    check_kind(model, nn.Module, "model", "Wrap it in an nn.Module whose output layer is an nn.Linear")
    check_tensor(x, "x", floating=True)
    check_not_empty(len(x), "x")
    labels = check_labels(y, len(x))
    output = last_linear(model, x) if layer is None else find_module(model, layer)
    if not isinstance(output, nn.Linear):
        raise refuse("layer to be the nn.Linear that returns the logits", "layer", type(output).__name__, "Name it")
    with preserve(model), torch.no_grad(), InputCapture(output) as capture:
        evaluate(model)
        asked = _gradients(model, capture, x, labels, output)
        asked = _unit(asked) if normalised else asked
        best, worst = _Ranking(top, largest=True), _Ranking(top, largest=False)
        ids: list[str] = []
        for scores, names in _scores(model, capture, iterate(train, batch_size), x, asked, output, normalised):
            best.add(scores, len(ids))
            worst.add(scores, len(ids))
            ids += names
    check_not_empty(len(ids), "train")
    return Influence(best.rows, best.scores, worst.rows, worst.scores, tuple(ids))


def _scores(
    model: nn.Module,
    capture: InputCapture,
    train: Iterator[Batch],
    x: Tensor,
    asked: _Gradients,
    output: nn.Linear,
    normalised: bool,
) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    for batch in train:
        if batch.y is None:
            raise refuse("train with labels", "train", "inputs alone", "Pass (x, y) or a data set of (x, y) samples")
        part = _gradients(model, capture, batch.x.to(x), batch.y, output)
        part = _unit(part) if normalised else part
        yield ((asked.features @ part.features.T) * (asked.errors @ part.errors.T)).cpu(), batch.ids


def _gradients(model: nn.Module, capture: InputCapture, x: Tensor, y: Tensor, output: nn.Linear) -> _Gradients:
    """The two factors; a bias counts as one more feature that is always 1."""
    with naming_the_model(x):
        logits = check_logits(model(x), len(x))
    features = capture.take().double()
    if logits.shape[1] != output.out_features or features.shape[1] != output.in_features:
        raise refuse("layer to be the one that returns the logits", "layer", output, "Pass layer= with its name")
    check_labels(y, len(x), logits.shape[1])
    if cast("Tensor | None", output.bias) is not None:
        features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
    target = one_hot(y.to(logits.device), logits.shape[1])
    return _Gradients(features, softmax(logits.double(), dim=1) - target)


def _unit(gradients: _Gradients) -> _Gradients:
    """Each gradient scaled to length one; a zero gradient stays zero."""
    tiny = torch.finfo(torch.float64).tiny
    lengths = [factor.norm(dim=1, keepdim=True).clamp(min=tiny) for factor in gradients]
    return _Gradients(gradients.features / lengths[0], gradients.errors / lengths[1])


class _Ranking:
    """The k most extreme scores of each row over a stream of blocks; the earlier row wins a tie."""

    def __init__(self, k: int, *, largest: bool) -> None:
        self._k, self._sign = k, 1 if largest else -1
        self.scores = torch.zeros(0)
        self.rows = torch.zeros(0, dtype=torch.int64)

    def add(self, scores: Tensor, offset: int) -> None:
        rows = torch.arange(offset, offset + scores.shape[1]).expand(len(scores), -1)
        if self.scores.numel():
            scores, rows = torch.cat([self.scores, scores], dim=1), torch.cat([self.rows, rows], dim=1)
        order = (self._sign * scores).sort(dim=1, descending=True, stable=True).indices[:, : self._k]
        self.scores, self.rows = scores.gather(1, order), rows.gather(1, order)
