"""Watches adversarial training for its two failures, and keeps the best state to go back to."""

import copy
import dataclasses
import os
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from aidefend._core.batches import gather_labelled, input_id, iterate
from aidefend._core.checks import check_callable, check_int, check_kind, check_path, check_probability, refuse
from aidefend._core.errors import AidefendError
from aidefend._core.modules import Model, device_of
from aidefend._core.random import derive_seed, make_generator
from aidefend._core.storage import write_atomic
from aidefend.adversarial.crafting import Attack, bare, craft, crafting
from aidefend.adversarial.divergence import logits_of

Status = Literal["healthy", "catastrophic overfitting", "robust overfitting"]


@dataclasses.dataclass(frozen=True)
class OverfittingVerdict:
    """One look at a model: accuracies under attack, what they mean, what to do."""

    step: int
    status: Status
    fast_accuracy: float
    strong_accuracy: float
    validation_accuracy: float
    best_step: int
    advice: str


class OverfittingGuard:
    """Detects catastrophic and robust overfitting between your training steps, and keeps the best weights.

    Guarantee: none about robustness: the accuracies are those under the attacks given, on the rows given. Looks leave
        no trace on the model. Choose by validation rows that are neither trained on nor reported: rows that are in both
        sets are refused; that the test set stays out is up to you.
    Args:
        train: (x, y) or a data set: some hundred rows that are trained on.
        validation: (x, y) or a data set: rows held out of training, and not the test set.
        attack: A strong attack, such as PGD(threat, steps=10).
        fast_attack: The single step that is trained with, such as PGD(threat, steps=1).
        drop: Catastrophic: the accuracy on `train` under the strong attack fell by this share below its best, and lies
            as far below that under the fast one, in (0, 1).
        gap: Catastrophic whatever came before: the strong attack lies this share below the fast one, in (0, 1).
        tolerance: Robust overfitting: validation accuracy this share below its best, in (0, 1), while that on `train`
            is not lower than it was at that best.
        patience: How many looks in a row must show that, >= 1.
        fallback: An objective for after catastrophic overfitting, such as NFGSM(attack): see `objective`.
        path: File for the best weights (safetensors, replaced atomically), beside the copy in memory.
        batch_size: Rows a pass.
        seed: Of the attacks, the same at each look so that looks compare; None: attacks get no generator.
    Raises: ConfigurationError: an argument is malformed, or rows are in both sets.
    Cost: A look: the fast and the strong attack on `train`, the strong one on `validation`, and a forward pass each;
        one copy of the weights when they are the best.
    Source: Wong, Rice, Kolter 2020 (stop where PGD accuracy drops by 20 points); Rice, Wong, Kolter 2020 (stop by the
        robust accuracy on a validation split). Differs: no stop of itself; patience against noise.
    Example:
        >>> model, y = nn.Linear(4, 2), torch.arange(20) % 2
        >>> train, validation = (torch.rand(20, 4), y), (torch.rand(20, 4), y)
        >>> same = lambda model, x, y, generator=None: x
        >>> guard = OverfittingGuard(train, validation, attack=same, fast_attack=same)
        >>> guard.look(model, step=0).status
        'healthy'
    """

    def __init__(
        self,
        train: Any,
        validation: Any,
        *,
        attack: Attack,
        fast_attack: Attack,
        drop: float = 0.2,
        gap: float = 0.4,
        tolerance: float = 0.02,
        patience: int = 2,
        fallback: Any = None,
        path: str | os.PathLike[str] | None = None,
        batch_size: int = 256,
        seed: int | None = 0,
    ) -> None:
        self._attack = check_callable(attack, "attack", "Pass PGD(threat, steps=10)")
        self._fast = check_callable(fast_attack, "fast_attack", "Pass PGD(threat, steps=1)")
        shares = {"drop": drop, "gap": gap, "tolerance": tolerance}
        self._shares = {name: check_probability(value, name) for name, value in shares.items()}
        self._patience = check_int(patience, "patience")
        self._batch_size = check_int(batch_size, "batch_size")
        self._seed = None if seed is None else check_int(seed, "seed", 0)
        self._path = None if path is None else check_path(path)
        self._fallback = fallback
        self._train, self._validation = gather_labelled(train, "train"), gather_labelled(validation, "validation")
        _check_apart(self._train, self._validation)
        self.history: list[OverfittingVerdict] = []
        self._best: tuple[OverfittingVerdict, dict[str, Any], dict[str, Any] | None] | None = None
        self._below = 0

    def look(self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer | None = None) -> OverfittingVerdict:
        """Judge the model as it is now; keep it (and the optimizer's state) where validation accuracy is the best yet.

        Args:
            model: In any mode; wrappers included.
            step: Your count of steps or epochs, for the report.
            optimizer: Its state is kept with the weights.
        """
        check_kind(model, nn.Module, "model")
        fast = self._accuracy(model, self._fast, self._train)
        strong = self._accuracy(model, self._attack, self._train)
        validation = self._accuracy(model, self._attack, self._validation)
        status = self._status(fast, strong, validation)
        improves = self._improves(status, validation)
        best_step = step if improves or self._best is None else self._best[0].step
        verdict = OverfittingVerdict(
            check_int(step, "step", 0), status, fast, strong, validation, best_step, self._advice(status, best_step)
        )
        if improves:
            self._keep(verdict, model, optimizer)
        self.history.append(verdict)
        return verdict

    def roll_back(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Write the best weights (and the optimizer's state of that look) back; the step they are of."""
        if self._best is None:
            raise refuse("at least one look", "looks", 0, "Call look(model, step) during training", AidefendError)
        verdict, weights, state = self._best
        bare(model).load_state_dict(weights)
        if optimizer is not None:
            if state is None:
                cure = "Pass it to look(model, step, optimizer) too"
                raise refuse("an optimizer that was there at the best look", "optimizer", "none kept", cure)
            optimizer.load_state_dict(copy.deepcopy(state))
        self._below = 0
        return verdict.step

    def objective(self, current: Any) -> Any:
        """What to train with next: the fallback from the first catastrophic look on, else the current one."""
        collapsed = any(verdict.status == "catastrophic overfitting" for verdict in self.history)
        return self._fallback if collapsed and self._fallback is not None else current

    def _status(self, fast: float, strong: float, validation: float) -> Status:
        healthy = [verdict for verdict in self.history if verdict.status != "catastrophic overfitting"]
        peak = max((verdict.strong_accuracy for verdict in healthy), default=strong)
        drop = self._shares["drop"]
        if fast - strong >= self._shares["gap"] or (peak - strong >= drop and fast - strong >= drop):
            return "catastrophic overfitting"
        best = self._best[0] if self._best is not None else None
        fell = best is not None and best.validation_accuracy - validation > self._shares["tolerance"]
        self._below = self._below + 1 if fell and best is not None and strong >= best.strong_accuracy else 0
        return "robust overfitting" if self._below >= self._patience else "healthy"

    def _improves(self, status: Status, validation: float) -> bool:
        if self._best is None:
            return True
        if status == "catastrophic overfitting":
            return False
        kept = self._best[0]
        return kept.status == "catastrophic overfitting" or validation > kept.validation_accuracy

    def _advice(self, status: Status, best_step: int) -> str:
        if status == "catastrophic overfitting":
            other = type(self._fallback).__name__ if self._fallback is not None else "NFGSM, GradAlign or PGDTraining"
            return f"Roll back to step {best_step} and go on with {other}."
        if status == "robust overfitting":
            return (
                f"Stop and use the weights of step {best_step}, or lower the learning rate from there with AWP or EMA."
            )
        return "Go on."

    def _accuracy(self, model: Model, attack: Attack, data: tuple[Tensor, Tensor]) -> float:
        correct, parts = 0, zip(*(part.split(self._batch_size) for part in data), strict=True)
        with crafting(model, "eval") as inner:
            for number, (x, y) in enumerate(parts):
                x, y = x.to(device_of(inner)), y.to(device_of(inner))
                seed = None if self._seed is None else derive_seed(self._seed, "look", number)
                x_adv = craft(attack, inner, x, y, None if seed is None else make_generator(seed=seed))
                with torch.no_grad():
                    correct += int((logits_of(inner, x_adv).argmax(dim=1) == y).sum())
        return correct / len(data[0])

    def _keep(self, verdict: OverfittingVerdict, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        weights = {name: copy.deepcopy(_copied(value)) for name, value in bare(model).state_dict().items()}
        state = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
        if self._path is not None:
            tensors = {name: value.cpu().contiguous() for name, value in weights.items() if isinstance(value, Tensor)}
            write_atomic(self._path, safetensors.torch.save(tensors, {"step": str(verdict.step)}))
        self._best = (verdict, weights, state)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _check_apart(train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor]) -> None:
    """Refuse validation rows that are trained on: no overfitting shows on them."""
    names = [{input_id(name) for batch in iterate(x) for name in batch.ids} for x in (train[0], validation[0])]
    shared = len(names[0] & names[1])
    if shared:
        cure = "Hold validation rows out of training"
        raise refuse("no row in both train and validation", "shared rows", shared, cure)
