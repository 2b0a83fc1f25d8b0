"""Influence through the last layer: the closed form is the gradient, and harm is harm."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from aidefend import AidefendError
from aidefend.sanitize import Influence


@pytest.fixture
def world():
    stream = torch.Generator().manual_seed(0)
    features = torch.randn(60, 5, generator=stream, dtype=torch.float64)
    labels = torch.arange(60) % 3
    features[torch.arange(60), labels] += 3.0
    layer = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(0.3 * torch.eye(3, 5))
    block = {"ids": tuple(map(str, range(60))), "features": features, "labels": labels}
    return layer, {**block, "logits": layer(features).detach()}


def part(block, rows):
    rows = torch.as_tensor(rows)
    ids = tuple(block["ids"][i] for i in rows.tolist())
    return {"ids": ids, **{name: block[name][rows] for name in ("features", "labels", "logits")}}


def gradient(layer, block):
    (found,) = torch.autograd.grad(cross_entropy(layer(block["features"]), block["labels"]), layer.weight)
    return found


def test_the_score_is_the_inner_product_of_gradients(world):
    layer, block = world
    trusted = part(block, range(30))
    detector = Influence(trusted).partial_fit(block)
    scores = detector.score(block)
    means = [gradient(layer, part(trusted, (trusted["labels"] == c).nonzero().flatten())) for c in range(3)]
    each = [gradient(layer, part(block, [row])) for row in range(60)]
    unit = sum(float(one.norm()) for one in each) / 60
    naive = torch.tensor([max(-float((one * mean).sum()) for mean in means) / unit for one in each])
    torch.testing.assert_close(scores, naive.double(), rtol=1e-6, atol=1e-8)


def test_trusted_rows_that_hold_nan_count_for_nothing(world):
    """One of ten of a class: its gradient was divided by ten and not by nine, so that other classes weighed more."""
    _, block = world
    broken = part(block, range(30))
    broken["features"] = broken["features"].clone()
    broken["features"][0, 2] = torch.nan
    expected = Influence(part(block, range(1, 30))).partial_fit(block).score(block)
    assert torch.equal(Influence(broken).partial_fit(block).score(block), expected)


def test_without_trusted_rows_it_is_the_length_of_the_own_gradient(world):
    layer, block = world
    scores = Influence().partial_fit(block).score(block)
    lengths = torch.tensor([float(gradient(layer, part(block, [row])).norm()) for row in range(60)]).double()
    torch.testing.assert_close(scores, lengths / lengths.mean(), rtol=1e-6, atol=1e-8)


def test_a_step_on_a_row_that_scores_high_harms_the_trusted_rows(world):
    layer, block = world
    wrong = {**block, "labels": torch.where(torch.arange(60) >= 50, (block["labels"] + 1) % 3, block["labels"])}
    trusted = part(block, range(30))
    scores = Influence(trusted).partial_fit(wrong).score(wrong)
    assert scores[50:].min() > scores[30:50].quantile(0.85)
    worst, best = int(scores.argmax()), int(scores.argmin())
    rises = {}
    for row in (worst, best):
        moved = layer.weight.detach() - 0.05 * gradient(layer, part(wrong, [row]))
        rises[row] = float(cross_entropy(trusted["features"] @ moved.T, trusted["labels"]))
    assert rises[worst] > float(cross_entropy(trusted["logits"], trusted["labels"])) > rises[best]


def test_shards_agree_and_other_trusted_rows_do_not_merge(world):
    _, block = world
    trusted, left, right = part(block, range(10)), part(block, range(30)), part(block, range(30, 60))
    merged = Influence(trusted).partial_fit(left).merge(Influence(trusted).partial_fit(right))
    whole = Influence(trusted).partial_fit(block)
    torch.testing.assert_close(merged.score(block), whole.score(block), rtol=1e-9, atol=1e-12)
    with pytest.raises(AidefendError, match="same trusted"):
        whole.merge(Influence(left).partial_fit(block))
    with pytest.raises(AidefendError, match="same trusted"):
        whole.merge(Influence())


def test_rows_that_are_not_finite_and_unseen_classes_have_no_opinion(world):
    _, block = world
    broken = {**block, "logits": block["logits"].clone()}
    broken["logits"][4, 1] = torch.nan
    scores = Influence().partial_fit(broken).score(broken)
    assert bool(scores[4].isnan()) and int(scores.isnan().sum()) == 1
    assert bool(Influence().score(block).isnan().all())
    first = part(block, (block["labels"] < 2).nonzero().flatten())
    assert int(Influence().partial_fit(first).score(block).isnan().sum()) == 20


def test_blocks_without_logits_and_other_models_are_refused(world):
    _, block = world
    with pytest.raises(AidefendError, match="logits"):
        Influence().partial_fit({name: block[name] for name in ("ids", "features", "labels")})
    with pytest.raises(AidefendError, match="labels below 2"):
        Influence().partial_fit({**block, "logits": block["logits"][:, :2]})
    with pytest.raises(AidefendError, match="one model"):
        Influence(block).score({**block, "features": block["features"][:, :4]})
