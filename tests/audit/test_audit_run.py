"""The whole audit: all parts on a small real task, absent arguments, broken parts, no trace, equal digests."""

import json
import pickle
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import nn
from torch.nn import functional

from aidefend._core.errors import ConfigurationError
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend._core.threat import Threat
from aidefend.audit import AuditPlan, AuditReport, audit, compare
from aidefend.audit.plan import PARTS
from aidefend.audit.steps import STEPS

SARIF_PART = json.loads(Path(__file__).with_name("sarif_2_1_0_part.json").read_text())
SMALL = AuditPlan("small", samples=32, comparisons=80, inversion_steps=15, queries=(40,), privacy_runs=4, guard_steps=3)


def blobs(n, seed):
    """Two classes of 1 x 4 x 4 images with much overlap, so that a network has to memorise."""
    stream = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    return (0.5 + 0.1 * (y[:, None, None, None] - 0.5) + 0.2 * torch.randn(n, 1, 4, 4, generator=stream)).clamp(0, 1), y


def train_fn(dataset, seed):
    x = torch.stack([dataset[i][0] for i in range(len(dataset))])
    y = torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])
    stream = torch.Generator().manual_seed(seed)
    layers = nn.Linear(16, 64), nn.Linear(64, 2)
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.2, generator=stream)
        nn.init.zeros_(layer.bias)
    model = nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model  # in train mode, as users leave it


@pytest.fixture(scope="module")
def world():
    train, test = blobs(80, 0), blobs(80, 1)
    return train, test, train_fn(torch.utils.data.TensorDataset(*train), 0).eval()


class OpenGuard(nn.Module):
    """Accepts everything."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return type("Decision", (), {"accepted": torch.ones(len(x), dtype=torch.bool), "outputs": self.model(x)})()

    def attackable(self):
        return lambda x: torch.cat([self.model(x), torch.full((len(x), 1), -1e3)], dim=1)


def complete(world, tmp_path, seed=0):
    train, test, model = world
    (tmp_path / "note.txt").write_text("x")
    tmp_path.chmod(0o755)
    (tmp_path / "note.txt").chmod(0o600)
    return audit(
        model,
        train=train,
        test=test,
        threat=Threat("linf", 0.1),
        plan=SMALL,
        train_fn=train_fn,
        claimed_epsilon=8.0,
        privacy_data=(train[0][:8], train[1][:8]),
        path=tmp_path,
        inspector=lambda path: Evidence([Finding("artifacts.accepted", "fine")]),
        guard=OpenGuard(model),
        seed=seed,
    )


def test_every_part_measures_and_every_form_comes_out(world, tmp_path):
    report = complete(world, tmp_path)
    assert {part: report.status(part) for part in PARTS} == dict.fromkeys(PARTS, "measured"), report.to_markdown()
    for name in (
        "evasion.clean_accuracy", "evasion.robust_accuracy", "poisoning.clean_accuracy",
        "poisoning.attack_success_rate", "membership.auc", "membership.tpr_at_fpr_0.01",
        "membership.lira.auc", "inversion.evaluator_accuracy", "inversion.nearest_distance_ratio",
        "extraction.agreement", "privacy.epsilon_lower_bound", "artifacts.problems",
        "storage.problems", "guard.false_positive_rate", "guard.joint_attack_success",
    ):  # fmt: skip
        assert name in report
    assert report["membership.auc"].value > 0.6, "the network has memorised its noise"
    jsonschema.Draft7Validator(SARIF_PART).validate(json.loads(report.to_sarif()))
    assert report.passed({"membership.auc": {"max": 0.55}}).exit_code == 1
    assert compare(report, report).ok
    assert all(
        len(text) > 500 for text in (report.to_html(), report.to_junit(), report.to_markdown(), report.to_json())
    )
    again = complete(world, tmp_path)
    assert again.digest == report.digest != complete(world, tmp_path, seed=1).digest
    assert report.evidence.metadata["run"]["seconds"].keys() == set(PARTS)


def test_what_is_absent_is_not_tested_and_says_what_it_needs(world):
    report = audit(world[2], plan="quick")
    assert {part: report.status(part) for part in PARTS} == dict.fromkeys(PARTS, "not tested")
    assert report["evasion"].limits == "Needs test, threat." and report["guard"].limits == "Needs guard, test."
    assert report["poisoning"].limits == "Needs test, trigger or train_fn, train."
    assert report.passed({"membership.auc": {"max": 0.6}}).exit_code == 2
    left_out = audit(world[2], test=world[1], plan=AuditPlan(parts=("extraction",), queries=(20,)))
    assert left_out.status("extraction") == "measured" and "leaves this part out" in left_out["membership"].limits


def test_planted_a_part_that_raises_is_reported_failed_and_never_passes(world):
    train, test, model = world

    def broken(dataset, seed):
        raise RuntimeError("out of licence <b>")

    plan = AuditPlan(parts=("membership", "extraction"), queries=(20,), comparisons=40)
    report = audit(model, train=train, test=test, train_fn=broken, plan=plan)
    finding = report["membership"]
    assert finding.status == "failed" and finding.severity is Severity.HIGH
    assert "RuntimeError: out of licence <b>" in finding.setting["error"]
    assert report.status("extraction") == "measured", "the others still run"
    assert report.passed({"extraction.agreement": {"max": 1.0}}).exit_code == 2
    assert "status failed" in str(report.passed({"max_severity": "CRITICAL"}).problems[0])


def test_a_part_without_findings_is_a_failure(world, monkeypatch):
    empty = STEPS["storage"]._replace(run=lambda given: Evidence())
    monkeypatch.setattr("aidefend.audit.run.STEPS", {**STEPS, "storage": empty})
    report = audit(world[2], folder="/", plan=AuditPlan(parts=("storage",)))
    assert report["storage"].status == "failed"


def test_train_mode_models_fail_the_parts_that_cannot_judge_them(world):
    train, test, _ = world
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 2)).train()
    report = audit(model, train=train, test=test, plan=AuditPlan(parts=("membership",)))
    assert report["membership"].status == "failed" and "eval mode" in report["membership"].setting["error"]


def test_no_trace_is_left_on_model_and_streams(world, tmp_path):
    train, test, trained = world
    model = pickle.loads(pickle.dumps(trained))
    model[1].weight.grad = torch.ones_like(model[1].weight)
    model[3].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    complete((train, test, model), tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert bool((model[1].weight.grad == 1).all()) and model[1].bias.grad is None
    assert model[1].weight.requires_grad and not model[3].bias.requires_grad and not model.training
    assert torch.equal(stream, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bad_calls_raise_before_anything_runs(world):
    train, test, model = world
    for call, match in [
        (lambda: audit(model, plan="fast"), "plan"),
        (lambda: audit(model, seed=-1), "seed"),
        (lambda: audit(model, test=test[0]), "labels"),
        (lambda: AuditPlan(parts=("evasion", "evasion")), "once"),
        (lambda: AuditPlan(parts=("fuzzing",)), "parts"),
        (lambda: AuditPlan(shadows=5), "even number"),
        (lambda: AuditPlan(queries=()), "query budget"),
        (lambda: AuditPlan(samples=0), "samples"),
        (lambda: AuditReport.from_dict({}), "schema"),
    ]:
        with pytest.raises(ConfigurationError, match=match):
            call()
    with pytest.raises(TypeError, match="trian"):
        audit(model, trian=train)
