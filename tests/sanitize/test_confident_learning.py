"""Wrong labels from out-of-sample predictions: against a naive twin, known noise, rare classes, and on real digits."""

import itertools
import pickle

import numpy as np
import pytest
import torch

from aidefend import AidefendError
from aidefend.sanitize import ConfidentLearning, label_noise


def noisy(n=3000, classes=4, rate=0.2, kind="symmetric", sharpness=3.0, seed=0, weights=None):
    """Rows whose logits point, with noise, at their true class; and labels of which a known part is wrong."""
    stream = torch.Generator().manual_seed(seed)
    chances = torch.ones(classes) if weights is None else torch.tensor(weights)
    true = torch.multinomial(chances, n, replacement=True, generator=stream)
    logits = torch.randn(n, classes, generator=stream).double()
    logits[torch.arange(n), true] += sharpness
    wrong = torch.rand(n, generator=stream) < rate
    shift = torch.randint(1, classes, (n,), generator=stream) if kind == "symmetric" else torch.ones(n).long()
    labels = torch.where(wrong, (true + shift) % classes, true)
    return block_of(logits, labels), wrong, true


def block_of(logits, labels, start=0):
    ids = tuple(f"row-{start + i}" for i in range(len(labels)))
    return {"ids": ids, "features": torch.zeros(len(labels), 1), "labels": labels, "logits": logits}


def cut(block, rows):
    rows = torch.as_tensor(rows)
    part = {key: block[key][rows] for key in ("features", "labels", "logits")}
    return {"ids": tuple(block["ids"][i] for i in rows.tolist()), **part}


def fitted(*blocks, **settings):
    detector = ConfidentLearning(**settings)
    for block in blocks:
        detector.partial_fit(block)
    return detector


def f1(found, truth):
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


def naive(block):
    """The definition row by row, in numpy: scores, expected share of errors, issues, and if errors were unmixed."""
    p = torch.softmax(block["logits"], 1).numpy()
    z, (n, k) = block["labels"].numpy(), p.shape
    confusion = naively_counted(p, z)
    (plain, first), (unmixed, second) = (naive_fit(p, m, confusion, z) for m in (np.eye(k), np.linalg.inv(confusion)))
    posterior = second if unmixed > plain else first
    masses = [[posterior[z == given, true].sum() for given in range(k)] for true in range(k)]
    confusion = (np.array(masses) + 1 / k) / (np.array(masses) + 1 / k).sum(1, keepdims=True)
    _, posterior = naive_fit(p, np.linalg.inv(confusion) if unmixed > plain else np.eye(k), confusion, z)
    scores = 1 - posterior[np.arange(n), z]
    ranked = sorted((i for i in range(n) if p[i].max() > p[i, z[i]]), key=lambda i: -scores[i])
    expected = [2 * scores[ranked[:m]].sum() / (m + scores.sum()) for m in range(1, len(ranked) + 1)]
    return scores, scores.mean(), sorted(ranked[: 1 + int(np.argmax(expected))]), unmixed > plain


def naive_fit(p, inverse, confusion, z):
    """The highest likelihood over the exponents, and the posterior (n, k) there."""
    q = np.maximum(p @ inverse, 1e-3)
    relative = q / [q[z == j, j].mean() for j in range(q.shape[1])]
    fits = []
    for exponent in (2 ** (step / 4) for step in range(-4, 18)):
        true = relative**exponent / (relative**exponent).sum(1, keepdims=True)
        weights = true * confusion[:, z].T
        fits.append((np.log(weights.sum(1)).sum(), weights / weights.sum(1, keepdims=True)))
    return max(fits, key=lambda fit: fit[0])


def naively_counted(p, z):
    """P(given | true) among the rows that are more confident than usual, each cell drawn halfway to the mean of all."""
    n, k = p.shape
    usual = [p[z == j, j].mean() for j in range(k)]
    joint = np.zeros((k, k))
    for i in range(n):
        confident = [j for j in range(k) if p[i, j] >= usual[j]]
        if confident:
            joint[z[i], max(confident, key=lambda j: p[i, j])] += 1
    joint = joint / joint.sum(1, keepdims=True) * np.bincount(z, minlength=k)[:, None] / n
    mean = (joint.sum() - np.trace(joint)) / (k * (k - 1))
    confusion = np.zeros((k, k))
    for true, given in itertools.product(range(k), range(k)):
        confusion[true, given] = joint[given, true] if true == given else (joint[given, true] + mean) / 2
    return confusion / confusion.sum(1, keepdims=True)


@pytest.mark.parametrize("kind", ["symmetric", "next"])
@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("learnt", [False, True])
def test_equals_the_naive_twin(kind, factor, learnt):
    block, _, _ = noisy(300, kind=kind, sharpness=4.0)
    block["logits"] *= factor
    if learnt:  # it predicts labels as they are given, with the errors
        clean = torch.softmax(block["logits"], 1)
        block["logits"] = (0.8 * clean + 0.2 * clean.roll(1, dims=1)).log()
    detector = fitted(block)
    scores, share, issues, unmixed = naive(block)
    torch.testing.assert_close(detector.score(block), torch.from_numpy(scores), rtol=1e-9, atol=1e-9)
    assert detector.error_share == pytest.approx(share)
    assert detector.issues(block).nonzero().flatten().tolist() == issues
    assert unmixed or not learnt or kind == "symmetric" or factor > 1


@pytest.mark.parametrize("classes", [2, 4])
def test_a_model_that_is_less_sure_than_it_may_be_finds_as_much(classes):
    """Planted: the share of errors as counted among confident rows, as many rows called wrong: .04 to .1 less F1."""
    block, wrong, _ = noisy(1500, classes, rate=0.05, sharpness=3.0)
    unsure = {**block, "logits": block["logits"] / 4}
    plain, tempered = fitted(block), fitted(unsure)
    assert f1(tempered.issues(unsure), wrong) > f1(plain.issues(block), wrong) - 0.01
    assert tempered.error_share == pytest.approx(plain.error_share, abs=0.005)


def test_what_is_called_wrong_is_close_to_the_best_choice_of_this_ranking():
    """Classes overlap, so that many predictions are wrong, too. Planted: as many rows as were counted as errors."""
    for seed in range(3):
        block, wrong, _ = noisy(1500, 4, rate=0.2, sharpness=1.5, seed=seed)
        detector = fitted(block)
        contested = block["logits"].argmax(1) != block["labels"]
        order = torch.where(contested, detector.score(block), -1.0).argsort(descending=True)
        found = wrong[order].double().cumsum(0)
        best = float((2 * found / (torch.arange(1, 1501) + wrong.sum())).max())
        assert f1(detector.issues(block), wrong) > best - 0.045


def test_agreeing_rows_that_stand_for_others_change_little(monkeypatch):
    block, wrong, _ = noisy(6000, rate=0.2)
    every = fitted(block)
    monkeypatch.setattr(label_noise, "_AGREEING", 400)
    few = fitted(block)
    assert few.error_share == pytest.approx(every.error_share, abs=0.01)
    assert f1(few.issues(block), wrong) == pytest.approx(f1(every.issues(block), wrong), abs=0.01)


@pytest.mark.parametrize("columns", [1, 32, 33])
def test_contested_is_what_is_below_the_largest(columns):
    logits = torch.randn(5000, columns, generator=torch.Generator().manual_seed(0)).double().round(decimals=1)
    labels = torch.arange(5000) % columns
    truth = torch.tensor([row[label] < row.max() for row, label in zip(logits, labels, strict=True)])
    before = logits.clone()
    assert torch.equal(label_noise.contests(logits, labels), truth) and torch.equal(logits, before)


def test_the_block_is_left_as_it_was():
    """With one column, the transposed logits are the logits themselves."""
    for classes in (1, 3):
        block = block_of(torch.randn(20, classes).double(), torch.arange(20) % classes)
        before = block["logits"].clone()
        detector = fitted(block)
        detector.score(block), detector.issues(block), detector.suggestions(block)
        assert torch.equal(block["logits"], before)


@pytest.mark.parametrize("kind", ["symmetric", "next"])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2, 0.4])
def test_known_noise_is_found_and_measured(rate, kind):
    block, wrong, true = noisy(rate=rate, kind=kind, sharpness=5.0)
    detector = fitted(block)
    found = detector.issues(block)
    assert f1(found, wrong) > 0.85
    assert detector.error_share == pytest.approx(rate, abs=0.03)
    assert -0.02 < float(found.double().mean()) - detector.error_share < 0.005
    assert not bool((found & (block["logits"].argmax(1) == block["labels"])).any())
    both = found & wrong
    assert float((detector.suggestions(block)[both] == true[both]).double().mean()) > 0.85


@pytest.mark.parametrize("wrong", [11, 12, 14])  # of twenty
def test_counts_that_call_labels_mostly_wrong_do_not_turn_the_ranking_around(wrong):
    """Planted: the confusion as counted, whose inverse takes each prediction for its opposite."""
    true = torch.arange(200) % 2
    labels = torch.where(torch.arange(200) % 20 < wrong, 1 - true, true)
    block = block_of(2.0 * torch.nn.functional.one_hot(true, 2).double(), labels)
    detector = fitted(block)
    scores, agrees = detector.score(block), labels == true
    assert detector.error_share > 0.5 or wrong == 11
    assert scores[agrees].max() < scores[~agrees].min()


def test_the_higher_the_score_the_more_are_wrong():
    block, wrong, _ = noisy(20_000, rate=0.2)
    scores = fitted(block).score(block)
    shares = [float(part.double().mean()) for part in wrong[scores.argsort()].chunk(5)]
    assert shares == sorted(shares) and shares[0] < 0.01 and shares[-1] > 0.7
    assert float(scores.min()) >= 0 and float(scores.max()) <= 1


def test_clean_labels_lose_next_to_nothing():
    block, _, _ = noisy(rate=0.0, sharpness=8.0)
    assert float(fitted(block).issues(block).double().mean()) < 0.005


def test_a_rare_class_of_a_modest_model_is_not_swept_away():
    """The model is less sure of the rare class: its own usual confidence counts. Planted: one measure for all."""
    block, _, true = noisy(4000, 2, rate=0.0, sharpness=4.0, weights=[0.97, 0.03])
    block["logits"][:, 0] += 4.0  # it prefers the common class by far
    rare = true == 1
    found = fitted(block).issues(block)
    assert float(found[rare].double().mean()) < 0.2
    plain = block["logits"].argmax(1) != block["labels"]
    assert float(plain[rare].double().mean()) > 0.4


def test_over_confident_models_are_measured_by_themselves():
    block, wrong, _ = noisy(rate=0.2, sharpness=4.0)
    hot = {**block, "logits": 4 * block["logits"]}
    assert f1(fitted(hot).issues(hot), wrong) > 0.85


@pytest.mark.parametrize("limit", [2000, 50])
def test_any_sharding_gives_the_same(limit):
    block, _, _ = noisy(400)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    whole = fitted(block, limit=limit)
    shards = [cut(block, rows) for rows in order.split(90)]
    merged = fitted(shards[0], limit=limit)
    for shard in shards[1:]:
        before = merged.score(block)
        total = merged.merge(fitted(shard, limit=limit))
        assert torch.equal(merged.score(block), before)
        merged = total
    for other in (fitted(*shards, limit=limit), merged, pickle.loads(pickle.dumps(whole))):
        torch.testing.assert_close(other.score(block), whole.score(block), rtol=1e-9, atol=1e-9)
        assert torch.equal(other.issues(block), whole.issues(block))
    parts = [whole.score(cut(block, range(a, min(a + 7, 400)))) for a in range(0, 400, 7)]
    torch.testing.assert_close(torch.cat(parts), whole.score(block), rtol=1e-9, atol=1e-9)


def test_a_sample_stands_for_all():
    block, wrong, _ = noisy(6000, rate=0.2, sharpness=5.0, weights=[0.7, 0.1, 0.1, 0.1])
    small = fitted(block, limit=100)
    assert small.error_share == pytest.approx(fitted(block).error_share, abs=0.05)
    assert f1(small.issues(block), wrong) > 0.8


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_tiny_data_never_fails(n):
    block = block_of(torch.randn(n, 3), torch.zeros(n, dtype=torch.int64))
    detector = fitted(block)
    assert detector.score(block).shape == detector.issues(block).shape == (n,)
    assert not bool(detector.issues(block).any()) or n > 0


def test_no_opinion_about_bad_rows_unseen_classes_and_before_any_row():
    block, _, _ = noisy(300, 3)
    assert bool(ConfidentLearning().score(block).isnan().all())
    assert not bool(ConfidentLearning().issues(block).any())
    two = cut(block, (block["labels"] < 2).nonzero().flatten())
    detector = fitted(two)
    assert torch.equal(detector.score(block).isnan(), block["labels"] == 2)
    broken = {**block, "logits": block["logits"].clone()}
    broken["logits"][4, 1] = torch.nan
    without = fitted(cut(block, [i for i in range(300) if i != 4])).score(block)
    scores = fitted(broken).score(broken)
    keep = torch.arange(300) != 4
    assert bool(scores[4].isnan()) and not bool(fitted(broken).issues(broken)[4])
    torch.testing.assert_close(scores[keep], without[keep], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        {"logits": torch.randn(3, 2, 2)},
        {"logits": torch.ones(3, 2, dtype=torch.int64)},
        {"logits": torch.randn(2, 3)},
        {"labels": torch.tensor([0, 1])},
        {"labels": torch.tensor([0, 5, 1])},
        {"ids": ("a", "b")},
    ],
)
def test_malformed_blocks_raise(change):
    block = {**block_of(torch.randn(3, 2), torch.tensor([0, 1, 0])), **change}
    with pytest.raises(AidefendError, match="Expected"):
        ConfidentLearning().partial_fit(block)


def test_missing_logits_other_widths_and_kinds_raise():
    block, _, _ = noisy(30, 3)
    detector = fitted(block)
    with pytest.raises(AidefendError, match="logits"):
        detector.score({key: block[key] for key in ("ids", "features", "labels")})
    with pytest.raises(AidefendError, match="3 features"):
        detector.score(block_of(torch.randn(2, 4), torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(AidefendError, match="Merge"):
        detector.merge(ConfidentLearning(limit=7))
    with pytest.raises(AidefendError, match="seen rows"):
        _ = ConfidentLearning().error_share


def test_planted_scores_without_the_confusion(monkeypatch):
    """With every confusion held for as likely, systematic errors hide behind their label: the ranking falls."""
    block, wrong, _ = noisy(rate=0.4, kind="next", sharpness=2.0)

    def ranking():
        scores = fitted(block).score(block)
        return float((scores[wrong][:, None] > scores[~wrong][None, :]).double().mean())

    honest = ranking()
    monkeypatch.setattr(label_noise, "_mostly_right", lambda _: np.ones((4, 4)))
    monkeypatch.setattr(np.linalg, "pinv", lambda _: np.eye(4))
    assert ranking() < honest - 0.005


def test_classes_that_were_never_given_change_nothing_and_take_no_room():
    """One key of a database among the labels would otherwise make matrices of all numbers below it."""
    block, _, _ = noisy(rate=0.2, kind="symmetric", sharpness=2.0)
    wide = torch.full((len(block["labels"]), 3000), -1e9, dtype=torch.float64)
    spread = torch.tensor([0, 700, 701, 2999])
    wide[:, spread] = block["logits"].double()
    other = {**block, "logits": wide, "features": wide, "labels": spread[block["labels"]]}
    few, many = fitted(block), fitted(other)
    assert few._model().confusion.shape == many._model().confusion.shape == (4, 4)
    assert torch.allclose(few.score(block), many.score(other)) and torch.equal(few.issues(block), many.issues(other))
    assert torch.equal(spread[few.suggestions(block)], many.suggestions(other))
