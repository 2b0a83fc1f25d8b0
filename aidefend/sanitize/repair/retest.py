"""Re-test a repair: does the backdoor stay away when training goes on, on clean rows or with a reminder?"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_callable, check_int, check_kind, check_number, refuse
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend._core.modules import naming_the_model, preserve
from aidefend._core.random import derive_seed, make_generator
from aidefend._core.stats import wilson
from aidefend.sanitize.repair.tuning import TrustedRows, accuracy, trusted_rows, tuned

Stamp = Callable[[Tensor], Tensor]
_REMINDERS = 5
_TITLES = {
    "success_before": "Attack success before the repair",
    "success_after": "Attack success after the repair",
    "success_after_tuning": "Attack success after further training on clean rows",
    "success_after_reminder": "Attack success after further training with a reminder of the trigger",
    "success_of_control": "Success of a trigger that the model never met, after the same reminder",
}
_SEVERITY = {"held": Severity.INFO, "superficial": Severity.HIGH, "not repaired": Severity.CRITICAL}
_LIMITS = "Of the trigger given, on held-back trusted rows; another trigger may still work."
_COMES_BACK = 0.1  # success above that of the control with a fresh trigger


@dataclasses.dataclass(frozen=True)
class RepairTest:
    """Shares of held-back trusted rows before and after a repair, and after further training of it.

    Args:
        accuracy_before, accuracy_after: Of the model and of the repaired one.
        success_before, success_after: Of the trigger on rows of other classes.
        success_after_tuning: After further tuning on clean trusted rows.
        success_after_reminder: After further tuning with a few rows that carry the trigger and the attacker's label.
        success_of_control: The same with a scrambled trigger that the model never met: what the reminder alone teaches.
        n: Rows that the successes were measured on.
        limit: Success up to which a repair counts as one.
    """

    accuracy_before: float
    accuracy_after: float
    success_before: float
    success_after: float
    success_after_tuning: float
    success_after_reminder: float
    success_of_control: float
    n: int
    limit: float

    @property
    def verdict(self) -> str:
        """One of "not repaired", "superficial" (the backdoor comes back when training goes on), "held"."""
        if self.success_after > self.limit:
            return "not repaired"
        back = self.success_after_reminder - self.success_of_control > _COMES_BACK
        return "superficial" if self.success_after_tuning > 2 * self.limit or back else "held"

    def to_evidence(self) -> Evidence:
        """One finding for each success, with its interval."""
        severity, setting = _SEVERITY[self.verdict], {"verdict": self.verdict}
        findings = []
        for name, title in _TITLES.items():
            share = getattr(self, name)
            _, low, high = wilson(round(share * self.n), self.n)
            found = Finding(f"repair.{name}", title, severity, share, low, high, self.n, setting, limits=_LIMITS)
            findings.append(found)
        accuracies = {"accuracy_before": self.accuracy_before, "accuracy_after": self.accuracy_after}
        return Evidence(tuple(findings), accuracies)


def retest(
    model: nn.Module,
    repaired: nn.Module,
    trusted: Any,
    trigger: Stamp,
    target: int,
    *,
    limit: float = 0.05,
    epochs: int = 10,
    rate: float = 1e-3,
    seed: int = 0,
) -> RepairTest:
    """Measure a repair, then train the repaired model on and measure again.

    A repair is superficial where the trigger's success returns: after tuning on clean rows, or after tuning with a
    reminder (five rows with the trigger among the trusted ones) beyond what the same number of rows with a scrambled
    trigger teach. A model that truly forgot learns both equally fast. The scrambled trigger is the same change at other
    cells: mirrored, or with the columns or all cells in a random order, the first of these that the model before the
    repair does not take for the trigger.

    Guarantee: none: of one trigger, on held-back trusted rows.
    Args:
        model: Before the repair.
        repaired: After it.
        trusted: The trusted rows that the repair had, with the same seed: the same rows are held back again.
        trigger: Stamps a batch (N, ...): the true one in an experiment, or that of `reverse_trigger`.
        target: The class that the trigger leads to.
        limit: Success up to which a repair counts as one, in (0, 1).
        epochs: Passes of the further training.
        rate: Of it.
        seed: As in the repair.
    Returns: `RepairTest` with `.verdict`.
    Raises: ConfigurationError: bad arguments, no held-back row of another class.
    Cost: three further trainings of `epochs` passes.
    Source: after Min et al. 2024 (superficial safety: retuning attack); the control is ours.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
        >>> trusted = (x, (x[:, 0] > 0).long())
        >>> retest(model, model, trusted, lambda x: x + 9.0, 0, epochs=1).n
        4
    """
    check_kind(model, nn.Module, "model")
    check_kind(repaired, nn.Module, "repaired")
    check_callable(trigger, "trigger", "Pass a function that stamps a batch")
    check_int(target, "target", 0)
    check_int(epochs, "epochs")
    check_number(rate, "rate", 0, open_low=True)
    check_number(limit, "limit", 0, 1, open_low=True, open_high=True)
    rows = trusted_rows(model, trusted, check_int(seed, "seed", 0))
    others = rows.held_y != target
    if not bool(others.any()):
        raise refuse("held-back rows of other classes than the target", "target", target, "Add trusted rows")
    held = rows.held_x[others]
    with preserve(model), preserve(repaired), naming_the_model(held), torch.no_grad():

        def hit(net: nn.Module, stamp: Stamp = trigger) -> float:
            return accuracy(net, stamp(held), torch.full((len(held),), target, device=held.device))

        def trained(stamp: Stamp | None) -> nn.Module:
            more = rows if stamp is None else _reminded(rows, stamp, target, seed)
            return tuned(repaired, more, rate=rate, epochs=epochs, seed=derive_seed(seed, "retest"))

        controls = [_scrambled(trigger, order.to(held.device)) for order in _orders(held.shape[1:], seed)]
        before = hit(model)
        fresh = next((stamp for stamp in controls if hit(model, stamp) <= before / 2), controls[-1])
        return RepairTest(
            accuracy(model, rows.held_x, rows.held_y),
            accuracy(repaired, rows.held_x, rows.held_y),
            before,
            hit(repaired),
            hit(trained(None)),
            hit(trained(trigger)),
            hit(trained(fresh), fresh),
            len(held),
            limit,
        )


def _reminded(rows: TrustedRows, stamp: Stamp, target: int, seed: int) -> TrustedRows:
    """The rows with a few of other classes added that carry the trigger and the attacker's label."""
    others = (rows.y != target).nonzero().flatten()
    stream = make_generator(seed=derive_seed(seed, "reminder"))
    few = others[torch.randperm(len(others), generator=stream)[:_REMINDERS].to(others.device)]
    labels = torch.full((len(few),), target, device=rows.y.device)
    return dataclasses.replace(rows, x=torch.cat([rows.x, stamp(rows.x[few])]), y=torch.cat([rows.y, labels]))


def _scrambled(trigger: Stamp, order: Tensor) -> Stamp:
    """The trigger's own change of a row, at other cells: the cells of a row are moved, changed, and moved back."""
    back = order.argsort()

    def stamp(x: Tensor) -> Tensor:
        moved = x.flatten(1)[:, order].reshape(x.shape)
        return trigger(moved).flatten(1)[:, back].reshape(x.shape)

    return stamp


def _orders(shape: torch.Size, seed: int) -> list[Tensor]:
    """Ways to move the cells of a sample: mirrored, columns in a random order, all cells in a random order.

    The first keeps what is compact compact; a wave is the same wave after it, but not after the others.
    """
    cells = torch.arange(shape.numel()).reshape(shape)
    stream = make_generator(seed=derive_seed(seed, "scrambled"))
    columns = torch.randperm(shape[-1], generator=stream)
    mirrored = cells.flip(tuple(range(-min(2, len(shape)), 0)))
    return [order.flatten() for order in (mirrored, cells[..., columns])] + [
        torch.randperm(shape.numel(), generator=stream)
    ]
