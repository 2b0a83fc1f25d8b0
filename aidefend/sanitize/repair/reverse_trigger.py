"""Reverse a model's triggers: the smallest change that sends every row to a class, and whether one is oddly small."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_choice, check_int, check_kind, check_number, refuse
from aidefend._core.modules import freeze, naming_the_model, preserve
from aidefend.sanitize.repair.trigger_search import FORMS, Form, Triggers, forms_for, search
from aidefend.sanitize.repair.tuning import trusted_rows

_WORKS = 0.8


@dataclasses.dataclass(frozen=True, eq=False)
class ReversedTriggers:
    """What was found for each of K classes, in each form.

    Args:
        sizes: Form to (K,) float64, as a share: of the cells that are written, of the range that is added (root mean
            square), of half the side by which cells are moved (root mean square).
        success: Form to (K,): share of held-back trusted rows of other classes that the change sends to the class.
        smallness: (K,): the median size over the classes, over this class's size; the largest over the forms. 1 is
            usual.
        suspects: Classes whose smallness is at least `threshold` and whose change works, smallest change first.
        threshold: As asked for.
    """

    sizes: dict[str, Tensor]
    success: dict[str, Tensor]
    smallness: Tensor
    suspects: tuple[int, ...]
    threshold: float
    _triggers: dict[str, Triggers]

    @property
    def verdict(self) -> str:
        """One sentence; never that a model is clean."""
        if not self.suspects:
            return (
                "No evidence of a backdoor towards one class: "
                f"no change is {self.threshold:g} times smaller than usual. "
                "Backdoors that lead to many classes or from one class only, and of other forms, would not show."
            )
        named = ", ".join(f"class {label} ({self.smallness[label]:.1f} times smaller)" for label in self.suspects)
        return f"Changes are far smaller than usual for {named}: a backdoor towards it would look like this."

    def stamp(self, x: Tensor, label: int, form: Form | None = None) -> Tensor:
        """Rows (N, ...) with the trigger of a class; form None: the one in which it is smallest beside the others."""
        names = [form] if form is not None else list(self._triggers)
        check_choice(names[0], FORMS, "form")
        label = check_int(label, "label", 0, len(self.smallness) - 1)
        best = max(names, key=lambda name: float(_smallness(self.sizes[name], self.success[name])[label]))
        with torch.no_grad():
            return self._triggers[best].stamp(x, torch.full((len(x),), label, device=x.device))


def reverse_trigger(
    model: nn.Module,
    trusted: Any,
    *,
    forms: tuple[Form, ...] | None = None,
    threshold: float = 3.0,
    steps: int = 100,
    seed: int = 0,
) -> ReversedTriggers:
    """Search, for every class, for the smallest change that sends trusted rows to it.

    Guarantee: none. A class that is easy to reach (a 1 is a few cells of a 7) has a small change without any backdoor:
        the false alarms of a threshold are measured in `benchmarks/sanitize_repair.py`. Sizes are compared between
        classes, so fewer than 4 classes are refused, and a backdoor towards all classes at once shows in none.
    Args:
        model: From x to logits (N, K), K >= 4.
        trusted: Labelled rows without a trigger, at least two of each class; a few hundred are enough.
        forms: Of "written" (cells get values), "added" (a pattern is added) and "bent" (images alone: cells are moved
            smoothly); None: those that fit the rows.
        threshold: How many times smaller than the median makes a suspect, in (1, 1e6].
        steps: Of the search.
        seed: Of starts and batches.
    Returns: `ReversedTriggers`.
    Raises: ConfigurationError: arguments, rows without labels, too few classes.
    Cost: forms x steps x 32 (K + 1) rows forward and backward.
    Source: Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao 2019; ratios to the median in place of their deviations, and
        the forms "added" and "bent", are ours.

    Example:
        >>> weights = torch.eye(4)
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> x, y = torch.eye(4).repeat(10, 1), torch.arange(4).repeat(10)
        >>> reverse_trigger(model, (x, y), steps=5).smallness.shape
        torch.Size([4])
    """
    check_kind(model, nn.Module, "model")
    check_number(threshold, "threshold", 1, 1e6, open_low=True)
    check_int(steps, "steps")
    rows = trusted_rows(model, trusted, check_int(seed, "seed", 0))
    chosen = _forms(forms, rows.x)
    with preserve(model), naming_the_model(rows.x), torch.enable_grad():
        model.eval()
        freeze(model)
        with torch.no_grad():
            classes = model(rows.x[:1]).shape[1]
        if classes < 4:
            raise refuse("a model with at least 4 classes", "model", f"{classes} classes", "Sizes need a comparison")
        every = torch.arange(classes + 1, device=rows.x.device)
        triggers: dict[str, Triggers] = {}
        sizes: dict[str, Tensor] = {}
        hits: dict[str, Tensor] = {}
        for form in chosen:
            found = search(model, rows.x, rows.y, every, form, steps=steps, seed=seed)
            triggers[form], sizes[form], hits[form] = found[0], found[1][:-1].double(), found[2][:-1].double()
    each = torch.stack([_smallness(sizes[form], hits[form]) for form in chosen])
    smallness = each.max(dim=0).values
    order = smallness.argsort(descending=True).tolist()
    suspects = tuple(label for label in order if smallness[label] >= threshold)
    return ReversedTriggers(sizes, hits, smallness, suspects, threshold, triggers)


def _forms(forms: tuple[Form, ...] | None, x: Tensor) -> tuple[Form, ...]:
    if forms is None:
        return forms_for(x)
    if not isinstance(forms, tuple) or not forms:
        raise refuse(f"a tuple of forms among {FORMS}", "forms", forms, 'Pass ("written",) or None')
    for form in forms:
        check_choice(check_choice(form, FORMS, "forms"), forms_for(x), "forms (only images bend)")
    return forms


def _smallness(sizes: Tensor, success: Tensor) -> Tensor:
    """(K,) median over size; 0 where the change does not work."""
    ratio = sizes.median() / sizes.clamp(min=1e-9)
    return torch.where(success >= _WORKS, ratio, torch.zeros_like(ratio))
