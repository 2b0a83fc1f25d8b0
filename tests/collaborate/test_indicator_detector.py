"""Partners' indicators at work: as a detector of screen, as a verdict of their own, as a deny-list for files."""

import copy
import hashlib
import json
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aidefend import ConfigurationError, Evidence
from aidefend.artifacts import inspect_artifact
from aidefend.attacks.poisoning import Patch
from aidefend.collaborate import (
    Indicator,
    IndicatorDetector,
    apply_indicators,
    artifact_indicator,
    from_stix,
    sample_indicators,
    to_stix,
    trigger_indicator,
)
from aidefend.sanitize import screen

KEY = b"a shared secret key"


def data(n=120, seed=0):
    stream = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=stream), torch.randint(0, 3, (n,), generator=stream)


def block(x):
    return {"ids": tuple(map(str, range(len(x)))), "features": torch.zeros(len(x), 2), "x": x}


def test_scores_titles_and_found_indicators_of_each_row():
    x, _ = data(4)
    ours = [*sample_indicators(x[:1], KEY, title="one"), *sample_indicators(x[:2], KEY, title="other")]
    detector = apply_indicators(ours, KEY)
    assert detector.score(block(x)).tolist() == [1, 1, 0, 0] and detector.score(block(x)).dtype == torch.float64
    assert detector.matches(x) == [("one", "other"), ("other",), (), ()]
    assert detector.found(x)[0] == (ours[0], ours[1])


def test_arrays_lists_and_other_shapes_are_scored():
    x, _ = data(3)
    detector = apply_indicators(sample_indicators(x, KEY), KEY)
    assert detector.score({"x": x.numpy()}).tolist() == detector.score({"x": x.tolist()}).tolist() == [1, 1, 1]
    assert detector.score({"x": x[:, :, :4]}).tolist() == [0, 0, 0]
    assert detector.score({"x": x[:0]}).shape == (0,)


def test_a_row_that_is_not_finite_has_no_score_and_harms_no_other():
    x, _ = data(3)
    detector = apply_indicators(sample_indicators(x, KEY), KEY)
    x[1, 0, 0, 0] = torch.nan
    score = detector.score({"x": x})
    assert score[[0, 2]].tolist() == [1, 1] and bool(score[1].isnan())
    assert detector.matches(x)[1] == ()


def test_fitting_changes_nothing_and_the_detector_copies():
    x, _ = data(3)
    detector = apply_indicators(sample_indicators(x[:1], KEY), KEY)
    assert detector.partial_fit(block(x)) is detector
    for twin in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert twin == detector and twin.score(block(x)).tolist() == [1, 0, 0]


def test_merging_joins_indicators_and_refuses_other_keys_and_ranges():
    x, _ = data(3)
    first, second = (apply_indicators(sample_indicators(x[i : i + 1], KEY), KEY) for i in (0, 1))
    merged = first.merge(second)
    assert merged.score({"x": x}).tolist() == [1, 1, 0] and first.score({"x": x}).tolist() == [1, 0, 0]
    assert merged.merge(merged) == merged
    for other in (apply_indicators([], b"another secret key"), apply_indicators([], KEY, bounds=(0.0, 2.0)), None):
        with pytest.raises(ConfigurationError, match="same key and bounds"):
            first.merge(other)


def test_what_one_detector_left_out_stays_out_after_merging():
    x, _ = data(50)
    common = sample_indicators(x[:1], KEY)
    careful = apply_indicators(common, KEY, reference=x[:50])
    assert careful.left_out == tuple(common) and careful.indicators == ()
    assert careful.merge(apply_indicators(common, KEY)).indicators == ()
    assert apply_indicators(common, KEY).merge(careful).left_out == tuple(common)


def test_a_hostile_partners_indicator_for_the_dark_corner_is_left_out():
    x, _ = data(200)
    x[..., :3, :3] = 0.0
    bad = x[:20].clone()
    bad[..., 5:, 5:] = 1.0
    wanted = trigger_indicator(bad, x, KEY)
    dark = trigger_indicator(x[:20], data(200, seed=1)[0], KEY, title="dark corner")
    trusting, careful = apply_indicators([wanted, dark], KEY), apply_indicators([wanted, dark], KEY, reference=x)
    assert float(trusting.score({"x": x}).sum()) == 200
    assert float(careful.score({"x": x}).sum()) == 0 and careful.score({"x": bad}).tolist() == [1.0] * 20
    assert careful.left_out == (dark,) and careful.indicators == (wanted,)


def test_too_many_windows_are_refused_before_they_cost_anything():
    many = [Indicator("trigger", "0" * 64, "", (i // 100, i % 100, 1, 1), (100, 100)) for i in range(257)]
    assert len(apply_indicators(many[:256], KEY).indicators) == 256
    with pytest.raises(ConfigurationError, match="at most 256 different trigger windows"):
        apply_indicators(many, KEY)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: apply_indicators([], b"short"), "key of at least 16 bytes"),
        (lambda: apply_indicators([], KEY, bounds=(1.0, 1.0)), "low < high"),
        (lambda: apply_indicators("0" * 64, KEY), "a collection of indicators"),
        (lambda: apply_indicators({"a": 1}, KEY), "a collection of indicators"),
        (lambda: apply_indicators([{"kind": "sample"}], KEY), "indicators, got indicators='dict'"),
        (lambda: IndicatorDetector(["x"], KEY), "indicators, got indicators='str'"),
        (lambda: IndicatorDetector((), b"short"), "key of at least 16 bytes"),
        (lambda: IndicatorDetector((), KEY).score({"features": torch.ones(2, 2)}), 'a block with "x"'),
        (lambda: IndicatorDetector((), KEY).score(torch.ones(2, 2)), 'a block with "x"'),
        (lambda: IndicatorDetector((), KEY).score({"x": "text"}), "numbers that fit a tensor"),
        (lambda: IndicatorDetector((), KEY).score({"x": [[1.0], [1.0, 2.0]]}), "numbers that fit a tensor"),
        (lambda: IndicatorDetector((), KEY).score({"x": torch.ones(3)}), r"x of shape \(N, ...\)"),
        (lambda: IndicatorDetector((), KEY).score({"x": torch.ones(3, 2), "ids": ("a",)}), "3 ids"),
        (lambda: IndicatorDetector((), KEY).matches([1.0]), "x to be a torch.Tensor"),
    ],
)
def test_malformed_calls_are_refused_by_name(call, message):
    with pytest.raises(ConfigurationError, match=message):
        call()


def test_a_verdict_of_its_own_names_rows_as_screen_does():
    x, y = data()
    x[7, 0, 2, 2] = torch.nan
    detector = apply_indicators(sample_indicators(x[:5], KEY, title="seen at a bank"), KEY)
    verdict = detector.judge((x, y))
    assert verdict.quarantine_indices.tolist() == [0, 1, 2, 3, 4, 7]
    assert verdict.reasons[0] == ("shared indicator: seen at a bank",) and verdict.reasons[7] == ("not finite",)
    assert verdict.method == "shared-indicators" and "shared-indicators.rejected_share" in verdict.to_evidence()
    assert len(verdict.view(TensorDataset(x, y))) == 114
    assert KEY.decode() not in json.dumps(verdict.to_dict())
    batches = DataLoader(TensorDataset(x, y), batch_size=16, generator=torch.Generator())
    assert detector.judge(batches).ids == verdict.ids and torch.equal(detector.judge(batches).keep, verdict.keep)
    assert detector.judge(x).quarantine_indices.tolist() == [0, 1, 2, 3, 4, 7]


def test_screen_takes_it_as_a_detector_and_the_verdicts_join():
    x, y = data()
    detector = apply_indicators(sample_indicators(x[:5], KEY), KEY)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    report = screen((x, y), model, detectors=[detector], seed=0)
    score = report.scores["indicator_detector"]
    assert score[:5].tolist() == [1.0] * 5 and float(score.sum()) == 5
    both = report & detector.judge((x, y))
    assert not bool(both.keep[:5].any()) and both.scores["shared_indicators"][:5].tolist() == [1.0] * 5


def test_one_organisations_finding_cleans_anothers_data():
    x, y = data(600)
    mine = Patch(target=0, rate=0.1).poison((x[:300], y[:300]), seed=0)
    rows = torch.stack([mine.dataset[i][0] for i in range(300)])
    trigger = trigger_indicator(rows[mine.is_poison], rows[~mine.is_poison], KEY)
    text = json.dumps(to_stix(Evidence(), [trigger, *sample_indicators(rows[mine.is_poison], KEY)], tlp="green"))
    theirs = Patch(target=2, rate=0.05).poison((x[300:], y[300:]), seed=1)
    verdict = apply_indicators(from_stix(text).indicators, KEY).judge(theirs.dataset)
    assert torch.equal(verdict.keep, ~theirs.is_poison)


def test_known_malicious_files_are_denied(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"cposix\nsystem\n(S'id'\ntR.")
    digest = hashlib.sha256((tmp_path / "model.bin").read_bytes()).hexdigest()
    bundle = to_stix(Evidence(), [artifact_indicator(digest), artifact_indicator("0" * 64)])
    detector = apply_indicators(from_stix(bundle).indicators, KEY)
    assert detector.deny == {digest, "0" * 64}
    assert "artifacts.denied" in inspect_artifact(tmp_path, deny=detector.deny)
    assert "artifacts.denied" not in inspect_artifact(tmp_path, deny=apply_indicators([], KEY).deny)
