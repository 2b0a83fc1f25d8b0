"""Chapter 8: one organisation's finding cleans another's data; hostile clients do not steer the joint model."""

import json
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from aidefend._core.evidence import Evidence
from aidefend._core.random import secure_uniform
from aidefend._core.stats import wilson
from aidefend.attacks.poisoning import Patch
from aidefend.audit import SummaryRow
from aidefend.collaborate import aggregate, apply_indicators, artifact_indicator, from_stix, to_stix, trigger_indicator
from aidefend.demo.world import Chapter, Tell, World, accuracy, measured, percent, plain_loss, stacked

ROUNDS, CLIENTS = 12, 5


def sharing(world: World, tell: Tell) -> Chapter:
    """Export the trigger as STIX, clean a second data set with it; aggregate five clients of whom one is hostile."""
    evidence, caught = _indicators(world, tell)
    accuracies = {method: _federated(world, method) for method in ("mean", "multi-krum")}
    for method, value in accuracies.items():
        tell(f"five clients, one hostile, {method}: accuracy {percent(value)}")
        finding = measured(
            f"collaborate.accuracy.{method}",
            f"Joint model by {method}, one of five hostile",
            value,
            n=len(world.test),
        )
        evidence += Evidence([finding])
    row = SummaryRow(
        "collaborative defense",
        "the same trigger at a partner; one hostile client of five",
        f"mean: {percent(accuracies['mean'])} accuracy",
        f"partner finds {caught} poisoned samples by the indicator; multi-krum: {percent(accuracies['multi-krum'])}",
        "an indicator finds this trigger only; two hostile clients of five are too many",
    )
    return Chapter("Collaboration", _TEXT, (row,), evidence)


_TEXT = (
    "The first organisation shares no sample: a keyed hash of the trigger window travels in a STIX 2.1 bundle. The "
    "second one checks the bundle as hostile and finds the same trigger in its data. Then five clients train together."
)


def _indicators(world: World, tell: Tell) -> tuple[Evidence, str]:
    poisoned, report = world.facts["poisoned"], world.facts["screening"]
    key = secure_uniform(4).tobytes()
    suspects, _ = stacked(report.quarantine(poisoned.dataset))
    kept, _ = stacked(report.view(poisoned.dataset))
    found = [trigger_indicator(suspects, kept[:1000], key)]
    if "malicious digest" in world.facts:
        found.append(artifact_indicator(world.facts["malicious digest"], "pickle that runs a command"))
    text = json.dumps(to_stix(report.to_evidence(), found, tlp="green", producer="first organisation"))
    shared = from_stix(text)
    other = Patch(target=3, rate=0.02).poison(world.test, seed=world.seed_of("partner"))
    x, _ = stacked(other.dataset)
    score = apply_indicators(shared.indicators, key).score({"x": x})
    hits, wrong = int(((score > 0) & other.is_poison).sum()), int(((score > 0) & ~other.is_poison).sum())
    total = int(other.is_poison.sum())
    tell(
        f"a bundle of {len(text)} bytes, {len(shared.indicators)} indicators; "
        f"the partner finds {hits} of {total}, {wrong} wrongly"
    )
    clean = len(x) - total
    findings = [
        measured("collaborate.poison_found", "Partner's poison found by the indicator", wilson(hits, total), total),
        measured("collaborate.clean_flagged", "Partner's clean samples flagged", wilson(wrong, clean), clean),
    ]
    return Evidence(findings), f"{hits} of {total}"


def _federated(world: World, method: str) -> float:
    """Rounds of one local epoch each; the hostile client sends its update reversed and enlarged."""
    x, y = world.rows("train")
    parts = [TensorDataset(x[i::CLIENTS][:400], y[i::CLIENTS][:400]) for i in range(CLIENTS)]
    model = world.net("federated")
    for turn in range(ROUNDS):
        updates = [_update(world, model, part, turn) for part in parts]
        updates[0] = {name: -4 * change for name, change in updates[0].items()}
        joined = aggregate(updates, method, byzantine=0 if method == "mean" else 1)  # type: ignore[arg-type]  # one of two
        change = cast("Mapping[str, Tensor]", joined.value)
        model.load_state_dict({name: value + change[name] for name, value in model.state_dict().items()})
    return accuracy(model.eval(), *world.rows("test"))


def _update(world: World, model: nn.Module, part: TensorDataset, turn: int) -> dict[str, Tensor]:
    local = world.net("federated")
    local.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(local.parameters(), lr=0.05, momentum=0.9)
    x, y = part.tensors
    stream = torch.Generator().manual_seed(world.seed_of(f"round {turn}"))
    for rows in torch.randperm(len(x), generator=stream).split(50):
        optimizer.zero_grad()
        plain_loss(local, x[rows], y[rows]).backward()
        optimizer.step()
    before = model.state_dict()
    return {name: (value - before[name]).detach() for name, value in local.state_dict().items()}
