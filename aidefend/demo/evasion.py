"""Chapter 2: adversarial examples against three ways to train the same network."""

from aidefend._core.evidence import Evidence
from aidefend._core.threat import Threat
from aidefend.adversarial import TRADES, PGDTraining
from aidefend.attacks import PGD
from aidefend.audit import SummaryRow, evaluate_robustness, plot_examples, plot_robustness
from aidefend.demo.world import Chapter, Schedule, Tell, World, between, plain_loss, renamed, train

THREAT = Threat("linf", 0.2)
CURVE = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)


def evasion(world: World, tell: Tell) -> Chapter:
    """Train undefended, with PGD and with TRADES; attack each with a cascade; report the worst case for each digit."""
    objectives: dict[str, Schedule] = {
        "undefended": lambda done: plain_loss,
        "PGD training": lambda done: PGDTraining(_inner(done)),
        "TRADES": lambda done: TRADES(_inner(done), beta=6.0),
    }
    results, evidence = {}, Evidence()
    for name, objective in objectives.items():
        model = world.net("evasion net")
        train(
            model,
            world.train,
            epochs=7,
            seed=world.seed_of("evasion order"),
            objective=objective,
            rate=15e-3,
            name=name,
        )
        result = evaluate_robustness(model, world.test, THREAT, seed=world.seed, curve=CURVE)
        results[name], world.models[name] = result, model
        evidence += Evidence(renamed(finding, name) for finding in result.to_evidence().findings)
        tell(f"{name}: {'; '.join(result.summary().splitlines()[:2])}")
    worst = {name: between(r.robust_accuracy, r.interval.low, r.interval.high) for name, r in results.items()}
    clean = {name: f"{100 * result.clean_accuracy:.1f} %" for name, result in results.items()}
    row = SummaryRow(
        "adversarial examples",
        f"worst of four attacks, {THREAT}",
        f"{worst['undefended']} worst case, {clean['undefended']} clean",
        f"TRADES {worst['TRADES']} worst case, {clean['TRADES']} clean; PGD training {worst['PGD training']}",
        "an upper bound of the true robustness; other threat models are not covered",
    )
    world.facts["robustness"] = results
    x, _ = world.rows("test")
    shown = {name: results[name] for name in ("undefended", "TRADES")}
    pictures = (plot_robustness(results), plot_examples(x, shown))
    return Chapter("Adversarial examples", _TEXT, (row,), evidence, pictures)


_TEXT = (
    "Every pixel may change by up to 0.2. The undefended network is wrong almost everywhere. In the same loop, one "
    "line replaces the criterion by an objective that trains against the worst perturbation."
)


def _inner(done: float) -> PGD:
    """The attack inside the objective; its radius grows over the first 15 % of the training."""
    return PGD(THREAT.with_eps(0.2 * min(1.0, done / 0.15)), steps=3)
