"""Trigger consistency: a trigger keeps its say when other rows are laid over the input, or the input is scaled."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aidefend._core.batches import in_batches
from aidefend._core.checks import check_callable, check_choice, check_int, check_logits, check_tensor, refuse
from aidefend._core.modules import Model, device_of, evaluate, preserve
from aidefend.sanitize.block import check_kin, read_block
from aidefend.sanitize.sample import ClassSample

Response = Literal["added", "blended", "scaled"]
_FACTORS = (3, 5, 7, 9, 11)


class TriggerConsistency:
    """How sure the model stays of one class while rows of all classes are laid over the input.

    Blocks carry "x" (N, ...), the inputs of the model. Each row is added to the same overlays, cut to the range of the
    data; the score is 1 less the mean entropy of the answers, in shares of the largest possible one. A trigger that
    works on any input works there too, so the answers stay alike and sure. `response` asks otherwise.

    Guarantee: none. Blind to triggers that work on rows of one source class only, to triggers made for each input,
        and to models that are sure of everything; a class that is simple in itself scores high, too.
    Args:
        model: Module or callable from x to logits (N, K), that was trained on the data. Left as it was.
        overlays: Number of rows that are laid over, as evenly from the classes as it goes; the same for any sharding.
        seed: Chooses them.
        response: "added": as above; "blended": the mean of row and overlay, which leaves half of each; "scaled": the
            row itself times 3, 5, 7, 9 and 11, cut to the range of the data, and the score is the mean chance of the
            class that the model gives to the row as it is: brightness turns ordinary rows, and triggers stay.
    A row with NaN or infinity, and every row before `partial_fit`, scores NaN (no opinion).
    Cost: `overlays` forward passes a row ("scaled": 6), one pass of scoring; the overlays are held in memory.
    Source: Gao, Xu, Wang, Chen, Ranasinghe, Nepal 2019 (STRIP); "scaled": Guo, Li, Chen, Guo, Sun, Liu 2023 (SCALE-UP).
        Differs: no threshold is taken from a trusted set; a row is never laid over itself; chances in place of the
        share of equal answers.

    Example:
        >>> model = lambda x: 9.0 * torch.stack([x[:, 0] - 0.5, 0.5 - x[:, 0]], dim=1)
        >>> x = torch.tensor([[0.0, 0.2], [0.4, 0.1], [0.1, 0.3], [9.0, 0.0]])
        >>> block = {"ids": tuple("abcd"), "features": x, "labels": torch.tensor([1, 1, 0, 0]), "x": x}
        >>> TriggerConsistency(model, overlays=2).partial_fit(block).score(block).argmax().item()
        3
    """

    def __init__(self, model: Model, overlays: int = 20, seed: int = 0, *, response: Response = "added") -> None:
        self.model = check_callable(model, "model", "Pass a module or a function from x to logits")
        self.overlays, self.seed = check_int(overlays, "overlays"), check_int(seed, "seed", 0)
        self.response: Response = check_choice(response, ("added", "blended", "scaled"), "response")
        self.sample = ClassSample(overlays + 1, seed)
        self.low, self.high = float("inf"), float("-inf")

    def partial_fit(self, block: Mapping[str, Any]) -> "TriggerConsistency":
        """Add the rows of a block to those that may be laid over; returns self."""
        ids, x, labels, usable = _inputs(block)
        if bool(usable.any()):
            self.low = min(self.low, float(x[usable].min()))
            self.high = max(self.high, float(x[usable].max()))
            kept = [row_id for row_id, fits in zip(ids, usable.tolist(), strict=True) if fits]
            self.sample.add(kept, x[usable], labels[usable])
        return self

    def merge(self, other: "TriggerConsistency") -> "TriggerConsistency":
        """A new detector that has seen what both have seen."""
        check_kin(self, other, ("overlays", "seed", "response"))
        if self.model is not other.model and not _same_weights(self.model, other.model):
            raise refuse("a detector of the same model", "other", "another model", "Give both the same model")
        total = TriggerConsistency(self.model, self.overlays, self.seed, response=self.response)
        total.sample = self.sample.merged(other.sample)
        total.low, total.high = min(self.low, other.low), max(self.high, other.high)
        return total

    def score(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) float64 in [0, 1], up = suspicious."""
        ids, x, _, usable = _inputs(block)
        scores = torch.full((len(ids),), torch.nan, dtype=torch.float64)
        if self.sample.classes() and bool(usable.any()):
            kept = [row_id for row_id, fits in zip(ids, usable.tolist(), strict=True) if fits]
            scaled = self.response == "scaled"
            scores[usable] = self._chance(x[usable]) if scaled else 1 - self._entropy(kept, x[usable])
        return scores

    def _chance(self, x: Tensor) -> Tensor:
        """(n,) mean chance, over the factors, of the class that the model gives to the row as it is."""
        with preserve(self.model), torch.no_grad():
            evaluate(self.model)
            own = in_batches(self._answers, x, 512).argmax(dim=1, keepdim=True)
            rows = x if x.is_floating_point() else x.float()
            scaled = ((rows * factor).clamp(self.low, self.high).to(x.dtype) for factor in _FACTORS)
            chances = [in_batches(self._answers, rows, 512).gather(1, own)[:, 0] for rows in scaled]
        return torch.stack(chances).mean(dim=0)

    def _entropy(self, ids: list[str], x: Tensor) -> Tensor:
        """(n,) mean entropy of the answers over all overlays but the row itself, in [0, 1]."""
        names, bank = self._chosen()
        total, counted = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
        with preserve(self.model), torch.no_grad():
            evaluate(self.model)
            for name, over in zip(names, bank, strict=True):
                other = torch.tensor([row_id != name for row_id in ids])
                fits = other & (counted < self.overlays)
                if bool(fits.any()):
                    both = x[fits].to(over.dtype) + over
                    both = both / 2 if self.response == "blended" else both.clamp(self.low, self.high)
                    laid = both.to(x.dtype)
                    total[fits] += in_batches(self._answer_entropy, laid, 512)
                    counted[fits] += 1
        return torch.where(counted > 0, total / counted.clamp(min=1), torch.nan)

    def _answer_entropy(self, x: Tensor) -> Tensor:
        chances = self._answers(x)
        entropy: Tensor = torch.special.entr(chances).sum(dim=1) / torch.log(torch.tensor(float(chances.shape[1])))
        return entropy

    def _answers(self, x: Tensor) -> Tensor:
        """(n, K) float64 chances of the classes."""
        logits = check_logits(self.model(x.to(device_of(self.model))), len(x)).double().cpu()
        return torch.softmax(logits, dim=1)

    def _chosen(self) -> tuple[list[str], Tensor]:
        """One overlay more than are used, class by class in turn, so that a row can be left out for itself."""
        parts = [self.sample.of(label) for label in self.sample.classes()]
        turns = [(turn, part) for turn in range(self.overlays + 1) for part in range(len(parts))]
        picked = [(turn, part) for turn, part in turns if turn < len(parts[part][0])][: self.overlays + 1]
        names = [parts[part][0][turn] for turn, part in picked]
        rows = torch.stack([parts[part][1][turn] for turn, part in picked])
        return names, rows if rows.is_floating_point() else rows.float()


def _inputs(block: Mapping[str, Any]) -> tuple[tuple[str, ...], Tensor, Tensor, Tensor]:
    rows = read_block(block)
    if "x" not in block:
        raise refuse('a block with the key "x"', "block", sorted(map(str, block)), "Add the inputs of the model")
    x = check_tensor(block["x"], "x", finite=False, rows=len(rows.ids)).detach().cpu()
    usable = torch.isfinite(x.flatten(1)).all(dim=1) if x.is_floating_point() and len(x) else torch.ones(len(x)) > 0
    return rows.ids, x, rows.labels, usable


def _same_weights(left: Any, right: Any) -> bool:
    """Whether two modules are copies of each other, as they are after a shard was sent through a pipe."""
    if not isinstance(left, nn.Module) or not isinstance(right, nn.Module):
        return bool(left == right)
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours)
