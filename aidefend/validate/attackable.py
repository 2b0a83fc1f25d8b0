"""Model and guard as one differentiable classifier, for attacks and audits that know both."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from aidefend._core.batches import in_batches
from aidefend._core.checks import check_int, check_not_empty, check_tensor
from aidefend._core.stats import Interval, wilson
from aidefend.validate.calibrating import rows_a_pass
from aidefend.validate.detector import Rows, score_columns, wide
from aidefend.validate.features import healthy_rows
from aidefend.validate.judging import Panel
from aidefend.validate.spec import InputSpec

_LARGEST_MARGIN = 1e4


class AttackableGuard(nn.Module):
    """From x (N, ...) to logits (N, K + 1): the model's K classes and, last, the refusal.

    The logit of the refusal is the largest class logit plus the margin by which the detectors refuse the row, so that
    the last class wins exactly for the rows that the guard refuses, and its gradient leads around the detectors. A row
    that the specification refuses, or whose output is not finite, has the constant row (0, .., 0, 1). Nothing is
    hardened, logged or charged: this is what an attacker who holds the whole system sees. Logits of half precision
    become float32, in which a small margin still counts.
    Around a regression model there are no classes: K is 1, and the one class has the constant logit 0.
    Guarantee: `argmax == K` where and only where the guard in mode "enforce" refuses the row as an input.
    """

    def __init__(self, guard: nn.Module, panel: Callable[[], Panel], spec: InputSpec, num_classes: int) -> None:
        super().__init__()
        self.guard, self._panel, self.spec, self.num_classes = guard, panel, spec, num_classes
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the whole, differentiable in x."""
        check_tensor(x, "x", finite=False)
        checked = self.spec.check(x.detach())
        constant = torch.zeros(len(x), self.num_classes + 1, device=x.device)
        constant[:, -1] = 1.0
        rows = checked.accepted.nonzero().flatten()
        if checked.fault is not None or len(rows) == 0:
            return constant
        panel, given = self._panel(), self.spec.clip(x)
        given = given if len(rows) == len(x) else given[rows]
        outputs = panel.capture.run(panel.model, given)
        healthy = healthy_rows(outputs.features, outputs.logits)
        of_classes = panel.capture.task == "classification"
        logits = outputs.logits[healthy] if of_classes else outputs.features.new_zeros(int(healthy.sum()), 1)
        seen = logits if of_classes else None
        scores = score_columns(panel.detectors, Rows(outputs.features[healthy], seen, given[healthy], panel.model))
        margin = panel.calibration.margin(scores, logits.argmax(dim=1)).clamp(-_LARGEST_MARGIN, _LARGEST_MARGIN)
        joined = torch.cat([wide(logits), _refusal(wide(logits).amax(dim=1), margin)[:, None]], dim=1)
        return constant.to(joined).index_put((rows[healthy],), joined)


def _refusal(top: Tensor, margin: Tensor) -> Tensor:
    """Logits (n,): `top` plus the margin, and on the right side of it where rounding would make them equal."""
    refusal = top + margin.to(top)
    ends = top.detach(), torch.full_like(top, math.inf)
    least, most = torch.nextafter(*ends), torch.nextafter(ends[0], -ends[1])
    right = torch.where(margin > 0, torch.maximum(refusal, least), torch.minimum(refusal, most))
    return refusal + (right - refusal).detach()


def refused_share(view: AttackableGuard, x: Tensor, confidence: float, batch_size: int) -> Interval:
    """Share of the rows x (N, ...), N >= 1, whose answer is the refusal, with its Wilson interval."""
    check_tensor(x, "x", finite=False)
    check_int(batch_size, "batch_size")
    n = check_not_empty(len(x), "x")
    with torch.no_grad():
        refused = in_batches(view, x, rows_a_pass(view.spec, x, batch_size)).argmax(dim=1) == view.num_classes
    return wilson(int(refused.sum()), n, confidence)
