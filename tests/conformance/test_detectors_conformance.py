"""What every detector of `aidefend.validate` promises. A new detector is one line in DETECTORS."""

import copy
import pickle

import pytest
import torch

from aidefend import ConfigurationError
from aidefend.validate import (
    GEN,
    Energy,
    Ensemble,
    Entropy,
    LocalDimension,
    Mahalanobis,
    MaxLogit,
    MaxSoftmax,
    NearestNeighbours,
    RelativeMahalanobis,
    ViM,
    load_detector,
    save_detector,
)

DETECTORS = [
    Energy(),
    MaxLogit(),
    MaxSoftmax(),
    NearestNeighbours(k=3),
    Mahalanobis(),
    RelativeMahalanobis(),
    Entropy(),
    GEN(),
    LocalDimension(k=20),
    ViM(dimension=3),
    Ensemble([Energy(), NearestNeighbours(k=3)]),
    Ensemble([Mahalanobis(), LocalDimension(k=20), NearestNeighbours(k=3)], method="harmonic"),
]
OF_LOGITS = [*DETECTORS[:3], *DETECTORS[6:8], *DETECTORS[9:11]]
OF_FEATURES = [d for d in DETECTORS if d not in OF_LOGITS]
every_detector = pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: type(d).__name__)


def world(n=120, seed=0, strange=False):
    """Features around three directions and the logits that go with them; strange rows lie between and far from all."""
    stream = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=stream)
    features = 6 * torch.eye(3, 5)[y] + torch.randn(n, 5, generator=stream)
    if strange:
        features = torch.randn(n, 5, generator=stream) + torch.tensor([0.0, 0.0, 0.0, 7.0, -7.0])
    return features, features[:, :3].clone(), y


@every_detector
def test_strange_rows_score_higher(detector):
    fitted = detector.fit(*world())
    near, far = fitted.score(*world(seed=1)[:2]), fitted.score(*world(seed=2, strange=True)[:2])
    assert near.shape == (120,) and near.is_floating_point()
    assert float((far[:, None] > near[None]).double().mean()) > 0.9


@every_detector
def test_the_configuration_is_frozen_and_fitting_leaves_it_alone(detector):
    before = repr(detector)
    detector.fit(*world())
    assert repr(detector) == before and detector == copy.deepcopy(detector)
    with pytest.raises(AttributeError):
        detector.k = 9
    with pytest.raises(TypeError):
        type(detector)(neighbors=3)


@every_detector
def test_rows_are_judged_one_by_one(detector):
    fitted, (features, logits, _) = detector.fit(*world()), world(20, seed=1)
    together = fitted.score(features, logits)
    alone = torch.cat([fitted.score(features[i : i + 1], logits[i : i + 1]) for i in range(20)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    order = torch.arange(19, -1, -1)
    torch.testing.assert_close(fitted.score(features[order], logits[order]), together[order], rtol=1e-4, atol=1e-5)


@every_detector
def test_no_rows_give_no_scores(detector):
    fitted = detector.fit(*world())
    assert fitted.score(torch.zeros(0, 5), torch.zeros(0, 3)).shape == (0,)


@every_detector
def test_one_class_is_enough(detector):
    features, logits, _ = world()
    fitted = detector.fit(features, logits, torch.zeros(120, dtype=torch.int64))
    assert fitted.score(features, logits).isfinite().all()


@every_detector
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_keep_the_order(detector, dtype):
    features, logits, y = world()
    fitted = detector.fit(features.to(dtype), logits.to(dtype), y)
    near, far = world(seed=1), world(seed=2, strange=True)
    near_scores = fitted.score(near[0].to(dtype), near[1].to(dtype))
    far_scores = fitted.score(far[0].to(dtype), far[1].to(dtype))
    assert near_scores.dtype in (torch.float32, torch.float64)
    assert float((far_scores[:, None] > near_scores[None]).double().mean()) > 0.9


def shapes_of_trouble(dtype):
    """Name to clean (features, logits): what covariances, norms and distances are divided by vanishes."""
    features, logits, _ = world(60)
    return {
        "zero vectors": (torch.zeros(60, 5), torch.zeros(60, 3)),
        "one direction": (features[:, :1].expand(60, 5), logits),
        "dead features": (features * torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]), logits),
        "more features than rows": (torch.cat([features] * 20, dim=1), logits),
        "copies of one row": (features[:1].expand(60, 5), logits[:1].expand(60, 3)),
        "tiny": (features * 1e-3, logits * 1e-3) if dtype == torch.float16 else (features * 1e-30, logits * 1e-30),
    }


@every_detector
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("trouble", shapes_of_trouble(torch.float32))
def test_singular_covariances_zero_vectors_and_half_precision_are_safe(detector, dtype, trouble):
    features, logits = (array.to(dtype) for array in shapes_of_trouble(dtype)[trouble])
    fitted = detector.fit(features, logits)
    zeros = torch.zeros(1, features.shape[1], dtype=dtype)
    queries = torch.cat([features[:5], zeros, -features[:5]])
    score = fitted.score(queries, torch.cat([logits[:5], torch.zeros(6, 3, dtype=dtype)]))
    assert score.shape == (11,) and score.isfinite().all() and score.dtype in (torch.float32, torch.float64)


@every_detector
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_numbers_of_a_dtype_are_no_nan(detector, dtype, sign):
    """NaN is neither high nor low: differences of infinities inside a formula must not reach the score."""
    features, logits, y = world()
    fitted = detector.fit(features.to(dtype), logits.to(dtype), y)
    largest = sign * torch.finfo(dtype).max
    far = torch.tensor([[largest] * 5, [largest, -largest, 0, 0, 0]], dtype=dtype)
    sizes = [1.0, 1.0] if dtype == torch.float64 else [largest, -largest]  # sums of logits of float64 are no numbers
    score = fitted.score(far, torch.tensor([[sizes[0]] * 3, [*sizes, 0.0]], dtype=dtype))
    assert not score.isnan().any()
    if detector in OF_FEATURES:
        assert (score >= fitted.score(*(array.to(dtype) for array in world(seed=1)[:2])).median()).all()


@every_detector
def test_scores_are_differentiable_in_features_or_logits(detector):
    fitted = detector.fit(*world())
    features, logits, _ = world(8, seed=1)
    features.requires_grad_()
    logits.requires_grad_()
    fitted.score(features, logits).sum().backward()
    gradient = features.grad if fitted.uses_features else logits.grad
    assert gradient is not None and gradient.abs().sum() > 0 and gradient.isfinite().all()


@every_detector
def test_labels_are_optional_and_checked(detector):
    features, logits, _ = world()
    assert detector.fit(features, logits).score(features, logits).isfinite().all()
    with pytest.raises(ConfigurationError, match="labels"):
        detector.fit(features, logits, torch.zeros(3, dtype=torch.int64))


@every_detector
@pytest.mark.parametrize(
    ("features", "logits", "message"),
    [
        (torch.zeros(0, 5), torch.zeros(0, 3), "at least one sample"),
        (torch.zeros(4, 5), torch.zeros(3, 3), "same number of rows"),
        (torch.full((4, 5), float("nan")), torch.zeros(4, 3), "features to be finite"),
        (torch.zeros(4, 5), torch.full((4, 3), float("inf")), "logits to be finite"),
        (torch.zeros(4, 5, 2), torch.zeros(4, 3), "2 dimension"),
        ("features", torch.zeros(4, 3), "torch.Tensor"),
    ],
)
def test_malformed_rows_are_refused(detector, features, logits, message):
    with pytest.raises(ConfigurationError, match=message):
        detector.fit(features, logits)
    fitted = detector.fit(*world())
    if "at least one" not in message:
        with pytest.raises(ConfigurationError, match=message):
            fitted.score(features, logits)


@every_detector
def test_pickling_and_copying_keep_the_scores(detector):
    fitted, (features, logits, _) = detector.fit(*world()), world(9, seed=1)
    expected = fitted.score(features, logits)
    for twin in (pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        torch.testing.assert_close(twin.score(features, logits), expected)


@every_detector
def test_a_file_brings_it_back(detector, tmp_path):
    fitted, (features, logits, _) = detector.fit(*world()), world(9, seed=1)
    save_detector(fitted, tmp_path / "detector")
    twin = load_detector(tmp_path / "detector")
    assert torch.equal(twin.score(features, logits), fitted.score(features, logits))
    assert type(twin) is type(fitted) and twin.name == fitted.name


@pytest.mark.parametrize("detector", OF_FEATURES, ids=lambda d: type(d).__name__)
def test_a_regression_model_is_judged_by_its_features_alone(detector):
    fitted = detector.fit(world()[0])
    near, far = fitted.score(world(seed=1)[0]), fitted.score(world(seed=2, strange=True)[0])
    assert float((far[:, None] > near[None]).double().mean()) > 0.9


@pytest.mark.parametrize("detector", OF_LOGITS, ids=lambda d: type(d).__name__)
def test_a_detector_of_logits_says_that_it_needs_them(detector):
    with pytest.raises(ConfigurationError, match="Expected logits, got logits=None"):
        detector.fit(world()[0])
    with pytest.raises(ConfigurationError, match="Expected logits, got logits=None"):
        detector.fit(*world()).score(world()[0])
