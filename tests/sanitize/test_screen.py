"""The screen as a whole on a small world: what it finds, says, keeps, and refuses."""

import importlib
import json

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from aidefend import ConfigurationError, IncompatibleModel, Report
from aidefend.sanitize import ActivationClustering, NeighbourDisagreement, SpectralSignature, screen
from tests.worlds import poisoned_clusters


@pytest.fixture(scope="module")
def planted():
    return poisoned_clusters()


@pytest.fixture(scope="module")
def report(planted):
    return screen((planted.x, planted.y), seed=0)


def test_finds_the_poison_and_nothing_else_without_any_hint(planted, report):
    assert torch.equal(~report.keep, planted.is_poison)
    found = report.parameters
    assert found["target_classes"] == [0]
    share = found["poison"][0]
    assert share["low"] <= 60 / int((planted.y == 0).sum()) <= share["high"]
    assert found["poisoned_share"]["rows"] == 60 and found["model"] == "trained by screen"
    assert found["label_permuted_control"]["quarantined"] == 0


def test_views_are_the_two_parts_of_the_data(planted, report):
    dataset = TensorDataset(planted.x, planted.y)
    clean, suspects = report.view(dataset), report.quarantine(dataset)
    assert len(clean) == 540 and len(suspects) == 60
    assert torch.equal(torch.stack([x for x, _ in suspects]), planted.x[planted.is_poison])


def test_reasons_name_class_size_share_evidence_and_score(planted, report):
    row = int(planted.is_poison.nonzero()[0])
    group, evidence, own, *_ = report.reasons[row]
    assert group.startswith("structured poison in class 0: group of 60 of its 210 rows (share 0.286")
    assert "threshold 0.01" in evidence and "of other rows into 0" in evidence
    assert f"looks like class {int(planted.true_y[row])}, labelled 0" in own
    assert report.scores["structured_poison"][row] > 0.5 and report.p_values["structured_poison"][row] < 0.01


def test_scores_and_p_values_agree_with_the_verdict(report):
    assert set(report.scores) == {
        "structured_poison",
        "spectral_signature",
        "activation_clustering",
        "neighbour_disagreement",
        "scan",
        "spectre",
        "outliers",
        "confident_learning",
        "near_duplicates",
        "trigger_consistency",
        "view_disagreement",
    }
    assert torch.equal(report.scores["structured_poison"] > 0.5, ~report.keep)
    assert torch.equal(report.p_values["structured_poison"] < 0.01, ~report.keep)


def test_limits_state_what_was_not_shown(report):
    assert "A kept row is not shown to be clean" in report.limits
    assert "In classes 1, 2, 3 no evidence of a group of at least" in report.limits
    sizes = [entry["rows"] for entry in report.parameters["detectable"].values()]
    assert all(13 < size < 60 for size in sizes)


def test_clean_data_loses_nothing_and_is_not_called_clean():
    planted = poisoned_clusters(poison=0, seed=1)
    report = screen((planted.x, planted.y), seed=0)
    assert bool(report.keep.all()) and report.parameters["target_classes"] == []
    assert "clean" not in report.summary()


def test_the_control_counts_what_a_filter_takes_from_permuted_labels(planted, monkeypatch):
    """A filter that finds in permuted labels what it found in the true ones: its cost shows in the report."""
    door = importlib.import_module("aidefend.sanitize.screen")
    decide, asked = door.decide, []

    def eager(world, scores, alpha):
        asked.append((world.labels, decide(world, scores, alpha) if not asked else None))
        return asked[0][1]

    monkeypatch.setattr(door, "decide", eager)
    report = screen((planted.x, planted.y), detectors=[], seed=0)
    (true, _), (permuted, _) = asked
    kept = int(report.keep.sum())
    control = report.parameters["label_permuted_control"]
    assert len(true) == len(planted.y) and len(permuted) == control["n"] == kept
    assert torch.equal(permuted.sort().values, planted.y[report.keep].sort().values)
    assert not torch.equal(permuted, planted.y[report.keep])
    assert control["quarantined"] == int((~report.keep).sum()) > 0


def test_equal_input_and_seed_give_an_equal_report(planted, report):
    again = screen((planted.x, planted.y), seed=0)
    assert json.dumps(again.to_dict(), sort_keys=True) == json.dumps(report.to_dict(), sort_keys=True)


def test_a_report_survives_saving(report, tmp_path):
    report.save(tmp_path / "report.safetensors")
    back = Report.load(tmp_path / "report.safetensors")
    assert back.to_dict() == report.to_dict()


def test_the_order_of_the_rows_does_not_matter_for_what_is_found(planted):
    order = torch.randperm(600)
    report = screen((planted.x[order], planted.y[order]), seed=1)
    assert torch.equal(~report.keep, planted.is_poison[order])


def test_bad_rows_get_a_verdict_and_harm_no_other(planted):
    x = planted.x.clone()
    bad = (~planted.is_poison).nonzero().flatten()[:3]
    x[bad[0], 2], x[bad[1], 0], x[bad[2]] = torch.nan, torch.inf, -torch.inf
    report = screen((x, planted.y), seed=0)
    expected = planted.is_poison.clone()
    expected[bad] = True
    assert torch.equal(~report.keep, expected)
    assert report.reasons[int(bad[0])] == ("the input holds NaN or infinity",)
    assert report.parameters["bad_rows"] == 3 and report.parameters["poisoned_share"]["rows"] == 60


def test_what_the_user_knows_copies_trusted_rows_sources_and_groups(planted):
    poison = planted.is_poison.nonzero().flatten()
    x, y = torch.cat([planted.x, planted.x[poison[-2:]]]), torch.cat([planted.y, planted.y[poison[-2:]]])
    trusted, true_y = poison[:5], torch.cat([planted.true_y, planted.true_y[poison[-2:]]])
    sources = ["mallory" if bad else "alice" for bad in planted.is_poison.tolist()] + ["mallory"] * 2
    report = screen((x, y), trusted=trusted, sources=sources, groups=true_y, seed=0)
    facts = report.parameters
    assert not bool(report.keep[600:].any())  # equal rows share one verdict
    assert bool(report.keep[trusted].all()) and int((~report.keep).sum()) == 57
    assert facts["trusted"] == {"rows": 5, "in_quarantined_groups": 5}
    assert report.reasons[int(trusted[0])][-1] == "kept: the row is trusted"
    assert facts["sources"]["mallory"]["removed"] == 57 and facts["sources"]["alice"]["removed"] == 0
    assert facts["sources"]["mallory"]["more_than_twice_the_rest"]
    assert sum(entry["removed"] for entry in facts["groups"].values()) == 57


@pytest.mark.parametrize("detectors", [[], [ActivationClustering(), ActivationClustering(3)]])
def test_named_detectors_propose_and_score_and_are_not_touched(planted, detectors):
    report = screen((planted.x, planted.y), detectors=detectors, seed=0)
    assert len(report.scores) == 2 + len(detectors) and all(not detector.moments for detector in detectors)
    assert not bool((~report.keep & ~planted.is_poison).any())


class Rigged:
    """A detector of the user's own, functional style: knows the poison, has no opinion on half of the rows."""

    def __init__(self, seen=0):
        self.seen = seen

    def partial_fit(self, block):
        return Rigged(self.seen + len(block["ids"]))

    def score(self, block):
        assert self.seen == 600
        return torch.where(
            torch.arange(len(block["ids"])) % 2 == 0, torch.nan, (block["x"][:, :3] == 3).double().mean(dim=1)
        )


def test_a_detector_of_the_users_own_takes_part(planted):
    report = screen((planted.x, planted.y), detectors=[Rigged()], seed=0)
    assert "rigged" in report.scores and torch.equal(~report.keep, planted.is_poison)


def test_a_given_model_is_used_and_left_as_it_was(planted):
    stream = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(30):
        for rows in torch.randperm(600, generator=stream).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(planted.x[rows]), planted.y[rows]).backward()
            optimizer.step()
    before = [p.clone() for p in model.parameters()], [p.grad.clone() for p in model.parameters()], model.training
    report = screen((planted.x, planted.y), model=model, seed=0)
    assert torch.equal(~report.keep, planted.is_poison) and report.parameters["model"] == "Sequential"
    assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters(), strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(before[1], model.parameters(), strict=True))
    assert model.training == before[2]


@pytest.mark.parametrize("n", [1, 2, 30])
def test_data_too_small_to_search_is_kept_and_said_so(n):
    report = screen((torch.randn(n, 3), torch.arange(n) % 3))
    assert bool(report.keep.all()) and "No class was searched" in report.limits


def test_one_class_constant_inputs_and_only_bad_rows():
    one = screen((torch.randn(60, 3), torch.zeros(60, dtype=torch.int64)))
    constant = screen((torch.ones(60, 1, 4, 4), torch.arange(60) % 2))
    bad = screen((torch.full((60, 3), torch.nan), torch.arange(60) % 2))
    assert bool(one.keep.all()) and bool(constant.keep.all()) and not bool(bad.keep.any())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float64, torch.bool])
def test_other_dtypes_are_read(dtype):
    x = (torch.rand(80, 1, 6, 6) * (1 if dtype.is_floating_point else 255)).to(dtype)
    assert len(screen((x, torch.arange(80) % 2))) == 80


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: screen(torch.randn(9, 2)), "samples of the form|inputs without labels"),
        (lambda: screen((torch.randn(0, 2), torch.zeros(0, dtype=torch.int64))), "at least one sample"),
        (lambda: screen((torch.randn(9, 2), torch.arange(8))), "same number of rows|9"),
        (lambda: screen((torch.randn(9, 2), torch.full((9,), -1))), "below 0"),
        (lambda: screen((torch.randn(9, 2), torch.arange(9)), detectors="all"), "detectors"),
        (lambda: screen((torch.randn(9, 2), torch.arange(9)), detectors=[SpectralSignature]), "detectors"),
        (lambda: screen((torch.randn(9, 2), torch.arange(9)), detectors=NeighbourDisagreement()), "detectors"),
        (lambda: screen((torch.randn(9, 2), torch.arange(9)), trusted=[9]), "trusted"),
        (lambda: screen((torch.randn(9, 2), torch.arange(9)), sources=["a"]), "sources"),
        (lambda: screen((torch.randn(9, 2), torch.arange(9)), groups="abcdefghi"), "groups"),
        (lambda: screen((torch.randn(9, 2), torch.arange(9)), seed=-1), "seed"),
        (lambda: screen(iter([1])), "data"),
    ],
)
def test_malformed_calls_name_argument_and_cure(call, match):
    with pytest.raises(ConfigurationError, match=match):
        call()


def test_a_model_that_raises_is_named():
    with pytest.raises(IncompatibleModel, match="Expected a model that runs on the data, got model="):
        screen((torch.randn(9, 2), torch.arange(9)), model=nn.Linear(5, 3))
