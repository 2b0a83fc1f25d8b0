"""One door to all repairs: the strongest setting of a method that the trusted rows allow."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from aidefend._core.batches import gather_labelled
from aidefend._core.checks import check_choice, check_int, check_kind, check_labels, check_number, check_tensor, refuse
from aidefend._core.modules import find_module, last_linear, naming_the_model, preserve
from aidefend._core.random import derive_seed
from aidefend.sanitize.repair.attention import distilled
from aidefend.sanitize.repair.isolation import isolated_unlearned
from aidefend.sanitize.repair.pruning import fine_pruned, fragility, lipschitz_pruned, without_fragile
from aidefend.sanitize.repair.relearning import relearned
from aidefend.sanitize.repair.sharpness import sharpness_tuned
from aidefend.sanitize.repair.trigger_unlearning import triggers_unlearned
from aidefend.sanitize.repair.tuning import TrustedRows, accuracy, trusted_rows, tuned, weighted_layers
from aidefend.sanitize.repair.unlearning import unlearned

RepairMethod = Literal[
    "fine-tuning", "fine-pruning", "anp", "clp", "nad", "i-bau", "ft-sam", "abl", "trigger-unlearning", "relearning"
]
_STRONGEST_FIRST = ("relearning",)
Candidates = Iterator[nn.Module]
_MASK_STEPS = 300
_RATES = (1e-3, 3e-3, 6e-3, 1e-2)


def repair(
    model: nn.Module,
    trusted: Any,
    method: RepairMethod = "relearning",
    *,
    layer: str | nn.Module | None = None,
    suspects: Any = None,
    max_accuracy_loss: float = 0.02,
    epochs: int = 20,
    seed: int = 0,
) -> nn.Module:
    """A copy of a model that may hold a backdoor, after a repair with a few trusted rows.

    Every method has a strength. A quarter of the trusted rows is held back, and the strongest setting is taken at which
    the accuracy on these rows has not fallen by more than `max_accuracy_loss` and one row; where all cost more, the one
    with the best accuracy. Nothing about a trigger is asked or used.

    Guarantee: none about a trigger. Where the trusted rows suffice for it, "relearning" returns a copy that depends on
        architecture, buffers, trusted rows and seed alone (parameters that no `reset_parameters` draws keep their
        entries, in a random order). Any other repair that lowers the success of one trigger may hide it and not remove
        it: judge it with `retest`, which trains on and names such repairs "superficial".
        `benchmarks/sanitize_repair.py` measures the methods on digits; what it was not run on is not known. Voided by
        trusted rows that carry the trigger.
    Args:
        model: From x to logits (N, K); it stays as it is.
        trusted: Rows with right labels, at least two of each class; 1 to 5 % of the training data is usual.
        method: "fine-tuning"; "fine-pruning" (inputs of `layer` that trusted rows leave asleep go, then tuning); "anp"
            (neurons that a small change turns into a harm go); "clp" (channels with a large Lipschitz bound go); "nad"
            (attention of a tuned teacher); "i-bau" (universal perturbations unlearned with the implicit
            hypergradient); "ft-sam" (sharpness-aware tuning); "abl" (ascent on `suspects`); "trigger-unlearning"
            (small triggers towards every class are searched, written and added, and unlearned, in rounds);
            "relearning" (fresh weights learn the trusted rows, varied, and nothing of the model; where the rows are too
            few for that, also how the model divides mixtures of two rows between their labels, then with fresh weights
            in the later layers alone). "relearning" needs rows of every class.
        layer: For "fine-pruning" alone: name or module, linear or convolution; None: the linear layer that runs last.
        suspects: For "abl": labelled rows to unlearn, for example `report.quarantine(dataset)`.
        max_accuracy_loss: In [0, 1].
        epochs: Passes over the trusted rows of one tuning; for "relearning" 50 steps of 128 rows each.
        seed: Of orders, starts and of what is held back.
    Returns: A new module in the modes of the given one.
    Raises: ConfigurationError: unlabelled or too few trusted rows, NaN, "abl" without suspects, unknown layer or
        method, a layer for another method, no rows of a class for "relearning".
        IncompatibleModel: the model does not run on the rows, or has no hidden linear or convolutional layer to prune.
    Cost: "relearning": 128,000 rows forward and backward, up to four times that where the accuracy falls. The others:
        up to 5 times `epochs` passes forward and backward over the trusted rows (twice that for "ft-sam" and "nad");
        "anp": 300 batches, two passes each; "i-bau": up to 10 double-backward passes a step; "trigger-unlearning":
        at most 800 batches of 32 (K + 1) rows for each form, fewer rows once a class is suspected.
    Source: see the method's own function.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
        >>> repaired = repair(model, (x, (x[:, 0] > 0).long()), "fine-tuning", epochs=2)
        >>> repaired is model, repaired(x).shape
        (False, torch.Size([40, 2]))
    """
    check_kind(model, nn.Module, "model")
    check_choice(method, get_args(RepairMethod), "method")
    check_number(max_accuracy_loss, "max_accuracy_loss", 0, 1)
    check_int(epochs, "epochs")
    if layer is not None and method != "fine-pruning":
        raise refuse('layer= with "fine-pruning" alone', "layer", f"method {method!r}", 'Add method="fine-pruning"')
    rows = trusted_rows(model, trusted, check_int(seed, "seed", 0))
    bad = _suspects(model, suspects, rows) if method == "abl" else None
    with preserve(model), naming_the_model(rows.x):
        model.eval()
        candidates = _candidates(model, rows, method, layer, bad, epochs, seed)
        choose = _first_that_holds if method in _STRONGEST_FIRST else _strongest
        chosen = choose(candidates, rows, _least(model, rows, max_accuracy_loss), model)
    for module, twin in zip(model.modules(), chosen.modules(), strict=True):
        twin.training = module.training
    for parameter, new in zip(model.parameters(), chosen.parameters(), strict=True):
        new.grad = None
        new.requires_grad_(parameter.requires_grad)
    return chosen


def _least(model: nn.Module, rows: TrustedRows, allowed: float) -> float:
    """The accuracy on held-back rows that a repair may fall to: one row less than what is allowed."""
    return accuracy(model, rows.held_x, rows.held_y) - allowed - 1 / len(rows.held_y) - 1e-9


def _strongest(candidates: Candidates, rows: TrustedRows, least: float, model: nn.Module) -> nn.Module:
    """Of candidates from weak to strong the last whose accuracy holds; if none does, the most accurate one."""
    chosen, highest = model, -1.0
    for candidate in candidates:
        reached = accuracy(candidate, rows.held_x, rows.held_y)
        if reached >= min(least, highest):
            chosen = candidate
        highest = max(highest, reached)
    return chosen


def _first_that_holds(candidates: Candidates, rows: TrustedRows, least: float, model: nn.Module) -> nn.Module:
    """Of candidates from strong to weak the first whose accuracy holds, and no later one is made; else as above."""
    chosen, highest = model, -1.0
    for candidate in candidates:
        reached = accuracy(candidate, rows.held_x, rows.held_y)
        if reached >= least:
            return candidate
        if reached > highest:
            chosen, highest = candidate, reached
    return chosen


def _suspects(model: nn.Module, suspects: Any, rows: TrustedRows) -> tuple[Tensor, Tensor]:
    if suspects is None:
        cure = "Pass rows to unlearn, for example report.quarantine(dataset)"
        raise refuse('suspects= for the method "abl"', "suspects", None, cure)
    x, y = gather_labelled(suspects, "suspects")
    check_tensor(x, "suspects", floating=True)
    if x.shape[1:] != rows.x.shape[1:]:
        raise refuse(f"suspects of shape {tuple(rows.x.shape[1:])}", "suspects", x, "Pass rows like the trusted ones")
    with preserve(model), torch.no_grad():
        classes = model.eval()(rows.x[:2]).shape[1]
    check_labels(y, len(x), classes, "suspects labels")
    return x.to(rows.x.device), y.to(rows.x.device)


def _candidates(
    model: nn.Module,
    rows: TrustedRows,
    method: RepairMethod,
    layer: str | nn.Module | None,
    suspects: tuple[Tensor, Tensor] | None,
    epochs: int,
    seed: int,
) -> Candidates:
    """The settings of a method, from weak to strong; those of `_STRONGEST_FIRST` the other way round."""
    makers: dict[str, Callable[[], Candidates]] = {
        "fine-tuning": lambda: (tuned(model, rows, rate=r, epochs=epochs, seed=seed) for r in _RATES),
        "fine-pruning": lambda: _fine_pruned(model, rows, layer, epochs, seed),
        "anp": lambda: _without_fragile(model, rows, seed),
        "clp": lambda: (lipschitz_pruned(_pruneable(model, rows), rows.x, deviations=u) for u in (4, 3, 2.5, 2, 1.5)),
        "nad": lambda: (distilled(model, rows, weight=10.0, rate=r, epochs=epochs, seed=seed) for r in _RATES),
        "i-bau": lambda: (
            unlearned(model, rows, radius=r, rounds=max(1, epochs // 2), steps=10, rate=1e-3, seed=seed)
            for r in (0.2, 0.4, 0.8)
        ),
        "ft-sam": lambda: (sharpness_tuned(model, rows, radius=2.0, rate=r, epochs=epochs, seed=seed) for r in _RATES),
        "abl": lambda: (
            isolated_unlearned(model, rows, suspects, rate=r, epochs=epochs, seed=seed)  # type: ignore[arg-type]
            for r in (3e-4, 1e-3, 3e-3)
        ),
        "trigger-unlearning": lambda: triggers_unlearned(model, rows, epochs=epochs, seed=seed),
        "relearning": lambda: relearned(model, rows, epochs=epochs, seed=seed),
    }
    return makers[method]()


def _fine_pruned(
    model: nn.Module, rows: TrustedRows, layer: str | nn.Module | None, epochs: int, seed: int
) -> Candidates:
    chosen = last_linear(model, rows.x[:1]) if layer is None else find_module(model, layer)
    if not isinstance(chosen, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or getattr(chosen, "groups", 1) != 1:
        cure = "Name a linear layer or a convolution without groups"
        raise refuse("layer with weights over its input channels", "layer", type(chosen).__name__, cure)
    for share in (0.2, 0.4, 0.6, 0.8, 0.9):
        yield fine_pruned(model, chosen, rows, share=share, rate=1e-3, epochs=epochs, seed=seed)


def _without_fragile(model: nn.Module, rows: TrustedRows, seed: int) -> Candidates:
    masks = fragility(_pruneable(model, rows), rows, steps=_MASK_STEPS, seed=derive_seed(seed, "anp"))
    for share in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5):
        yield without_fragile(model, masks, share=share)


def _pruneable(model: nn.Module, rows: TrustedRows) -> nn.Module:
    if len(weighted_layers(model, rows.x)) < 2:
        reason = "it has no hidden linear or convolutional layer"
        raise refuse("a model with hidden layers to prune", "model", reason, 'Use method="fine-tuning"')
    return model
