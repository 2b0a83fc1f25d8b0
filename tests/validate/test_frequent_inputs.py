"""Inputs that traffic brings again and again: the promised rate holds for them, in a batch, alone and under attack."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

from aidefend import ConfigurationError
from aidefend._core.batches import content_ids
from aidefend.validate import (
    Calibration,
    Energy,
    Ensemble,
    Guard,
    LocalDimension,
    Mahalanobis,
    MaxSoftmax,
    NearestNeighbours,
)
from aidefend.validate.calibration import JointCalibration

ALPHA, ROWS = 0.05, 3000


@functools.cache
def network():
    stream = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=stream) / 3
    return net.eval()


def forms(seed, blank=4.0):
    """Clean rows, of which one in five is the same unusual one: a form that was sent off as it is."""
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * ROWS, 6, generator=stream)
    x[torch.rand(2 * ROWS, generator=stream) < 0.2] = torch.as_tensor(blank)
    return x[:ROWS], x[ROWS:]


def strangest(detector):
    """Of some unusual rows the one that the detector finds strangest, on clean rows without it."""
    rows = 4 * torch.randn(100, 6, generator=torch.Generator().manual_seed(5)).sign()
    with Guard.calibrate(network(), forms(0)[0], detectors=[detector], alpha=ALPHA) as guard:
        return rows[guard(rows).report.scores["combined"].argmax()]


@pytest.mark.parametrize("detector", [Energy(), MaxSoftmax(), Mahalanobis(), NearestNeighbours(k=20)], ids=repr)
def test_a_frequent_input_is_not_refused_for_want_of_its_copies(detector):
    """Planted violation: all its copies were in one part; where that was not the calibration, 20 % were refused."""
    blank = strangest(detector)
    for seed in range(6):
        calibration, test = forms(seed, blank)
        with Guard.calibrate(network(), calibration, detectors=[detector], alpha=ALPHA, seed=seed) as guard:
            assert (~guard(test).accepted).double().mean() < 2 * ALPHA
            assert guard(blank[None]).accepted.all()


SETS = [[Energy()], [NearestNeighbours(k=20)], [Energy(), NearestNeighbours(k=20)], [LocalDimension()], [Ensemble()]]


@pytest.mark.parametrize("detectors", SETS, ids=repr)
def test_what_ties_with_the_threshold_is_judged_alike_in_a_batch_alone_and_in_the_view(detectors):
    """Planted violation: rounding of another batch size decided, so that a fifth of the rows was refused one by one."""
    for seed in range(3):
        calibration, test = forms(seed)
        with Guard.calibrate(network(), calibration, detectors=detectors, alpha=ALPHA, seed=seed) as guard:
            rows = torch.cat([test[:100], calibration[:300]])
            together = guard(rows).accepted
            assert torch.equal(together, torch.cat([guard(row[None]).accepted for row in rows]))
            assert torch.equal(together, torch.cat([guard(part).accepted for part in rows.split(17)]))
            assert torch.equal(together, guard.attackable()(rows).argmax(dim=1) < 3)


def test_a_frequent_input_is_in_every_part_in_proportion_and_others_keep_their_copies_together():
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Noting:
        name: str = "noting"
        uses_features: bool = False
        uses_inputs: bool = True

        def fit(self, features, logits=None, labels=None):
            return self

        def score(self, features, logits=None, *, x=None, model=None):
            seen.append(x)
            return x[:, 0]

    x, _ = forms(0)
    x[:600] = torch.randn(200, 6, generator=torch.Generator().manual_seed(9)).repeat(3, 1)
    with Guard.calibrate(network(), x, detectors=[Noting(), Noting()], alpha=ALPHA) as guard:
        assert guard.facts.fit_n + guard.facts.reference_n + guard.facts.calibration_n == ROWS
        split = guard.facts.calibration_n + guard.facts.reference_n
    found = torch.cat(seen[: len(seen)])[: 2 * split]
    copies = (found[:, None] == x[:200]).all(dim=2).sum(dim=0) // 2
    assert set(copies.tolist()) == {0, 3}  # each detector has seen none of them, or all
    share = (found == 4).all(dim=1).double().mean()
    assert abs(float(share) - float((x == 4).all(dim=1).double().mean())) < 0.03


def test_a_data_set_that_was_copied_as_a_whole_has_no_frequent_inputs():
    x = forms(0)[0][:400] + 0.01 * torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    detectors = [NearestNeighbours(k=1)]
    with Guard.calibrate(network(), x.repeat(15, 1), detectors=detectors, alpha=ALPHA) as guard:
        assert (guard.calibration.scores > 1e-6).double().mean() > 0.5  # no calibration row finds itself in the bank


@pytest.mark.parametrize("mode", ["marginal", "class-conditional", "calibration-conditional"])
def test_rounding_decides_nothing_and_what_lies_apart_is_judged_as_before(mode):
    stream = torch.Generator().manual_seed(0)
    grid = torch.linspace(-2, 2, 80, dtype=torch.float64).repeat(5)  # each row five times, far from the next
    scores = grid[torch.randperm(400, generator=stream), None] * torch.tensor([3.0, 0.01]) + 0.5
    classes = torch.arange(400) % 2 if mode == "class-conditional" else None
    reference = scores[torch.randperm(400, generator=stream)[:60]] + 0.001
    calibration = JointCalibration.of(("a", "b"), scores, reference, ALPHA, mode, 0.05, classes)
    noise = 2 * torch.rand(400, 2, generator=stream, dtype=torch.float64) - 1
    exact = calibration.judge(scores, classes)
    moved = calibration.judge(scores + 0.9 * calibration.slack * noise, classes)
    assert torch.equal(exact.refused, moved.refused) and torch.equal(exact.ranks, moved.ranks)
    assert torch.equal(calibration.margin(scores + 0.9 * calibration.slack * noise, classes) > 0, exact.refused)
    if mode != "class-conditional":
        few = calibration.judge_few((scores + 0.9 * calibration.slack * noise)[:16].tolist())
        assert torch.equal(few.refused, exact.refused[:16]) and torch.equal(few.ranks, exact.ranks[:16])
    assert bool((calibration.slack <= 1e-3 * scores.std(dim=0)).all()) and bool((calibration.slack > 0).all())
    assert int(exact.refused.sum()) > 0


def test_p_values_of_an_ensemble_do_not_fall_by_rounding():
    """Planted violation: a row that ties with all rows held back, but for its last digit, had the smallest p-value."""
    features = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    features[torch.arange(200) % 10 > 0] = 4.0
    fitted = Ensemble([Mahalanobis(), NearestNeighbours(k=5)]).fit(features)
    frequent = torch.full((1, 6), 4.0)
    for moved in (frequent, frequent * (1 + 3e-7), frequent * (1 - 3e-7)):
        assert all(float(p) > 0.5 for p in fitted.p_values(moved).values())
    assert float(fitted.p_values(-10 * frequent)["combined"]) < 0.2


def test_a_frequent_input_may_have_been_trained_on_and_no_other_may():
    """Planted violation: who left the blank form out of the calibration rows, as the error said, had it refused."""
    x, test = forms(0)
    train = torch.cat([forms(7)[0], x[:1] if (x[0] != 4).any() else x[1:2]])
    blank = torch.full((1, 6), 4.0)
    with Guard.calibrate(network(), x, alpha=ALPHA, train_ids=content_ids(blank), fit=forms(7)[0]) as guard:
        assert guard(blank).accepted.all() and (~guard(test).accepted).double().mean() < 2 * ALPHA
        guard.recalibrate(forms(3)[0], reason="a new day", used_ids=content_ids(blank))
        assert guard(blank).accepted.all()
        with pytest.raises(ConfigurationError, match="1 shared inputs"):
            guard.recalibrate(x, reason="a new day", used_ids=content_ids(train))
    for options in ({"train_ids": content_ids(train)}, {"fit": train}):
        with pytest.raises(ConfigurationError, match="1 shared inputs"):
            Guard.calibrate(network(), x, alpha=ALPHA, **options)
    ids, scores = content_ids(x), torch.rand(ROWS, generator=torch.Generator().manual_seed(0))
    assert Calibration.of(scores, ALPHA, ids=ids, used_ids=content_ids(blank)).n == ROWS
    with pytest.raises(ConfigurationError, match="1 shared inputs"):
        Calibration.of(scores, ALPHA, ids=ids, used_ids=content_ids(train))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15, 1e100])
def test_the_local_dimension_on_top_of_clean_rows_does_not_hang_on_rounding(scale):
    """Planted violation: a row beside k copies by its last digit had the highest dimension of all, not the lowest."""
    dtype = torch.float64 if scale > 1e30 else torch.float32
    bank = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    bank[:50] = 3.0
    fitted = LocalDimension(k=20).fit(bank * scale)
    row = torch.full((1, 4), 3.0, dtype=dtype)
    for moved in (row, row * (1 + 3e-7), row * (1 - 3e-7)):
        assert fitted.score(moved * scale).item() == 0
    assert fitted.score((row + 0.5) * scale).item() > 100  # beside its copies, all of them equally far
    beside = bank[60:61] * (1 + 3e-7)
    assert fitted.score(beside * scale).item() == pytest.approx(fitted.score(bank[60:61] * scale).item(), rel=1e-3)


def test_few_rows_join_equal_surprises_as_many_rows_do():
    column = torch.randn(300, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    twice = column.repeat(1, 2)  # the same detector twice: their surprises are equal to the last digit
    calibration = JointCalibration.of(("a", "a-2"), twice[:200], twice[200:], ALPHA)
    rows = torch.cat([twice[:10], twice[:4] + 9])
    few, many = calibration.judge_few(rows.tolist()), calibration.judge(rows)
    torch.testing.assert_close(torch.stack(few.numbers), torch.stack(many.numbers))
    assert torch.equal(few.refused, many.refused)
