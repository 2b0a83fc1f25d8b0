"""Several detectors as one: no member hides another, and the combined p-values hold under every dependence."""

import pytest
import torch
from safetensors.torch import save_file

from aidefend import AidefendError, ConfigurationError
from aidefend._core.stats import combine_p_values, roc_auc
from aidefend.validate import Energy, Ensemble, Guard, Mahalanobis, NearestNeighbours, load_detector, save_detector
from tests.validate.small_world import model, strange
from tests.validate.small_world import rows as world_rows

METHODS = ["geometric", "harmonic", "bonferroni"]
every_method = pytest.mark.parametrize("method", METHODS)


class Column:
    """A detector whose score is one column of the features, on a scale of its own."""

    uses_features = True

    def __init__(self, index, scale=1.0):
        self.index, self.scale, self.name = index, scale, f"column-{index}"
        self.seen = 0

    def fit(self, features, logits=None, labels=None):
        self.seen = len(features)
        return self

    def score(self, features, logits=None):
        return self.scale * features[:, self.index]


def rows(n, seed, columns=3):
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def joined(method="geometric", scales=(1.0, 1e6, 1e-6), n=2000):
    return Ensemble([Column(i, scale) for i, scale in enumerate(scales)], method=method).fit(rows(n, 0))


@every_method
def test_one_member_that_sees_is_not_hidden_by_two_that_do_not(method):
    """The average of raw scores would be ruled by whichever has the largest unit: here one that sees nothing."""
    fitted, clean = joined(method), rows(1000, 1)
    for column in range(3):
        strange = rows(1000, 2)
        strange[:, column] += 5
        alone = roc_auc(strange[:, column], clean[:, column]).value
        assert roc_auc(fitted.score(strange), fitted.score(clean)).value > alone - 0.03
    average = rows(1000, 2)
    average[:, 2] += 5
    assert roc_auc((average * torch.tensor([1.0, 1e6, 1e-6])).mean(dim=1), clean[:, 1] * 1e6 / 3).value < 0.6


def test_several_members_that_see_a_little_add_up():
    fitted, clean, strange = joined(), rows(1000, 1), rows(1000, 2) + 1.2
    alone = max(roc_auc(strange[:, i], clean[:, i]).value for i in range(3))
    assert roc_auc(fitted.score(strange), fitted.score(clean)).value > alone + 0.03


@every_method
def test_units_of_the_members_change_nothing(method):
    one, other = joined(method), joined(method, scales=(1e-3, 7.0, 1e9))
    torch.testing.assert_close(one.score(rows(50, 3)), other.score(rows(50, 3)), rtol=1e-6, atol=1e-6)


@every_method
def test_the_joint_score_never_falls_when_a_member_rises(method):
    fitted, base = joined(method), rows(300, 4)
    for column in range(3):
        higher = base.clone()
        higher[:, column] += 0.1
        assert bool((fitted.score(higher) >= fitted.score(base)).all())


@every_method
@pytest.mark.parametrize("dependence", ["independent", "equal", "opposite"])
def test_combined_p_values_hold_under_every_dependence(method, dependence):
    """Rate over reference sets and rows of p <= 0.1; by the law of conformal p-values it is at most 0.1."""
    below, total = 0, 0
    for seed in range(60):
        base = rows(320, 100 + seed, columns=2)
        if dependence != "independent":
            base[:, 1] = base[:, 0] if dependence == "equal" else -base[:, 0]
        fitted = Ensemble([Column(0), Column(1)], method=method, reference=0.5).fit(base[:120])
        p = fitted.p_values(base[120:])["combined"]
        below, total = below + int((p <= 0.1).sum()), total + len(p)
    assert below / total < 0.1 + 0.01


def test_the_check_of_the_p_values_notices_means_without_their_factor():
    """Planted violation: the geometric mean of equal p-values of two members that say the opposite, without e."""
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    pair = torch.stack([p, 1 - p], dim=1)
    assert float((combine_p_values(pair, "geometric") <= 0.45).double().mean()) <= 0.45
    assert float((pair.log().mean(dim=1).exp() <= 0.45).double().mean()) > 0.5


def test_members_never_see_the_rows_that_scale_them():
    members = [Column(0), Column(1)]
    fitted = Ensemble(members, reference=0.25).fit(rows(200, 0))
    assert members[0].seen == 150 and len(fitted.reference) == 50


def test_the_split_depends_on_the_seed_alone():
    of = lambda seed: Ensemble([Column(0), Column(1)], seed=seed).fit(rows(200, 0)).reference  # noqa: E731
    assert torch.equal(of(3), of(3)) and not torch.equal(of(3), of(4))


def test_tied_and_constant_members_are_safe():
    x = torch.ones(100, 3, dtype=torch.float64)
    x[:, 0] = torch.arange(100) % 2
    fitted = Ensemble([Column(0), Column(1)]).fit(x)
    assert fitted.score(x).isfinite().all() and fitted.score(x + 100).isfinite().all()
    assert bool((fitted.score(x + 1) > fitted.score(x)).all())


def test_too_few_rows_and_members_are_refused():
    with pytest.raises(ConfigurationError, match="at least 40 rows"):
        Ensemble([Column(0), Column(1)]).fit(rows(39, 0))
    for wrong in ([Energy()], [], Energy(), [Energy(), 3], "ab"):
        with pytest.raises(ConfigurationError, match="two or more detectors"):
            Ensemble(wrong)
    with pytest.raises(ConfigurationError, match="method"):
        Ensemble(method="mean")


def test_members_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"detectors of this package.*Column"):
        save_detector(joined(), tmp_path / "detector")
    nested = Ensemble([Ensemble([Mahalanobis(), Column(0)]), Mahalanobis()]).fit(rows(200, 0))
    with pytest.raises(ConfigurationError, match=r"detectors of this package.*Column"):
        save_detector(nested, tmp_path / "detector")
    assert list(tmp_path.iterdir()) == []


def test_an_ensemble_inside_an_ensemble_is_judged_as_any_detector():
    """Two equal columns joined within count once beside a third, not twice."""
    inner, outer, base = Ensemble([Column(0), Column(0, 7.0)]), Column(1), rows(2000, 0)
    nested = Ensemble([inner, outer]).fit(base)
    flat = Ensemble([Column(0), outer]).fit(base)
    assert nested.member_names == ("ensemble", "column-1")
    a, b = nested.score(rows(1000, 1)), flat.score(rows(1000, 1))
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.99


DEEP = '["FittedEnsemble", {"method": "harmonic", "members": [' * 400 + '["Energy", {}]' + "]}]" * 400


@pytest.mark.parametrize(
    "header",
    [
        '{"schema": "aidefend.detector/1", "detector": ["os.system", {}]}',
        '{"schema": "aidefend.detector/1", "detector": ["FittedNearestNeighbours", {"k": 3}]}',
        '{"schema": "aidefend.detector/1", "detector": ["Energy", {"gamma": 3}]}',
        '{"schema": "aidefend.detector/1", "detector": ' + DEEP + "}",
        '{"schema": "aidefend.detector/2", "detector": ["Energy", {}]}',
        '{"schema": "aidefend.detector/1", "schema": "aidefend.detector/1", "detector": ["Energy", {}]}',
        "[]",
    ],
    ids=range(7),
)
def test_a_damaged_or_hostile_file_is_refused(tmp_path, header):
    save_file({"a": torch.zeros(1)}, tmp_path / "detector", {"header": header})
    with pytest.raises(AidefendError):
        load_detector(tmp_path / "detector")


def test_a_guard_takes_an_ensemble_as_one_detector_and_writes_it(tmp_path):
    network, data = model(), world_rows(600, 1)[0]
    ensemble = Ensemble([Energy(), Mahalanobis(), NearestNeighbours(k=5)])
    guard = Guard.calibrate(network, data, detectors=[ensemble], alpha=0.05)
    guard.save(tmp_path / "guard")
    test = torch.cat([world_rows(50, 2)[0], strange(5)])
    decision, again = guard(test), Guard.load(tmp_path / "guard", network)(test)
    assert not decision.accepted[50:].any() and decision.accepted[:50].float().mean() > 0.8
    assert torch.equal(decision.p_values["ensemble"], again.p_values["ensemble"])


def test_no_more_rows_are_held_back_than_scales_need():
    fitted = Ensemble([Column(0), Column(1)], reference=0.5).fit(rows(5000, 0))
    assert len(fitted.reference) == 2000
