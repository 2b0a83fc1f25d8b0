"""One list of sanitizing detectors; each line inherits every convention of blocks, sharding and polarity."""

import functools
import itertools
import pickle

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from aidefend import AidefendError, sanitize
from aidefend.sanitize import (
    ActivationClustering,
    Beatrix,
    ConfidentLearning,
    Influence,
    NearDuplicates,
    NeighbourDisagreement,
    Outliers,
    Scan,
    SourceEvidence,
    SpectralSignature,
    Spectre,
    TrainingDynamics,
    TriggerConsistency,
    near_duplicates,
    neighbour_disagreement,
)


def answers(x):
    return -(x[:, :1] - 12.0 * torch.arange(3)).square() / 100


SANITIZERS = {
    "activation-clustering": ActivationClustering,
    "activation-clustering-small-sample": lambda: ActivationClustering(dimensions=2, limit=20),
    "beatrix": Beatrix,
    "beatrix-combinations": lambda: Beatrix(powers=2, dimensions=3, limit=25),
    "near-duplicates": lambda: NearDuplicates("features", threshold=0.9),
    "near-duplicates-by-faiss": lambda: NearDuplicates("features", threshold=0.9, index="faiss"),
    "neighbour-disagreement": lambda: NeighbourDisagreement(k=3),
    "neighbour-disagreement-small-bank": lambda: NeighbourDisagreement(k=3, limit=15),
    "neighbour-disagreement-by-faiss": lambda: NeighbourDisagreement(k=3, index="faiss"),
    "outliers": Outliers,
    "scan": Scan,
    "scan-small-sample": lambda: Scan(dimensions=3, limit=30),
    "source-evidence": lambda: SourceEvidence(smallest=3),
    "spectral-signature": SpectralSignature,
    "spectre": Spectre,
    "spectre-small-sample": lambda: Spectre(dimensions=3, limit=25),
}
EVERY = {  # those that read more than features as well; their own files test the rest of the list on them
    **SANITIZERS,
    "confident-learning": ConfidentLearning,
    "confident-learning-small-sample": lambda: ConfidentLearning(limit=20),
    "influence": lambda: Influence(cut(with_all(world()), range(30))),
    "influence-of-a-row-on-itself": Influence,
    "training-dynamics": TrainingDynamics,
    "trigger-consistency": lambda: TriggerConsistency(answers, overlays=5),
    "trigger-consistency-by-blending": lambda: TriggerConsistency(answers, overlays=5, response="blended"),
    "trigger-consistency-by-scaling": lambda: TriggerConsistency(answers, overlays=5, response="scaled"),
}
OF_GROUPS = [name for name in SANITIZERS if not name.startswith(("beatrix", "near", "outliers", "source"))]
OF_ONE_KIND_OF_ROW = ("near-duplicates", "near-duplicates-by-faiss", "source-evidence")  # these judge rows of any class
every_detector = pytest.mark.parametrize("name", EVERY)
every_sanitizer = pytest.mark.parametrize("name", SANITIZERS)


def world(n=90, poison=9, dtype=torch.float32):
    """Three classes along one axis; the last rows carry label 0 and lie beside class 2: far out in their own class."""
    stream = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    features = torch.randn(n, 5, generator=stream)
    features[:, 0] += 12.0 * labels
    labels[n - poison :] = 0
    features[n - poison :, 0] = 24.0 + 0.1 * torch.randn(poison, generator=stream)
    return block_of(features.to(dtype), labels)


def block_of(features, labels, start=0):
    n = len(labels)
    ids, sources = tuple(f"row-{start + i}" for i in range(n)), [f"source-{i % 4}" for i in range(n)]
    return {"ids": ids, "features": features, "labels": labels, "sources": sources}


def with_all(block):
    """The block with all that any detector reads."""
    features, labels = block["features"], block["labels"]
    logits = -(features[:, :1] - 12.0 * torch.arange(3)).square()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return {**block, "logits": logits, "losses": losses, "x": features}


def cut(block, rows):
    rows = torch.as_tensor(rows, dtype=torch.int64)
    tensors = {name: values[rows] for name, values in block.items() if isinstance(values, torch.Tensor)}
    ids, sources = (type(block[name])(block[name][i] for i in rows.tolist()) for name in ("ids", "sources"))
    return {**tensors, "ids": ids, "sources": sources}


@pytest.fixture(autouse=True)
def small_banks_are_indexed(monkeypatch):
    """By faiss, where a detector asks for it: else none of these worlds would be large enough."""
    for module in (near_duplicates, neighbour_disagreement):
        monkeypatch.setattr(module, "_APPROXIMATE_FROM", 20)


def fitted(name, *blocks):
    detector = EVERY[name]()
    for block in blocks:
        detector.partial_fit(block)
    return detector


@pytest.mark.parametrize("name", OF_GROUPS)
def test_polarity_the_planted_rows_rank_on_top(name):
    poison = 4 if name.startswith("spectre") else 9  # more hides from it in so small a class, as it says
    block = world(poison=poison)
    scores = fitted(name, block).score(block)
    own = block["labels"] == 0
    planted = torch.arange(90) >= 90 - poison
    assert scores.shape == (90,) and scores.is_floating_point()
    assert scores[planted].min() > scores[own & ~planted].max()


@every_sanitizer
@hypothesis.settings(max_examples=8)
@hypothesis.given(order=st.permutations(range(90)), cuts=st.sets(st.integers(1, 89), max_size=5))
def test_any_sharding_and_order_gives_the_same_scores(name, order, cuts):
    block = world()
    whole = fitted(name, block).score(block)
    edges = [0, *sorted(cuts), 90]
    shards = [cut(block, order[a:b]) for a, b in itertools.pairwise(edges)]
    streamed = fitted(name, *shards)
    merged = fitted(name, shards[0])
    for shard in shards[1:]:
        merged = merged.merge(fitted(name, shard))
    for other in (streamed, merged):
        torch.testing.assert_close(other.score(block), whole, rtol=1e-9, atol=1e-9)


@every_detector
def test_merge_is_new_for_every_detector_and_leaves_both_parts_as_they_were(name):
    whole, strangers = with_all(world()), with_all(block_of(torch.randn(20, 5), torch.arange(20) % 3, start=500))
    a, b = fitted(name, whole), fitted(name, strangers)
    before = a.score(whole).nan_to_num(-1e9), b.score(whole).nan_to_num(-1e9)
    total = a.merge(b)
    assert total is not a and total is not b and type(total) is type(a)
    total.partial_fit(with_all(block_of(torch.randn(9, 5), torch.zeros(9, dtype=torch.int64), start=900)))
    assert torch.equal(a.score(whole).nan_to_num(-1e9), before[0])
    assert torch.equal(b.score(whole).nan_to_num(-1e9), before[1])


@every_detector
def test_every_detector_gives_any_block_tiny_data_and_a_copy_of_itself_their_scores(name):
    block = with_all(world())
    given = {key: values.clone() for key, values in block.items() if isinstance(values, torch.Tensor)}
    detector = fitted(name, block)
    whole = detector.score(block)
    parts = [detector.score(cut(block, range(start, min(start + 7, 90)))) for start in range(0, 90, 7)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert torch.equal(pickle.loads(pickle.dumps(detector)).score(block).nan_to_num(-1e9), whole.nan_to_num(-1e9))
    assert all(torch.equal(block[key], values) for key, values in given.items())
    assert bool(EVERY[name]().score(block).isnan().all())  # before any row there is no opinion
    for n in range(4):
        tiny = with_all(block_of(torch.randn(n, 5), torch.zeros(n, dtype=torch.int64)))
        scores = fitted(name, tiny).score(tiny)
        assert scores.shape == (n,) and not bool(torch.isinf(scores).any())
    for stranger in (object(), Outliers() if not isinstance(detector, Outliers) else Scan()):
        with pytest.raises(AidefendError, match="Merge detectors of one kind"):
            detector.merge(stranger)


def test_every_detector_is_in_the_list():
    parts = ("partial_fit", "merge", "score")
    named = [getattr(sanitize, name) for name in sanitize.__all__]
    detectors = {kind for kind in named if isinstance(kind, type) and all(hasattr(kind, part) for part in parts)}
    assert {type(make()) for make in EVERY.values()} == detectors


@every_detector
def test_workers_and_one_process_give_the_same_bits(name):
    """Blocks of a fixed size, fitted anywhere and merged in the order of their ids, are one pass over them."""
    block = with_all(world())
    blocks = [cut(block, range(a, a + 15)) for a in range(0, 90, 15)]
    workers = {}
    for place in (3, 0, 5, 1, 4, 2):  # finished in any order, and sent back from other processes
        workers[place] = pickle.loads(pickle.dumps(fitted(name, blocks[place])))
    reduced = functools.reduce(lambda a, b: a.merge(b), [workers[place] for place in range(6)])
    one = fitted(name, *blocks)
    assert torch.equal(reduced.score(block).nan_to_num(-1e9), one.score(block).nan_to_num(-1e9))


@every_detector
@pytest.mark.parametrize("seed", range(3))
def test_any_sharding_gives_the_same_scores_and_keeps_the_same_rows(name, seed):
    block = with_all(world())
    whole = fitted(name, block).score(block)
    stream = torch.Generator().manual_seed(seed)
    shards = torch.randperm(90, generator=stream).tensor_split(
        sorted(torch.randperm(89, generator=stream)[:5].tolist())
    )
    merged = functools.reduce(lambda a, b: b.merge(a), [fitted(name, cut(block, rows)) for rows in shards])
    torch.testing.assert_close(merged.score(block), whole, rtol=1e-9, atol=1e-9, equal_nan=True)
    values = whole[whole.isfinite()].unique()
    widest = (values[1:] - values[:-1]).argmax() if len(values) > 1 else 0
    threshold = float(values[widest : widest + 2].mean()) if len(values) else 0.0
    assert torch.equal(merged.score(block) <= threshold, whole <= threshold)
    if name.startswith("confident"):
        assert torch.equal(merged.issues(block), fitted(name, block).issues(block))


@every_sanitizer
def test_scores_do_not_depend_on_the_block_they_are_asked_in(name):
    block = world()
    detector = fitted(name, block)
    parts = [detector.score(cut(block, range(a, min(a + 7, 90)))) for a in range(0, 90, 7)]  # the last one is partial
    torch.testing.assert_close(torch.cat(parts), detector.score(block), rtol=1e-9, atol=1e-9)


@every_sanitizer
def test_merge_is_new_and_leaves_both_parts_as_they_were(name):
    left, right, whole = world(), block_of(torch.randn(20, 5), torch.arange(20) % 3, start=500), world()
    a, b = fitted(name, left), fitted(name, right)
    before = a.score(whole), b.score(whole)
    total = a.merge(b)
    assert total is not a and total is not b
    assert torch.equal(a.score(whole), before[0]) and torch.equal(b.score(whole), before[1])
    total.partial_fit(block_of(torch.randn(9, 5), torch.zeros(9, dtype=torch.int64), start=900))
    assert torch.equal(a.score(whole), before[0]) and torch.equal(b.score(whole), before[1])


def categories(n=150):
    """A table of categories: equal variances in many directions, and rows with many equals."""
    labels = torch.arange(n) % 3
    return block_of(torch.nn.functional.one_hot((7 * torch.arange(n)) % 5, 5).float(), labels)


def few_different_rows(n=150):
    """Two different rows and their copies, which are nearer to each other than rounding is to 0."""
    two = torch.rand(2, 5, generator=torch.Generator().manual_seed(4))
    return block_of(two[(torch.arange(n) > n // 2).long()], torch.arange(n) % 3)


@every_detector
@pytest.mark.parametrize("data", [categories, few_different_rows])
@pytest.mark.parametrize("seed", range(3))
def test_where_directions_and_distances_are_equal_neither_shards_nor_blocks_decide(name, data, seed):
    block = with_all(data())
    detector = fitted(name, block)
    whole, n = detector.score(block), len(block["labels"])
    shards = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tensor_split(5)
    merged = functools.reduce(lambda a, b: b.merge(a), [fitted(name, cut(block, rows)) for rows in shards])
    torch.testing.assert_close(merged.score(block), whole, rtol=1e-9, atol=1e-9, equal_nan=True)
    parts = [detector.score(cut(block, range(a, min(a + 7, n)))) for a in range(0, n, 7)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-9, equal_nan=True)


@every_sanitizer
def test_a_class_in_two_shards_counts_as_one(name):
    block = world()
    first, second = cut(block, range(45)), cut(block, range(45, 90))
    total = fitted(name, first).merge(fitted(name, second))
    torch.testing.assert_close(total.score(block), fitted(name, block).score(block), rtol=1e-9, atol=1e-9)


@every_sanitizer
@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_tiny_data_never_fails(name, n):
    block = block_of(torch.randn(n, 5), torch.zeros(n, dtype=torch.int64))
    scores = fitted(name, block).score(block)
    assert scores.shape == (n,) and not bool(torch.isinf(scores).any())


@every_sanitizer
def test_an_unfitted_detector_and_an_unseen_class_have_no_opinion(name):
    block = world()
    assert bool(SANITIZERS[name]().score(block).isnan().all())
    if name not in OF_ONE_KIND_OF_ROW:
        unseen = block_of(torch.randn(4, 5), torch.full((4,), 7))
        assert bool(fitted(name, block).score(unseen).isnan().all())


@every_sanitizer
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_rows_get_no_opinion_and_harm_no_other(name, bad):
    block = world()
    broken = {**block, "features": block["features"].clone()}
    broken["features"][4, 2] = bad
    without = fitted(name, cut(block, [i for i in range(90) if i != 4])).score(block)
    scores = fitted(name, broken).score(broken)
    assert bool(scores[4].isnan())
    keep = torch.arange(90) != 4
    torch.testing.assert_close(scores[keep], without[keep], rtol=1e-9, atol=1e-9)


@every_sanitizer
def test_float64_features_give_the_same_answer(name):
    single, double = world(), world(dtype=torch.float64)
    torch.testing.assert_close(
        fitted(name, single).score(single), fitted(name, double).score(double), rtol=1e-4, atol=1e-4
    )


@every_sanitizer
def test_pickles_and_leaves_the_block_alone(name):
    block = world()
    features = block["features"].clone()
    detector = fitted(name, block)
    copy = pickle.loads(pickle.dumps(detector))
    assert torch.equal(copy.score(block).nan_to_num(), detector.score(block).nan_to_num())
    assert torch.equal(block["features"], features)


@every_sanitizer
def test_features_on_an_offset_score_the_same(name):
    block = world(dtype=torch.float64)
    moved = {**block, "features": block["features"] + 1e6}
    torch.testing.assert_close(fitted(name, moved).score(moved), fitted(name, block).score(block), rtol=1e-4, atol=1e-4)


@every_detector
def test_ids_may_be_the_numbers_of_the_rows(name):
    block = with_all(world())
    numbered = {**block, "ids": tuple(str(i) for i in range(90))}
    expected = fitted(name, numbered).score(numbered)
    for ids in (torch.arange(90), torch.arange(90).numpy(), list(range(90)), numbered["ids"]):
        given = {**block, "ids": ids}
        assert torch.equal(fitted(name, given).score(given).nan_to_num(-1e9), expected.nan_to_num(-1e9))
    for wrong in (torch.arange(90.0), torch.zeros(90, 2).long(), [None] * 90, ["a", 1] * 45):
        with pytest.raises(AidefendError, match="Expected ids"):
            EVERY[name]().partial_fit({**block, "ids": wrong})


@every_sanitizer
@pytest.mark.parametrize(
    "change",
    [
        {"features": torch.randn(3, 2, 2)},
        {"features": torch.ones(3, 2, dtype=torch.int64)},
        {"labels": torch.tensor([0, 1])},
        {"labels": torch.tensor([0.0, 1.0, 2.0])},
        {"labels": torch.tensor([0, -1, 1])},
        {"ids": ("a", "b")},
    ],
)
def test_malformed_blocks_raise(name, change):
    block = {**block_of(torch.randn(3, 2), torch.zeros(3, dtype=torch.int64)), **change}
    with pytest.raises(AidefendError, match="Expected"):
        SANITIZERS[name]().partial_fit(block)


@every_sanitizer
def test_missing_keys_other_widths_other_kinds_and_misspelt_settings_raise(name):
    detector = fitted(name, world())
    with pytest.raises(AidefendError, match="keys ids, features, labels"):
        detector.score({"features": torch.randn(2, 5)})
    with pytest.raises(AidefendError, match="5 features"):
        detector.score(block_of(torch.randn(2, 6), torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(AidefendError, match="Merge detectors of one kind"):
        detector.merge(object())
    with pytest.raises(TypeError):
        type(detector)(misspelt=1)
