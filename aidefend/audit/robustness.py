"""Worst-case accuracy of any model under a cascade of attacks, with checks that the attacks were not fooled."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_number, refuse
from aidefend._core.modules import Model, preserve
from aidefend._core.stats import wilson
from aidefend._core.threat import Threat
from aidefend.attacks.evasion import APGD, PGD
from aidefend.audit import masking
from aidefend.audit.robustness_bench import Bench, MakeAttack
from aidefend.audit.robustness_result import CurvePoint, Robustness, Stage

Budget = Literal["quick", "standard", "thorough"]


@dataclasses.dataclass(frozen=True)
class _Effort:
    pgd_steps: int
    apgd_steps: int
    margin_steps: int
    restarts: int
    check_rows: int
    noise_draws: int


_EFFORTS = {
    "quick": _Effort(10, 20, 30, 1, 100, 10),
    "standard": _Effort(20, 50, 100, 1, 200, 20),
    "thorough": _Effort(50, 100, 100, 5, 1000, 50),
}


def evaluate_robustness(
    model: Model,
    data: Any,
    threat: Threat,
    budget: Budget = "standard",
    seed: int = 0,
    *,
    batch_size: int = 256,
    curve: Sequence[float] = (),
) -> Robustness:
    """Attack every row with ever stronger attacks until it breaks; report what stands and whether to believe it.

    The model is judged as it is given. Layers in train mode, probabilities in the place of logits, outputs that are
    random or depend on batch mates, zero or saturated gradients and their kin are failed checks: the verdict is then
    not trustworthy, and says so. Outputs with NaN count as wrong.

    Guarantee: the robust accuracy is an upper bound of the true one: every row counted as broken has a point in `x_adv`
        that was seen misclassified inside the threat. That no stronger attack exists is not shown. The model and all
        random streams are as before, also after an exception.
    Args:
        model: Callable from x to logits (N, K), K >= 2.
        data: (x, y) tensors, a Dataset, a DataLoader or an iterable of batches; read once, kept in memory.
        threat: What the adversary may do, linf or l2. An eps by sample follows the order of the data.
        budget: "quick": FGSM, PGD-10, APGD-20 (cross-entropy), APGD-30 (margin). "standard": FGSM, PGD-20, APGD-50,
            APGD-100. "thorough": FGSM, PGD-50, APGD-100, APGD-100, with 5 restarts each.
        seed: Each row's random numbers come from this and the row's content: neither order nor batch size matters
            (up to the rounding of the model's own arithmetic).
        batch_size: Rows a pass.
        curve: Radii >= 0 for accuracy over eps, on at most 200 (thorough: 1000) rows; needs one eps for all rows.
    Returns: Robustness.
    Raises: ConfigurationError, ThreatModelError: malformed arguments. AidefendError: the model raised.
    Cost: In forward and backward passes to the input, for a row that never breaks: quick 61, standard 171, thorough
        1,255; a row leaves when it breaks. The checks add at most: quick 100 rows, standard 200, thorough 1,000, each
        with about four times the last stage. A curve adds the last stage for each radius and row.
    Source: Croce, Hein 2020 (ensemble, worst case by row); Carlini et al. 2019 (checks).
    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> data = (torch.tensor([[0.9, 0.1], [0.55, 0.5]]), torch.tensor([0, 0]))
        >>> result = evaluate_robustness(model, data, Threat("linf", 0.1), budget="quick")
        >>> result.clean_accuracy, result.robust_accuracy
        (1.0, 0.5)
    """
    check_choice(budget, tuple(_EFFORTS), "budget")
    radii = _check_curve(curve, threat)
    with preserve(model):
        bench = Bench.of(model, data, threat, seed, batch_size)
        cascade = _Cascade(bench)
        effort = _EFFORTS[budget]
        _run_stages(cascade, effort)
        checks = _run_checks(cascade, effort)
        points = _accuracy_over_eps(cascade, effort, radii)
    return cascade.result(checks, points, budget)


class _Cascade:
    """Which rows stand, the worst point of each, and the stages so far."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.correct = bench.correct
        self.robust = self.correct.clone()
        self.x_adv = bench.x.clone()
        self.stages: list[Stage] = []
        self._log("clean", len(bench.x), int((~self.correct).sum()), len(bench.x), 0)

    @property
    def standing(self) -> Tensor:
        """Rows that nothing has broken yet."""
        return self.robust.nonzero()[:, 0]

    def attack(self, name: str, make: MakeAttack, rows: Tensor | None = None) -> Tensor:
        """One stage on the standing rows, or on these of them: which of them it broke."""
        rows = self.standing if rows is None else rows
        result = self.bench.attack(name, make, rows)
        self.x_adv[rows] = result.x_adv
        self.robust[rows] = ~result.success
        passes = int(result.forwards.sum()), int(result.backwards.sum())
        self._log(name, len(rows), int(result.success.sum()), *passes)
        return result.success

    def found(self, name: str, rows: Tensor, points: Tensor, broken: Tensor, forwards: int) -> None:
        """Points that were found without a gradient: standing rows that they break are broken."""
        newly = broken & self.robust[rows]
        self.x_adv[rows[newly]] = points[newly]
        self.robust[rows[newly]] = False
        self._log(name, len(rows), int(newly.sum()), forwards, 0)

    def result(
        self, checks: dict[str, masking.MaskingCheck], points: tuple[CurvePoint, ...], budget: str
    ) -> Robustness:
        """The verdict."""
        bench, n = self.bench, len(self.robust)
        clean, robust = wilson(int(self.correct.sum()), n), wilson(int(self.robust.sum()), n)
        return Robustness(
            clean.value, robust.value, robust, clean, n, checks, self.robust, self.x_adv, bench.ids,
            tuple(self.stages), points, bench.threat, budget, bench.seed,
        )  # fmt: skip

    def _log(self, name: str, attacked: int, broken: int, forwards: int, backwards: int) -> None:
        accuracy = float(self.robust.double().mean())
        self.stages.append(Stage(name, attacked, broken, accuracy, forwards, backwards))


def _run_stages(cascade: _Cascade, effort: _Effort) -> None:
    restarts = effort.restarts
    cascade.attack("FGSM", lambda threat: PGD(threat, steps=1, random_start=False))
    cascade.attack(f"PGD-{effort.pgd_steps}", lambda threat: PGD(threat, effort.pgd_steps, restarts=restarts))
    cascade.attack(f"APGD-CE-{effort.apgd_steps}", lambda threat: APGD(threat, effort.apgd_steps, restarts=restarts))
    cascade.attack(f"APGD-margin-{effort.margin_steps}", _strongest(effort, effort.margin_steps))


def _strongest(effort: _Effort, steps: int) -> MakeAttack:
    return lambda threat: APGD(threat, steps, restarts=effort.restarts, loss="margin")


def _run_checks(cascade: _Cascade, effort: _Effort) -> dict[str, masking.MaskingCheck]:
    """All checks; what they break on the way counts as broken."""
    bench = cascade.bench
    rows = bench.subset(cascade.correct.nonzero()[:, 0], effort.check_rows)
    repeatable = masking.check_repeatable(bench, rows)
    by_single = _single_step(cascade, effort.check_rows)
    by_gradient = ~cascade.robust[rows]
    points, by_noise = bench.noise("noise", rows, effort.noise_draws)
    cascade.found("noise (check)", rows, points, by_noise, effort.noise_draws * len(rows))
    checks = [
        masking.check_modes(bench),
        masking.check_logits_kind(bench),
        repeatable,
        masking.check_batch_mates(bench, rows, repeatable),
        *masking.check_gradients(bench, rows),
        masking.check_noise(by_noise, by_gradient),
        masking.check_single_step(bench, by_single, effort.pgd_steps),
        _more_steps(cascade, effort),
        masking.check_large_eps(bench, rows, effort.apgd_steps),
    ]
    return {check.name: check for check in checks}


def _single_step(cascade: _Cascade, count: int) -> Tensor:
    """Rows that one step breaks: at most `count`."""
    bench = cascade.bench
    broken = (cascade.correct & ~cascade.robust).nonzero()[:, 0]
    rows = bench.subset(broken, count)
    result = bench.attack("FGSM", lambda threat: PGD(threat, steps=1, random_start=False), rows)
    return rows[result.success]


def _more_steps(cascade: _Cascade, effort: _Effort) -> masking.MaskingCheck:
    """Twice the steps of the last stage, from new starts, on a part of the rows that stand."""
    count, n = int(cascade.robust.sum()), len(cascade.robust)
    before = wilson(count, n)
    rows = cascade.bench.subset(cascade.standing, effort.check_rows)
    steps = 2 * effort.margin_steps
    broken = cascade.attack(f"APGD-margin-{steps} (check)", _strongest(effort, steps), rows)
    return masking.check_steps(before.value, before.low, len(rows), int(broken.sum()))


def _accuracy_over_eps(cascade: _Cascade, effort: _Effort, radii: tuple[float, ...]) -> tuple[CurvePoint, ...]:
    """The last stage at each radius, on the rows that stand at all smaller ones.

    Rows that stand at the threat's own eps stand below it too.
    """
    if not radii:
        return ()
    bench, eps = cascade.bench, float(cascade.bench.threat.eps)
    rows = bench.subset(torch.arange(len(bench.x), device=bench.x.device), max(200, effort.check_rows))
    stands, points = cascade.correct[rows].clone(), []
    for radius in sorted({*radii, eps}):
        if radius > 0:
            known = cascade.robust[rows] if radius <= eps else torch.zeros_like(stands)
            stands = stands & cascade.robust[rows] if radius >= eps else stands
            open_rows = (stands & ~known).nonzero()[:, 0]
            make = _strongest(effort, effort.apgd_steps)
            result = bench.attack(f"curve {radius:g}", make, rows[open_rows], bench.threat.with_eps(radius))
            stands[open_rows[result.success]] = False
        points.append(CurvePoint(radius, *wilson(int(stands.sum()), len(rows)), len(rows)))
    return tuple(points)


def _check_curve(curve: Any, threat: Threat) -> tuple[float, ...]:
    if isinstance(curve, str | int | float):
        raise refuse("a sequence of radii", "curve", curve, "Pass for example curve=(0.1, 0.2)")
    radii = tuple(check_number(radius, "curve", 0.0) for radius in curve)
    if radii and not isinstance(getattr(threat, "eps", None), int | float):
        raise refuse("one eps for all rows where a curve is asked for", "eps", threat.eps, "Leave out curve=")
    return radii
