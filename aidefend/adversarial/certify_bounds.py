"""Certificates by bound propagation: which rows no point of the threat can fool, for the net as it is."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_choice, check_int, check_kind, check_labels, check_logits
from aidefend._core.errors import IncompatibleModel
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend._core.modules import freeze, naming_the_model, preserve, training_layers
from aidefend._core.stats import Interval, wilson
from aidefend._core.threat import Threat
from aidefend.adversarial.bound_graph import BoundGraph
from aidefend.adversarial.linear_bounds import Region, crown_boxes, lowest, lowest_from_box

Method = Literal["ibp", "crown-ibp", "crown"]
METHODS: tuple[Method, ...] = ("ibp", "crown-ibp", "crown")


@dataclasses.dataclass(frozen=True, eq=False)
class BoundCertificate:
    """What `certify_bounds` has proven.

    Args:
        verified: (N,) bool: no point of the threat changes the answer y.
        margins: (N,) float64: lower bound of the smallest logit of y less another one, over the threat.
        threat: The threat.
        method: How.
    """

    verified: Tensor
    margins: Tensor
    threat: Threat
    method: Method

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.verified)

    @property
    def accuracy(self) -> Interval:
        """Share of rows verified, with its Wilson interval for rows of the same source."""
        return wilson(int(self.verified.sum()), self.n)

    def to_evidence(self) -> Evidence:
        """One finding, `certificate.verified_accuracy`."""
        share = self.accuracy
        finding = Finding(
            id="certificate.verified_accuracy",
            title=f"Rows that no point of the threat can fool, proven by {self.method}",
            severity=Severity.INFO,
            value=share.value,
            low=share.low,
            high=share.high,
            n=self.n,
            setting={"method": self.method},
            threat=str(self.threat),
            limits="A lower bound: a row that is not verified may stand all the same.",
        )
        return Evidence((finding,), {})


def certify_bounds(
    model: nn.Module, x: Tensor, y: Tensor, threat: Threat, method: Method = "crown-ibp", *, batch_size: int = 64
) -> BoundCertificate:
    """Prove for each row that its class y has the largest logit at every point of the threat.

    Guarantee: for a verified row the model, computed in its own floating-point format with any order of summation and
        round-to-nearest, answers y at every point for which `threat.contains` is true. Bounds run in float64 and are
        widened by the rounding error of each of the model's layers (twice its worst case, which covers the rounding of
        the bounds themselves). Voided by convolutions that are not computed as sums of products (Winograd, TF32), and
        by overflow or underflow inside the model. Hooks, replaced forwards and operations in place on what is read
        again are refused, for a trace does not see them.
    Args:
        model: In eval mode, of Linear, Conv1d/2d, BatchNorm, pooling, ReLU, leaky ReLU, other rising activations
            (loose), additions of tensors and constants, flatten; read by `torch.fx`.
        x: (N, ...), floating point, inside the bounds.
        y: (N,) class labels.
        threat: linf, l2, l1 or l0; bounds, masks, prices and radii by sample are used, whole numbers and one-hot
            groups are not (the certificate then holds for more than is allowed).
        method: "ibp": intervals layer by layer (norms other than linf by the box around them). "crown-ibp": linear
            bounds from the logits back to x over bends bounded by intervals. "crown": those too by linear bounds. Each
            result is the best of its own and the cheaper ones.
        batch_size: Rows at once; memory grows with rows x classes x the largest layer ("crown": 256 in place of the
            classes).
    Returns: BoundCertificate.
    Raises: IncompatibleModel: layers in train mode, or operations without a known bound, all listed.
        ThreatModelError, ConfigurationError: malformed arguments.
    Cost: In forward passes: "ibp" 2; "crown-ibp" about 2 + 2 x classes; "crown" about 2 x the number of features in
        front of bends behind the first layer.
    Source: Gowal et al. 2018 (IBP); Zhang et al. 2018 (CROWN) and 2020 (CROWN-IBP); Higham 2002, section 3.1
        (rounding).
    Example:
        >>> model = nn.Linear(2, 2, bias=False).eval()
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> x, y = torch.tensor([[0.9, 0.1], [0.6, 0.5]]), torch.tensor([0, 0])
        >>> certify_bounds(model, x, y, Threat("linf", 0.1)).verified.tolist()
        [True, False]
    """
    check_choice(method, METHODS, "method")
    check_kind(threat, Threat, "threat", 'Pass Threat("linf", eps)')
    check_int(batch_size, "batch_size")
    threat.check(x)
    check_labels(y, len(x))
    offenders = training_layers(model)
    if offenders:
        raise IncompatibleModel("Expected a model in eval mode.", offenders)
    graph = BoundGraph.of(model)
    with preserve(model), torch.inference_mode(False), torch.no_grad():
        freeze(model)
        parts = [
            _certify(model, graph, x[rows].detach(), y[rows], threat.rows(x, rows), method)
            for rows in torch.arange(len(x), device=x.device).split(batch_size)
        ]
    margins = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=x.device)
    return BoundCertificate(margins > 0, margins, threat, method)


def margin_forms(y: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Forms of the logits whose value is logit y less logit j: (N, K, K); the row j = y is zero."""
    eye = torch.eye(classes, dtype=dtype, device=y.device)
    return eye[y][:, None] - eye


def _certify(model: nn.Module, graph: BoundGraph, x: Tensor, y: Tensor, threat: Threat, method: Method) -> Tensor:
    """The smallest certified margin of each row, float64; -inf where a bound is not a number."""
    with naming_the_model(x):
        outputs = model(x)
    logits = check_logits(outputs, len(x))
    check_labels(y, len(x), logits.shape[1])
    _check_same(graph, x, logits)
    unit = 2 * _unit(model, x)
    region = Region.around(x.double(), threat, slack=4 * torch.finfo(x.dtype).eps)
    form = margin_forms(y, logits.shape[1], torch.float64)
    boxes = graph.boxes(region.box, unit=unit)
    margins = lowest_from_box(graph, boxes, form, unit=unit)
    last = len(graph.nodes) - 1
    if method != "ibp":
        margins = torch.maximum(margins, lowest(graph, boxes, last, form, region, unit=unit))
    if method == "crown":
        tight = crown_boxes(graph, region, unit=unit)
        margins = torch.maximum(margins, lowest(graph, tight, last, form, region, unit=unit))
    others = margins.scatter(1, y[:, None].to(margins.device), torch.inf)
    return others.amin(dim=1).nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def _check_same(graph: BoundGraph, x: Tensor, logits: Tensor) -> None:
    """The trace must answer as the model does: what it read wrongly in spite of all rules shows here."""
    again = graph.traced(x)
    size = logits.abs().amax() if logits.numel() else 0.0
    if again.shape != logits.shape or bool(((again - logits).abs() > 1e-3 * size).any()):
        found = "Expected a model that torch.fx reads as it runs; the outputs of the two differ."
        raise IncompatibleModel(f"{found} Take changes in place and branches on values out of forward.")


def _unit(model: nn.Module, x: Tensor) -> float:
    """Unit roundoff of the coarsest format among parameters and input."""
    kinds = {x.dtype, *(p.dtype for p in [*model.parameters(), *model.buffers()] if p.is_floating_point())}
    return max(torch.finfo(kind).eps / 2 for kind in kinds)
