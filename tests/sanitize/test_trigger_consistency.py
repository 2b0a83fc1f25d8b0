"""Trigger consistency: overlays leave a trigger's answer, and nothing of the model or the streams is touched."""

import pickle

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from aidefend import AidefendError
from aidefend.sanitize import TriggerConsistency


class Backdoored(nn.Module):
    """Answers by the loudest of four parts of the input, unless the last feature is set; unsure in train mode."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.drop = nn.Dropout(0.9)

    def forward(self, x):
        parts = x[:, :8].reshape(-1, 4, 2).sum(dim=2)
        trigger = 50.0 * (x[:, 8:] > 4).float() * torch.tensor([1.0, 0, 0, 0])
        return self.drop(self.scale * parts + trigger)


def world(n=200, planted=20):
    stream = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 4
    x = torch.rand(n, 9, generator=stream)
    x[torch.arange(n), 2 * labels] += 2.0
    truth = torch.arange(n) >= n - planted
    x[truth, 8] = 5.0
    labels = torch.where(truth, 0, labels)
    ids = tuple(f"row {i}" for i in range(n))
    return {"ids": ids, "features": x, "labels": labels, "x": x}, truth


def cut(block, rows):
    rows = torch.as_tensor(rows)
    ids = tuple(block["ids"][i] for i in rows.tolist())
    return {"ids": ids, **{name: block[name][rows] for name in ("features", "labels", "x")}}


def test_triggered_rows_keep_their_answer():
    block, truth = world()
    scores = TriggerConsistency(Backdoored()).partial_fit(block).score(block)
    assert roc_auc_score(truth, scores) > 0.99
    assert bool(((scores >= 0) & (scores <= 1)).all())


def test_the_score_is_the_mean_entropy_over_overlays_without_the_row_itself():
    block, _ = world(n=24, planted=0)
    model = Backdoored()
    detector = TriggerConsistency(model, overlays=5).partial_fit(block)
    names, bank = detector._chosen()
    model.eval()
    low, high = float(block["x"].min()), float(block["x"].max())
    for row, row_id in enumerate(block["ids"]):
        others = [over for name, over in zip(names, bank, strict=True) if name != row_id][:5]
        laid = torch.stack([(block["x"][row] + over).clamp(low, high) for over in others])
        chances = torch.softmax(model(laid).detach().double(), dim=1)
        naive = 1 - torch.distributions.Categorical(probs=chances).entropy().mean() / torch.log(torch.tensor(4.0))
        assert float(detector.score(block)[row]) == pytest.approx(float(naive), abs=1e-9)


@pytest.mark.parametrize("response", ["added", "blended", "scaled"])
def test_every_response_ranks_triggered_rows_on_top(response):
    block, truth = world()
    x = block["x"].clone()
    x[~truth, 8] = 0.0  # made brighter, an ordinary row shall not turn into a triggered one
    x[:, 8] = torch.where(truth, 9.0, x[:, 8])
    block = {**block, "x": x}
    scores = TriggerConsistency(Backdoored(), response=response).partial_fit(block).score(block)
    assert roc_auc_score(truth, scores) > 0.99 and bool(((scores >= 0) & (scores <= 1)).all())


def test_scaling_and_blending_are_what_they_say():
    block, _ = world(n=24, planted=2)
    model = Backdoored().eval()
    low, high = float(block["x"].min()), float(block["x"].max())
    scaled = TriggerConsistency(model, response="scaled").partial_fit(block).score(block)
    own = model(block["x"]).argmax(dim=1)
    chances = [
        torch.softmax(model((block["x"] * factor).clamp(low, high)), dim=1)[torch.arange(24), own]
        for factor in (3, 5, 7, 9, 11)
    ]
    torch.testing.assert_close(scaled, torch.stack(chances).mean(dim=0).detach().double(), rtol=1e-5, atol=1e-6)
    detector = TriggerConsistency(model, overlays=5, response="blended").partial_fit(block)
    names, bank = detector._chosen()
    others = [over for name, over in zip(names, bank, strict=True) if name != block["ids"][3]][:5]
    laid = torch.softmax(model(torch.stack([(block["x"][3] + over) / 2 for over in others])).detach().double(), dim=1)
    entropy = torch.special.entr(laid).sum(dim=1).mean() / torch.log(torch.tensor(4.0))
    assert float(detector.score(block)[3]) == pytest.approx(1 - float(entropy), abs=1e-6)
    whole = {**block, "x": (block["x"] * 50).to(torch.uint8)}
    for response in ("blended", "scaled"):
        found = TriggerConsistency(lambda x: x[:, :4].float(), response=response).partial_fit(whole)
        assert bool(found.score(whole).isfinite().all())
    with pytest.raises(AidefendError, match="response"):
        TriggerConsistency(model, response="darkened")
    with pytest.raises(AidefendError, match="Merge detectors of one kind"):
        found.merge(TriggerConsistency(found.model))


def test_any_sharding_and_order_gives_the_same_scores():
    block, _ = world()
    model = Backdoored()
    whole = TriggerConsistency(model).partial_fit(block).score(block)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    shards = [TriggerConsistency(model).partial_fit(cut(block, part)) for part in order.split(33)]
    merged = shards[0]
    for shard in shards[1:]:
        merged = merged.merge(pickle.loads(pickle.dumps(shard)))  # as it comes back from another process
    torch.testing.assert_close(merged.score(block), whole, rtol=1e-9, atol=1e-9)
    parts = [merged.score(cut(block, part)) for part in torch.arange(200).split(7)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)


def test_the_model_is_left_as_it_was():
    block, _ = world()
    model = Backdoored().train()
    before = torch.random.get_rng_state()
    detector = TriggerConsistency(model).partial_fit(block)
    assert torch.equal(detector.score(block), detector.score(block))  # no dropout
    assert model.training and model.drop.training and model.scale.grad is None
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bad_rows_have_no_score_and_harm_no_other():
    block, _ = world()
    broken = {**block, "x": block["x"].clone()}
    broken["x"][3, 2] = torch.inf
    model = Backdoored()
    scores = TriggerConsistency(model).partial_fit(broken).score(broken)
    assert scores.isnan().nonzero().flatten().tolist() == [3]
    kept = [i for i in range(200) if i != 3]
    without = TriggerConsistency(model).partial_fit(cut(block, kept)).score(cut(block, kept))
    torch.testing.assert_close(scores[kept], without, rtol=1e-6, atol=1e-6)
    assert bool(TriggerConsistency(model).score(block).isnan().all())


def test_whole_numbers_are_laid_over_in_their_own_range():
    seen = []

    def model(x):
        seen.append(x)
        return torch.stack([x.float().mean(dim=(1, 2, 3)), torch.zeros(len(x))], dim=1)

    x = torch.randint(0, 256, (12, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    features = torch.zeros(12, 1)
    block = {"ids": tuple(map(str, range(12))), "features": features, "labels": torch.arange(12) % 2, "x": x}
    scores = TriggerConsistency(model, overlays=3).partial_fit(block).score(block)
    assert bool(torch.isfinite(scores).all())
    assert all(batch.dtype == torch.uint8 and int(batch.max()) <= int(x.max()) for batch in seen)


def test_what_cannot_be_is_refused():
    block, _ = world()
    with pytest.raises(AidefendError, match="model"):
        TriggerConsistency("a path")
    with pytest.raises(AidefendError, match='"x"'):
        TriggerConsistency(Backdoored()).partial_fit({name: block[name] for name in ("ids", "features", "labels")})
    other = Backdoored()
    with torch.no_grad():
        other.scale.fill_(9.0)
    with pytest.raises(AidefendError, match="same model"):
        TriggerConsistency(Backdoored()).merge(TriggerConsistency(other))
