"""Evidence on sources: the closed form is the refit, and only a source that says other things stands out."""

import math

import pytest
import torch
from sklearn.linear_model import Ridge

from aidefend import AidefendError
from aidefend.sanitize import SourceEvidence

SOURCES = 6


def world(n=1200, bad=None, share=1.0, seed=0, uneven=False):
    """Three classes from six sources; source `bad` gives the next class for this share of its rows."""
    stream = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=stream)
    if uneven:  # one source delivers the hard classes only
        labels = torch.where(torch.arange(n) % SOURCES == 1, torch.randint(1, 3, (n,), generator=stream), labels)
    features = torch.randn(n, 6, generator=stream, dtype=torch.float64)
    features[torch.arange(n), labels] += torch.tensor([6.0, 2.0, 2.0], dtype=torch.float64)[labels]
    origin = torch.arange(n) % SOURCES
    if bad is not None:
        wrong = (origin == bad) & (torch.rand(n, generator=stream) < share)
        labels = torch.where(wrong, (labels + 1) % 3, labels)
    sources = [f"source {i}" for i in origin.tolist()]
    return {"ids": tuple(map(str, range(n))), "features": features, "labels": labels, "sources": sources}


@pytest.mark.parametrize("share", [0.15, 0.5, 1.0])
def test_a_source_with_wrong_labels_stands_out(share):
    found = SourceEvidence().partial_fit(world(bad=3, share=share)).evidence()
    others = [name for name in found if name != "source 3"]
    assert found["source 3"].excess > 0.2 > max(found[name].excess for name in others)
    assert found["source 3"].anomaly > 4 > max(found[name].anomaly for name in others)
    assert found["source 3"].harm > max(found[name].harm for name in others)


def test_honest_sources_lose_about_alike_also_where_one_has_the_harder_classes():
    for seed in range(5):
        found = SourceEvidence().partial_fit(world(seed=seed, uneven=True)).evidence()
        assert max(abs(part.excess) for part in found.values()) < 0.3
        assert max(part.harm for part in found.values()) < 0.02


def test_the_closed_form_is_a_refit_without_the_source():
    block = world(bad=2)
    detector = SourceEvidence(ridge=0.05).partial_fit(block)
    features, labels = block["features"].numpy(), block["labels"]
    damping = 0.05 * features.var(axis=0).sum() * len(features) / features.shape[1]
    indicators = torch.nn.functional.one_hot(labels, 3).double().numpy()
    for source in range(SOURCES):
        mine = (torch.arange(len(labels)) % SOURCES == source).numpy()
        refit = Ridge(alpha=damping).fit(features[~mine], indicators[~mine])
        loss = ((refit.predict(features[mine]) - indicators[mine]) ** 2).sum(axis=1).mean()
        assert detector.evidence()[f"source {source}"].loss == pytest.approx(loss, rel=1e-4)


def test_a_row_scores_as_its_source_and_an_unknown_source_has_no_score():
    block = world(bad=0)
    detector = SourceEvidence().partial_fit(block)
    scores = detector.score(block)
    found = detector.evidence()
    assert scores.tolist() == pytest.approx([found[name].excess for name in block["sources"]])
    assert bool(detector.score({**block, "sources": ["nobody"] * 1200}).isnan().all())


def test_one_source_few_rows_and_few_sources_are_not_judged():
    block = world()
    assert SourceEvidence().partial_fit({**block, "sources": ["one"] * 1200}).evidence() == {}
    few = {**block, "sources": ["tiny" if i < 5 else f"s{i % 2}" for i in range(1200)]}
    found = SourceEvidence().partial_fit(few).evidence()
    assert set(found) == {"s0", "s1"} and all(math.isnan(part.anomaly) for part in found.values())


def test_a_class_that_one_source_alone_has_is_not_held_against_it():
    block = world()
    alone = {**block, "labels": torch.where(torch.arange(1200) % SOURCES == 4, 3, block["labels"])}
    assert SourceEvidence().partial_fit(alone).evidence()["source 4"].excess == 0.0


@pytest.mark.parametrize("sources", [None, 7, ["a"], [1] * 1200])
def test_names_must_be_one_text_a_row(sources):
    with pytest.raises(AidefendError, match="sources"):
        SourceEvidence().partial_fit({**world(), "sources": sources})


def test_a_block_without_names_is_refused():
    block = world()
    del block["sources"]
    with pytest.raises(AidefendError, match="one name a row"):
        SourceEvidence().partial_fit(block)
