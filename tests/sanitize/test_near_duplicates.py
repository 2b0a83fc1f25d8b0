"""Near duplicates: what must be found is found, beside naive searches over all pairs."""

import itertools
import pickle

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from aidefend import AidefendError
from aidefend.datasets import mnist_subset
from aidefend.sanitize import NearDuplicates
from aidefend.sanitize.sketches import BandIndex, BitIndex, min_hashes, perceptual_hashes

TEXT = (
    "The committee met on Tuesday to discuss the budget for the coming year and agreed to postpone the decision "
    "until the figures from the regional offices have arrived and have been checked by two independent auditors."
)


def block_of(n, x=None, text=None, start=0):
    block = {"ids": tuple(f"r{start + i}" for i in range(n)), "labels": torch.zeros(n, dtype=torch.int64)}
    block["features"] = torch.arange(float(n)).reshape(n, 1)
    return block | ({} if x is None else {"x": x}) | ({} if text is None else {"text": text})


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(data=st.data(), radius=st.integers(0, 12), n=st.integers(1, 40))
def test_every_pair_of_bits_within_the_radius_is_found(data, radius, n):
    seeds = data.draw(st.integers(0, 2**32))
    stream = np.random.default_rng(seeds)
    base = stream.integers(0, 256, (3, 8), dtype=np.uint8)
    flips = np.packbits(stream.random((n, 64)) < stream.choice([0.02, 0.1, 0.3]), axis=1)
    rows = np.unique(base[stream.integers(0, 3, n)] ^ flips, axis=0)
    found = {}
    for ours, theirs, similarity in BitIndex(rows, radius).pairs(rows):
        found |= dict(zip(zip(ours.tolist(), theirs.tolist(), strict=True), similarity.tolist(), strict=True))
    for a, b in itertools.product(range(len(rows)), repeat=2):
        differing = int(np.unpackbits(rows[a] ^ rows[b]).sum())
        if differing <= radius:
            assert found[a, b] == pytest.approx(1 - differing / 64)
        else:
            assert found.get((a, b), 0.0) < 1 - radius / 64


def test_min_hashes_estimate_the_overlap_of_word_triples():
    words = [f"w{i}" for i in range(400)]
    for shared in (100, 200, 300):
        texts = [" ".join(words), " ".join(words[:shared] + [f"v{i}" for i in range(400 - shared)])]
        a, b = min_hashes(texts, 2048, seed=3)
        triples = [{tuple(t[i : i + 3]) for i in range(398)} for t in (texts[0].split(), texts[1].split())]
        overlap = len(triples[0] & triples[1]) / len(triples[0] | triples[1])
        assert (a == b).mean() == pytest.approx(overlap, abs=4 * (overlap * (1 - overlap) / 2048) ** 0.5)


def test_pairs_of_texts_of_similarity_point_eight_are_found_as_often_as_said():
    stream = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        row = stream.integers(0, 2**32, (1, 128), dtype=np.uint32)
        other = np.where(stream.random((1, 128)) < 0.8, row, row ^ np.uint32(1))
        hits += any(len(ours) for ours, _, _ in BandIndex(row, 8).pairs(other))
    assert hits >= 0.92 * 300


def test_changed_pictures_are_found_and_other_digits_are_mostly_not():
    digits = mnist_subset().train_x[:300]
    brighter = (digits[:40] * 0.8 + 0.1).clamp(0, 1)
    noisy = digits[40:80] + 0.02 * torch.randn(40, *digits.shape[1:], generator=torch.Generator().manual_seed(0))
    shrunk = torch.nn.functional.interpolate(digits[80:120], size=(56, 56), mode="bilinear")
    kept = NearDuplicates("image").partial_fit(block_of(300, digits))
    for changed in (brighter, noisy, shrunk):
        assert float((kept.score(block_of(40, changed, start=900)) > 0.9).double().mean()) >= 0.9
    assert float((kept.score(block_of(300, digits)) > 0).double().mean()) < 0.05


def test_flat_pictures_are_all_alike_and_bad_ones_have_no_opinion():
    x = torch.stack([torch.full((1, 28, 28), value) for value in (0.0, 0.5, 1.0, torch.nan)])
    scores = NearDuplicates().partial_fit(block_of(4, x)).score(block_of(4, x))
    assert scores[:3].tolist() == [1.0, 1.0, 1.0] and bool(scores[3].isnan())
    assert perceptual_hashes(torch.zeros(0, 1, 28, 28)).shape == (0, 8)


def test_edited_texts_are_found_and_others_are_not():
    texts = [TEXT, TEXT.upper().replace(",", ""), TEXT.replace("Tuesday", "Friday"), "Something else altogether.", ""]
    found = NearDuplicates().partial_fit(block_of(5, text=texts))
    assert found.groups() == [("r0", "r1", "r2")]
    scores = found.score(block_of(5, text=texts))
    assert scores[0] == 1.0 and scores[2] > 0.8 and scores[3:].tolist() == [0.0, 0.0]


def test_exact_copies_to_the_bit_and_nothing_else():
    x = torch.rand(50, 3, 4, generator=torch.Generator().manual_seed(0))
    x[7], x[30] = x[3], x[3]
    x[9] = x[4] * (1 + 1e-7)
    found = NearDuplicates("content").partial_fit(block_of(50, x))
    assert found.groups() == [("r3", "r30", "r7")]
    assert found.score(block_of(50, x)).nonzero().flatten().tolist() == [3, 7, 30]


def test_close_features_by_cosine_about_the_mean():
    stream = torch.Generator().manual_seed(0)
    features = torch.randn(500, 16, generator=stream) + 100.0  # uncentred, all cosines are nearly one
    features[1] = features[0] + 1e-3
    block = {**block_of(500), "features": features}
    found = NearDuplicates("features").partial_fit(block)
    assert found.groups() == [("r0", "r1")]
    assert found.score(block).nonzero().flatten().tolist() == [0, 1]


def test_groups_join_over_steps():
    features = torch.tensor([[0.0, 1.0], [0.1, 1.0], [0.2, 1.0], [0.3, 1.0], [5.0, -9.0], [-5.3, -5.0]])
    block = {**block_of(6), "features": features}
    found = NearDuplicates("features", threshold=0.999).partial_fit(block)
    assert found.groups() == [("r0", "r1", "r2", "r3")]


def test_shards_seeds_and_copies():
    texts = [TEXT, TEXT + " Yes.", "alpha beta gamma delta", TEXT.lower()]
    whole = NearDuplicates(seed=5).partial_fit(block_of(4, text=texts))
    parts = [NearDuplicates(seed=5).partial_fit(block_of(1, text=[t], start=i)) for i, t in enumerate(texts)]
    merged = parts[3].merge(parts[1]).merge(parts[0]).merge(pickle.loads(pickle.dumps(parts[2])))
    assert merged.groups() == whole.groups() and torch.equal(
        merged.score(block_of(4, text=texts)), whole.score(block_of(4, text=texts))
    )
    one, other = (min_hashes([TEXT], 128, seed) for seed in (0, 1))
    assert not bool((one == other).any())


def test_many_equal_rows_do_not_meet_in_pairs():
    """100,000 copies: their 10,000,000,000 pairs would not end."""
    x = torch.zeros(100_000, 2)
    found = NearDuplicates("content").partial_fit({**block_of(100_000), "features": x})
    assert float(found.score(block_of(3, start=10**6) | {"features": torch.zeros(3, 2)}).min()) == 1.0


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: NearDuplicates("sound"), "by"),
        (lambda: NearDuplicates("image", threshold=0.5), "threshold"),
        (lambda: NearDuplicates(threshold=0.0), "threshold"),
        (lambda: NearDuplicates("text").partial_fit(block_of(2)), "text"),
        (lambda: NearDuplicates("text").partial_fit(block_of(2, text=["one"])), "text"),
        (lambda: NearDuplicates("image").partial_fit(block_of(2, torch.zeros(2, 3))), "x"),
        (lambda: NearDuplicates("image").partial_fit(block_of(2)), "x"),
        (
            lambda: (
                NearDuplicates()
                .partial_fit(block_of(1, text=["a"]))
                .merge(NearDuplicates().partial_fit(block_of(1, start=4)))
            ),
            "compares text",
        ),
    ],
)
def test_what_cannot_be_is_refused(act, message):
    with pytest.raises(AidefendError, match=message):
        act()


@pytest.mark.parametrize("data", ["copies of one row", "copies beside others", "far from the origin"])
def test_equal_features_are_duplicates_at_the_strictest_threshold(data):
    """In float32 the cosine of a row with itself may be .99999994; and the mean of equal rows has no direction."""
    rows = torch.rand(40, 7, generator=torch.Generator().manual_seed(3))
    rows = torch.full((40, 7), 0.1) if data == "copies of one row" else rows[torch.arange(40) % 20]
    rows = rows.double() + 1e5 if data == "far from the origin" else rows
    block = {"ids": tuple(map(str, range(40))), "features": rows, "labels": torch.zeros(40, dtype=torch.int64)}
    found = NearDuplicates("features", threshold=1.0).partial_fit(block)
    assert found.score(block).tolist() == pytest.approx([1.0] * 40, abs=1e-9)
    assert sum(len(group) for group in found.groups()) == 40
