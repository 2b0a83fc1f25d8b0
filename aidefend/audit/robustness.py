"""Worst-case accuracy of any model under a cascade of attacks, with checks that the attacks were not fooled."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_number, refuse
from aidefend._core.modules import Model, preserve, training_layers
from aidefend._core.stats import wilson
from aidefend._core.threat import Threat
from aidefend.attacks.evasion import APGD, FMN, PGD, HopSkipJump, SigmaZero, Square
from aidefend.audit import masking
from aidefend.audit.cascade import Cascade
from aidefend.audit.effort import EFFORTS, Budget, Effort
from aidefend.audit.robustness_bench import Bench, MakeAttack
from aidefend.audit.robustness_result import CurvePoint, MaskingCheck, NormQuantile, Robustness

_DOUBLINGS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def evaluate_robustness(
    model: Model,
    data: Any,
    threat: Threat,
    budget: Budget = "standard",
    seed: int = 0,
    *,
    batch_size: int = 256,
    curve: Sequence[float] = (),
    resume: str | Path | None = None,
) -> Robustness:
    """Attack every row with ever stronger attacks until it breaks; report what stands and whether to believe it.

    The model is judged as it is given. Layers in train mode, probabilities in the place of logits, outputs that are
    random or depend on batch mates, zero or saturated gradients and their kin are failed checks: the verdict is then
    not trustworthy, and says so. Outputs with NaN count as wrong. Where outputs are random, a success counts only if it
    repeats in most of ten fresh passes.

    Guarantee: the robust accuracy is an upper bound of the true one: every row counted as broken has a point in `x_adv`
        that was seen misclassified inside the threat. That no stronger attack exists is not shown. The model and all
        random streams are as before, also after an exception.
    Args:
        model: Callable from x to logits (N, K), K >= 2.
        data: (x, y) tensors, a Dataset, a DataLoader or an iterable of batches; read once, kept in memory.
        threat: What the adversary may do, in any norm, also on tables. An eps by sample follows the order of the data.
        budget: "quick": FGSM, PGD-10, APGD-20 (cross-entropy), APGD-30 (margin), 100 queries of Square. "standard":
            FGSM, PGD-20, APGD-50, APGD-100, FMN-100 inside the threat and free to leave it on its way, targeted APGD-50
            against the four likeliest classes, 500 queries of Square. "thorough": FGSM, PGD-50, APGD-100, APGD-100 with
            5 restarts each, FMN-300 in both ways, targeted APGD-100 against the nine likeliest classes, 5,000 queries
            of Square, and HopSkipJump-20 on 100 standing rows. In l0 Sigma-zero takes the place of FMN; l1 and l0 have
            no attack by queries. APGD goes on from the points of Square; where the two break more than 0.2 points that
            the gradient attacks before them left, or a check fails, they run again with five times the queries (quick:
            ten; thorough: twice). Where rows have no gradient, they come right after the first PGD.
            Where twice the steps break one of the rows that a check tries, all rows that stand get them.
        seed: Each row's random numbers come from this and the row's content: neither order nor batch size matters
            (up to the rounding of the model's own arithmetic).
        batch_size: Rows a pass.
        curve: Radii >= 0 for accuracy over eps by the strongest stage, on at most 200 (thorough: 1000) rows; needs one
            eps for all rows. By default eps times 1/4, 1/2, 1, 2, 4, 8 up to the range of the data, from the smallest
            perturbations that FMN and the stages found on 100 (quick: 50, thorough: 1,000) rows.
        resume: A folder in which finished parts are kept: call again with the same arguments after an interruption and
            only the rest is computed. Emptied at the end. Whoever can write to it can forge the result.
    Returns: Robustness.
    Raises: ConfigurationError, ThreatModelError: malformed arguments. AidefendError: the model raised.
    Cost: In forward and backward passes to the input, for a row that never breaks: quick about 80 and 100 forward,
        standard about 620 and 500 forward, thorough about 3,300 and 5,000 forward, with 6,800 more for each of the 100
        rows of HopSkipJump; a row leaves when it breaks. Checks, curve and smallest perturbations add, for each of 100,
        200 or 1,000 rows, about three times the margin stage.
    Source: Croce, Hein 2020 (ensemble, worst case by row); Carlini et al. 2019 (checks).
    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> data = (torch.tensor([[0.9, 0.1], [0.55, 0.5]]), torch.tensor([0, 0]))
        >>> result = evaluate_robustness(model, data, Threat("linf", 0.1), budget="quick")
        >>> result.clean_accuracy, result.robust_accuracy
        (1.0, 0.5)
    """
    check_choice(budget, tuple(EFFORTS), "budget")
    radii = _check_curve(curve, threat)
    with preserve(model):
        bench = Bench.of(model, data, threat, seed, batch_size).resuming(resume, budget)
        repeatable = masking.check_repeatable(bench, _check_rows(bench, EFFORTS[budget]))
        cascade = Cascade(dataclasses.replace(bench, random=repeatable.outcome == "fail"))
        result = _evaluate(cascade, budget, radii, repeatable)
    bench.parts.forget()
    return result


def _evaluate(cascade: Cascade, budget: Budget, radii: tuple[float, ...], repeatable: MaskingCheck) -> Robustness:
    effort, rows = EFFORTS[budget], _check_rows(cascade.bench, EFFORTS[budget])
    zero, saturated = masking.check_gradients(cascade.bench, rows)
    by_gradient, by_query = _run_stages(cascade, effort, blind=zero.outcome == "fail")
    always = [*_basic_checks(cascade.bench, rows, repeatable), zero, saturated]
    checks = {check.name: check for check in [*always, *_strength_checks(cascade, effort, rows, by_gradient)]}
    first, deeper = (None, 0) if by_query is None else by_query
    if first is not None and any(check.outcome == "fail" for check in checks.values()):
        deeper += _more_queries(cascade, effort)
    checks["black_box_beats_white_box"] = masking.check_black_box(first, len(cascade.robust), deeper)
    distances = _smallest_perturbations(cascade, effort)
    usual = _usual_curve(cascade.bench, distances)
    checks["flat_curve"] = masking.check_flat_curve(usual)
    points = _accuracy_over_eps(cascade, effort, radii) if radii else usual
    return cascade.result(checks, points, _quantiles(distances), budget)


def _check_rows(bench: Bench, effort: Effort) -> Tensor:
    return bench.subset(bench.correct.nonzero()[:, 0], effort.check_rows)


def _run_stages(cascade: Cascade, effort: Effort, *, blind: bool) -> tuple[Tensor, tuple[int, int] | None]:
    """All stages, cheap first: rows that gradients broke, (N,) bool, and how many broke to queries after them.

    The latter by the first and by the deeper search; None where there is no attack by queries. `blind`: there are rows
    without a gradient, so that queries come early.
    """
    restarts, threat, before = effort.restarts, cascade.bench.threat, cascade.robust.clone()
    has_queries = threat.norm in ("linf", "l2")
    cascade.attack("FGSM", lambda threat: PGD(threat, steps=1, random_start=False))
    cascade.attack(f"PGD-{effort.pgd_steps}", lambda threat: PGD(threat, effort.pgd_steps, restarts=restarts))
    by_query = torch.zeros_like(before)
    if has_queries and blind:
        by_query, counts = _run_queries(cascade, effort)
    name = f"APGD-CE-{effort.apgd_steps}"
    cascade.attack(name, lambda threat: APGD(threat, effort.apgd_steps, restarts=restarts))
    cascade.attack(*_strongest(effort, effort.margin_steps))
    if effort.norm_steps:
        cascade.attack(*_minimum_norm(effort.norm_steps, threat))
        _seek_smallest(cascade, cascade.standing, effort.norm_steps)
    if effort.targets:
        cascade.attack(*_targeted(effort.targeted_steps, effort.targets))
    if has_queries and not blind:
        by_query, counts = _run_queries(cascade, effort)
    return before & ~cascade.robust & ~by_query, counts if has_queries else None


def _run_queries(cascade: Cascade, effort: Effort) -> tuple[Tensor, tuple[int, int]]:
    """The stages that see outputs alone: the rows that they broke, (N,) bool; by the first and the deeper search."""
    by_query, broken = _query_and_climb(cascade, effort, effort.queries)
    deeper = torch.zeros_like(by_query)
    if masking.black_box_leads(broken, len(by_query)):
        deeper, _ = _query_and_climb(cascade, effort, effort.more_queries)
    if effort.decision_rows and cascade.bench.threat.bounded:
        rows = cascade.bench.subset(cascade.standing, effort.decision_rows)
        broken_rows = cascade.attack("HopSkipJump-20", lambda threat: HopSkipJump(threat, steps=20), rows)
        by_query[rows[broken_rows]] = True
    return by_query | deeper, (int(by_query.sum()), int(deeper.sum()))


def _more_queries(cascade: Cascade, effort: Effort) -> int:
    """Where gradients are in doubt: how many rows the deeper search by queries breaks, if it was not made yet."""
    name, _ = _square(effort.more_queries)
    if any(stage.name == name for stage in cascade.stages):
        return 0
    return int(_query_and_climb(cascade, effort, effort.more_queries)[0].sum())


def _query_and_climb(cascade: Cascade, effort: Effort, queries: int) -> tuple[Tensor, int]:
    """Square, then gradients from where it stands, where they may lead on: rows broken by queries, and all broken."""
    before = cascade.robust.clone()
    cascade.attack(*_square(queries))
    by_query = before & ~cascade.robust
    _, make = _strongest(effort, effort.apgd_steps)
    climbed = cascade.attack(f"APGD-{effort.apgd_steps} from Square-{queries}", make, begin_at=cascade.x_adv)
    return by_query, int(by_query.sum() + climbed.sum())


def _square(queries: int) -> tuple[str, MakeAttack]:
    return f"Square-{queries}", lambda threat: Square(threat, queries)


def _strongest(effort: Effort, steps: int) -> tuple[str, MakeAttack]:
    """The best single attack."""
    restarts = effort.restarts
    return f"APGD-margin-{steps}", lambda threat: APGD(threat, steps, restarts=restarts, loss="margin")


def _targeted(steps: int, targets: int) -> tuple[str, MakeAttack]:
    return f"APGD-T-{steps}x{targets}", lambda threat: APGD(threat, steps, loss="dlr", targets=targets)


def _minimum_norm(steps: int, threat: Threat) -> tuple[str, MakeAttack]:
    if threat.norm == "l0" and threat.bounded:
        return f"SigmaZero-{steps}", lambda allowed: SigmaZero(allowed, steps)
    return f"FMN-{steps}", lambda allowed: FMN(allowed, steps)


def _basic_checks(bench: Bench, rows: Tensor, repeatable: MaskingCheck) -> list[MaskingCheck]:
    """What the model itself shows, without an attack."""
    return [
        masking.check_modes(bench),
        masking.check_logits_kind(bench),
        repeatable,
        masking.check_batch_mates(bench, rows, repeatable),
    ]


def _strength_checks(cascade: Cascade, effort: Effort, rows: Tensor, by_gradient: Tensor) -> list[MaskingCheck]:
    """Signs that the attacks were too weak for the rows that stand; what they break on the way counts as broken."""
    bench = cascade.bench
    if len(cascade.standing) == 0:
        return masking.nothing_stands()
    by_single = _single_step(cascade, effort.check_rows)
    points, by_noise = bench.noise("noise", rows, effort.noise_draws)
    cascade.found("noise (check)", rows, points, by_noise, effort.noise_draws * len(rows))
    return [
        masking.check_noise(by_noise, by_gradient[rows]),
        masking.check_single_step(bench, by_single, effort.pgd_steps),
        _more_steps(cascade, effort),
        masking.check_large_eps(bench, rows, effort.apgd_steps),
    ]


def _single_step(cascade: Cascade, count: int) -> Tensor:
    """Rows that one step breaks: at most `count`."""
    bench = cascade.bench
    broken = (cascade.correct & ~cascade.robust).nonzero()[:, 0]
    rows = bench.subset(broken, count)
    result = bench.attack("FGSM again", lambda threat: PGD(threat, steps=1, random_start=False), rows)
    return rows[result.success]


def _more_steps(cascade: Cascade, effort: Effort) -> MaskingCheck:
    """Twice the steps of the strongest stage, from new starts, on a part of the rows that stand.

    Where they break one of these, the others get them too.
    """
    count, n = int(cascade.robust.sum()), len(cascade.robust)
    before = wilson(count, n)
    rows = cascade.bench.subset(cascade.standing, effort.check_rows)
    name, make = _strongest(effort, 2 * effort.margin_steps)
    broken = cascade.attack(f"{name} (check)", make, rows)
    others = cascade.standing[~torch.isin(cascade.standing, rows)]
    if bool(broken.any()) and len(others):
        cascade.attack(f"{name} (rest)", make, others)
    return masking.check_steps(before.value, before.low, len(rows), int(broken.sum()))


def _seek_smallest(cascade: Cascade, rows: Tensor, steps: int) -> None:
    """A minimum-norm attack whose path may leave the radius of the threat: the smallest distances, and what it breaks.

    Not in train mode, whose layers may refuse the last row that stands, nor where the data has no finite range.
    """
    bench, radius = cascade.bench, masking.whole_radius(cascade.bench)
    if radius is None or training_layers(bench.model):
        return
    name, make = _minimum_norm(steps, bench.threat)
    result = bench.attack(f"{name} (smallest)", make, rows, bench.threat.with_eps(radius), goal="min_norm")
    distance = bench.threat.distance(result.x_adv, bench.x[rows]).double()
    inside = result.success & bench.threat.rows(bench.x, rows).contains(result.x_adv, bench.x[rows])
    passes = int(result.forwards.sum()), int(result.backwards.sum())
    cascade.found(f"{name} (smallest)", rows, result.x_adv, inside, *passes)
    cascade.distance[rows] = torch.where(result.success, distance, torch.inf)


def _smallest_perturbations(cascade: Cascade, effort: Effort) -> Tensor | None:
    """The smallest distance known to fool the model, on a part of the rows: 0 for wrong ones, inf where none was found.

    None where none can be sought.
    """
    bench = cascade.bench
    rows = bench.subset(torch.arange(len(bench.x), device=bench.x.device), effort.curve_rows)
    _seek_smallest(cascade, rows[cascade.distance[rows].isnan()], effort.curve_steps)
    distance = cascade.distance[rows]
    if bool(distance.isnan().any()):
        return None
    known = torch.where(cascade.robust[rows], torch.inf, bench.threat.distance(cascade.x_adv[rows], bench.x[rows]))
    return torch.minimum(distance, known).sort().values


def _quantiles(distances: Tensor | None) -> tuple[NormQuantile, ...]:
    if distances is None:
        return ()
    n = len(distances)
    return tuple(NormQuantile(share, float(distances[min(n - 1, int(share * n))]), n) for share in _QUANTILES)


def _usual_curve(bench: Bench, distances: Tensor | None) -> tuple[CurvePoint, ...]:
    """Accuracy around eps: the share of rows that no known perturbation of that size fools."""
    radius = masking.whole_radius(bench)
    if distances is None or radius is None or isinstance(bench.threat.eps, Tensor) or bench.threat.eps == 0:
        return ()
    eps, n = float(bench.threat.eps), len(distances)
    radii = [eps * share for share in _DOUBLINGS if eps * share <= radius or share <= 1]
    stands = [int((distances > size * (1 + 1e-6)).sum()) for size in radii]
    return tuple(CurvePoint(size, *wilson(count, n), n) for size, count in zip(radii, stands, strict=True))


def _accuracy_over_eps(cascade: Cascade, effort: Effort, radii: tuple[float, ...]) -> tuple[CurvePoint, ...]:
    """The strongest stage at each radius, on the rows that stand at all smaller ones.

    Rows that stand at the threat's own eps stand below it too.
    """
    bench, eps = cascade.bench, float(cascade.bench.threat.eps)
    rows = bench.subset(torch.arange(len(bench.x), device=bench.x.device), max(200, effort.check_rows))
    stands, points = cascade.correct[rows].clone(), []
    for radius in sorted({*radii, eps}):
        if radius > 0:
            known = cascade.robust[rows] if radius <= eps else torch.zeros_like(stands)
            stands = stands & cascade.robust[rows] if radius >= eps else stands
            open_rows = (stands & ~known).nonzero()[:, 0]
            _, make = _strongest(effort, effort.apgd_steps)
            result = bench.attack(f"curve {radius:g}", make, rows[open_rows], bench.threat.with_eps(radius))
            stands[open_rows[result.success]] = False
        points.append(CurvePoint(radius, *wilson(int(stands.sum()), len(rows)), len(rows)))
    return tuple(points)


def _check_curve(curve: Any, threat: Threat) -> tuple[float, ...]:
    if isinstance(curve, str | bytes | Mapping | Tensor) or not isinstance(curve, Iterable):
        raise refuse("a sequence of radii", "curve", curve, "Pass for example curve=(0.1, 0.2)")
    radii = tuple(check_number(radius, "curve", 0.0) for radius in curve)
    if radii and not isinstance(getattr(threat, "eps", None), int | float):
        raise refuse("one eps for all rows where a curve is asked for", "eps", threat.eps, "Leave out curve=")
    return radii
