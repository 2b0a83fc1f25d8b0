"""Chapter 7: why the backdoored model decided as it did."""

import torch

from aidefend._core.evidence import Evidence
from aidefend._core.random import make_generator
from aidefend._core.stats import false_positive_interval, wilson
from aidefend.audit import SummaryRow
from aidefend.audit.drawing import images
from aidefend.demo import figures
from aidefend.demo.world import Chapter, Tell, World, measured, percent, predictions
from aidefend.explain import attribute, attribution_anomaly, influence

ALPHA = 0.05


def explaining(world: World, tell: Tell) -> Chapter:
    """Attribute triggered decisions, test whether they rest on unusual places, name the training samples behind one."""
    model, poisoned = world.models["backdoored"], world.facts["poisoned"]
    x, y = world.rows("test")
    # by chance: writers follow one another in the file, and the false-alarm rate holds for exchangeable rows only
    order = torch.randperm(len(x), generator=make_generator(seed=world.seed_of("reference")))
    known, new = order.tensor_split(2)
    reference, fresh = x[known], x[new]
    target = int(predictions(model, poisoned.trigger(fresh)).mode().values)
    stamped = poisoned.trigger(fresh[y[new] != target])
    found = {
        "clean": attribution_anomaly(model, fresh, reference, alpha=ALPHA, seed=world.seed),
        "triggered": attribution_anomaly(model, stamped, reference, alpha=ALPHA, seed=world.seed),
    }
    shares = {name: wilson(int((~report.keep).sum()), len(report)) for name, report in found.items()}
    exact = false_positive_interval(ALPHA, len(reference) // 2, len(fresh), 0.99)
    expected = f"{percent(exact.low)} to {percent(exact.high)}"
    tell(f"triggered digits whose decision rests on unusual places: {percent(shares['triggered'].value)}")
    tell(f"clean digits: {percent(shares['clean'].value)} (99 % of exact tests at {percent(ALPHA)}: {expected})")
    behind = influence(model, poisoned.dataset, stamped[:20], torch.full((20,), target), top=10, normalised=True)
    bad = poisoned.is_poison[behind.helpful]
    share = wilson(int(bad.sum()), bad.numel())
    tell(f"of the ten training samples most behind each triggered decision, {percent(share.value)} are poison")
    evidence = Evidence(
        [
            measured(
                "explain.anomaly.triggered",
                "Triggered decisions found unusual",
                shares["triggered"],
                len(stamped),
                setting={"alpha": ALPHA},
            ),
            measured(
                "explain.anomaly.clean",
                "Clean decisions found unusual",
                shares["clean"],
                len(fresh),
                setting={
                    "alpha": ALPHA,
                    "calibration_n": len(reference) // 2,
                    "expected_low": exact.low,
                    "expected_high": exact.high,
                },
            ),
            measured("explain.influence_poison_share", "Poison among the most influential samples", share, bad.numel()),
        ]
    )
    row = SummaryRow(
        "explainability",
        "a triggered decision, to be explained",
        "a class and a confidence",
        f"{percent(shares['triggered'].value)} of triggered decisions flagged ({percent(shares['clean'].value)} of "
        f"clean, exact tests {expected}); {percent(share.value)} of the samples behind them are poison",
        "attributions can be fooled; they are for auditors, not for clients",
    )
    view = attribute(model, stamped[:8], target)
    samples = torch.stack([poisoned.dataset[int(i)][0] for i in behind.helpful[0, :8]])
    pictures = (
        figures.maps(stamped[:8], view.values, "Triggered digits and what speaks for the attacker's class (red)."),
        images([stamped[:1], samples], "A triggered digit, and the training samples most behind the decision on it."),
    )
    return Chapter("Explainability", _TEXT, (row,), evidence, pictures)


_TEXT = (
    "An auditor asks why a triggered digit became the attacker's class. The attribution points at the patch, a test "
    "with a stated false-alarm rate says that this is unusual, and the influential training samples are the poison."
)
