"""Chapter 4: a guard in front of the model, calibrated at one percent of false positives."""

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from aidefend._core.evidence import Evidence
from aidefend._core.random import make_generator
from aidefend._core.stats import false_positive_interval, wilson
from aidefend.audit import SummaryRow
from aidefend.demo import figures
from aidefend.demo.world import Chapter, Tell, World, measured, percent, share_of, train
from aidefend.validate import Energy, Guard, Mahalanobis, NearestNeighbours

ALPHA = 0.01
HELD_OUT = 2_000


def inputs(world: World, tell: Tell) -> Chapter:
    """Hold digits back, calibrate on them, and measure on test digits and on five kinds of strange input."""
    x, y = world.rows("train")
    held = min(HELD_OUT, len(x) // 3)
    model = world.net("guarded net")
    train(model, TensorDataset(x[held:], y[held:]), epochs=6, seed=world.seed_of("guarded net"), name="guarded model")
    detectors = (Energy(), NearestNeighbours(k=50), Mahalanobis())
    guard = Guard.calibrate(model, x[:held], detectors=detectors, alpha=ALPHA, fit=x[held:], seed=world.seed)
    world.models["guarded"], world.facts["guard"] = model, guard
    clean, _ = world.rows("test")
    decision = guard(clean)
    alarms = int((~decision.accepted).sum())
    n = int(guard.facts.calibration_n)
    expected = false_positive_interval(ALPHA, n, len(clean), 0.99)
    share = wilson(alarms, len(clean))
    tell(
        f"false positives {percent(share.value)} on {len(clean)} test digits (99 % of exact guards: "
        f"{percent(expected.low)} to {percent(expected.high)})"
    )
    evidence = guard.to_evidence() + Evidence(
        [
            measured(
                "validate.false_positive_rate",
                "Test digits refused by the guard",
                share,
                len(clean),
                setting={
                    "alpha": ALPHA,
                    "calibration_n": n,
                    "expected_low": expected.low,
                    "expected_high": expected.high,
                },
            )
        ]
    )
    strange = _strange(world, clean)
    for name, rows in strange.items():
        caught = int((~guard(rows).accepted).sum())
        rate = wilson(caught, len(rows))
        tell(f"{name}: {percent(rate.value)} refused")
        evidence += Evidence([measured(_detected(name), f"Refused: {name}", rate, len(rows))])
    hard = _hard_refusals(guard, clean, tell)
    evidence += hard
    found = ", ".join(f"{name} {share_of(evidence[_detected(name)])}" for name in strange)
    refused = sum(bool(finding.value) for finding in hard.findings)
    row = SummaryRow(
        "abusive input",
        "rotated, noise, inverted, adversarial digits; NaN, wrong shape, huge batch",
        "the bare model has no check of its own",
        f"refused: {found}; {refused} of {len(hard.findings)} hard faults refused; clean {percent(share.value)}",
        "an attacker who knows the detectors can pass them; measured on attackable()",
    )
    p_values = {
        "test digits": decision.p_values["combined"],
        "inverted digits": guard(strange["inverted digits"]).p_values["combined"],
    }
    picture = figures.histogram(
        {name: row[torch.isfinite(row)].float() for name, row in p_values.items()},
        ("combined p-value", "share of rows"),
        "p-values are uniform on digits and collapse on strange input; rows below 0.01 are refused.",
    )
    return Chapter("Input validation", f"{_TEXT} {guard.summary()}", (row,), evidence, (picture,))


_TEXT = (
    "The guard checks shape, type, range and finiteness before any computation, then asks three detectors whether the "
    "input looks like the data it was calibrated on. One percent of clean inputs is the stated price."
)


def _detected(name: str) -> str:
    return f"validate.detected.{name.replace(' ', '_')}"


def _strange(world: World, clean: Tensor) -> dict[str, Tensor]:
    noise = torch.rand(clean.shape, generator=make_generator(seed=world.seed_of("noise")))
    found = {"rotated digits": clean.rot90(1, (2, 3)), "noise": noise, "inverted digits": 1 - clean}
    if "robustness" in world.facts:
        found["adversarial digits"] = world.facts["robustness"]["undefended"].x_adv
    return found


def _hard_refusals(guard: Guard, clean: Tensor, tell: Tell) -> Evidence:
    """One bad row among good ones, a wrong shape, a batch that would fill the memory (a view, so it costs nothing)."""
    spoiled = clean[:4].clone()
    spoiled[2, 0, 3, 3] = float("nan")
    attempts = {
        "nan": (spoiled, 1),
        "wrong_shape": (clean[:4, :, :20], 4),
        "huge_batch": (clean[:1].expand(10_000_000, -1, -1, -1), 10_000_000),
    }
    findings = []
    for name, (rows, expected) in attempts.items():
        decision = guard(rows)
        refused = int((~decision.accepted).sum())
        reason = next((reasons[0] for reasons in decision.reasons if reasons), "")
        tell(f"{name.replace('_', ' ')}: {refused} of {len(decision.accepted)} rows refused: {reason}")
        right = refused == min(expected, len(decision.accepted))
        findings.append(
            measured(
                f"validate.refused.{name}", f"Refused: {name.replace('_', ' ')}", right, setting={"reason": reason}
            )
        )
    return Evidence(findings)
