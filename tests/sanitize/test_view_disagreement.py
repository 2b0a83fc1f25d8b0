"""Views of one row: where the suspect model's features and the inputs disagree, poison with wrong labels is likely."""

import pytest
import torch

from aidefend.sanitize import screen
from aidefend.sanitize.view_disagreement import VIEWS, divergence, random_features
from tests.worlds import poisoned_clusters


@pytest.fixture(scope="module")
def planted():
    return poisoned_clusters()


@pytest.fixture(scope="module")
def report(planted):
    return screen((planted.x, planted.y), detectors=[], seed=0)


def test_the_divergence_has_its_closed_forms():
    same = torch.tensor([[0.2, 0.8]]).expand(4, 1, 2)
    alone = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    split = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])
    apart = torch.eye(4).unsqueeze(1)
    values = [float(divergence(views.double())) for views in (same, alone, split, apart)]
    assert values == pytest.approx([0.0, 0.405639, 0.5, 1.0], abs=1e-5)


def test_poison_disagrees_more_than_other_rows_do(planted, report):
    score, poison = report.scores["view_disagreement"], planted.is_poison
    assert bool(((score >= 0) & (score <= 1)).all())
    auc = (score[poison][:, None] > score[~poison][None, :]).double().mean()
    assert float(auc) > 0.99


def test_the_group_names_the_views_that_saw_it(planted, report):
    views = report.parameters["views"]
    assert views["used"] == list(VIEWS)
    for group in views["groups"]:
        assert group["class"] == 0 and not group["views"]["model"]["saw"]
        assert group["views"]["wide"]["saw"] and group["views"]["wide"]["placed_elsewhere"] > 0.9
    assert len(views["groups"]) == len(report.parameters["poison"])
    words = report.reasons[int(planted.is_poison.nonzero()[0])]
    assert any(said.startswith("views that saw the group: wide (") and "not: model (" in said for said in words)


def test_shares_by_class_add_up_to_the_whole(report):
    views = report.parameters["views"]
    parts = views["by_class"].values()
    assert sum(part["rows"] for part in parts) == views["differ_on"]["rows"]
    assert sum(part["n"] for part in parts) == views["differ_on"]["n"] == 600
    assert views["by_class"]["0"]["share"] > 5 * views["by_class"]["1"]["share"]


def test_rows_that_cannot_be_used_have_no_opinion(planted):
    x = planted.x.clone()
    x[5] = torch.nan
    one = screen((x[:40], torch.arange(40) % 2), detectors=[], seed=0)
    assert bool(one.scores["view_disagreement"][5].isnan()) and int(one.scores["view_disagreement"].isnan().sum()) == 1
    none = screen((torch.full((30, 3), torch.nan), torch.arange(30) % 2), detectors=[], seed=0)
    assert bool(none.scores["view_disagreement"].isnan().all())
    assert none.parameters["views"]["differ_on"] == {"rows": 0, "n": 0, "share": None}


def test_random_features_know_no_label_and_tell_inputs_apart(planted):
    one, same, other = (random_features(planted.x, seed) for seed in (1, 1, 2))
    assert one.shape == (600, 256) and bool((one >= 0).all())
    assert torch.equal(one, same) and not torch.equal(one, other)
    moved = random_features(planted.x.flip(0), 1).flip(0)  # a row's features are its own
    torch.testing.assert_close(moved, one, rtol=1e-4, atol=1e-4)
    clean = ~planted.is_poison
    distance = torch.cdist(one[clean], one[clean]).fill_diagonal_(torch.inf)
    assert float((planted.y[clean][distance.argmin(dim=1)] == planted.y[clean]).double().mean()) > 0.95
    picture = random_features(torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8), 0)
    assert picture.shape == (5, 256) and picture.dtype == torch.float32


def test_the_random_view_places_poison_where_its_content_belongs(planted, report):
    """It is one of the views that the report names, and another than the suspect model's."""
    for group in report.parameters["views"]["groups"]:
        found = group["views"]["random"]
        assert found["saw"] and found["placed_elsewhere"] > 0.9 and found["of_the_rest"] < 0.1
