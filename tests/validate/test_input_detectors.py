"""Detectors that look at the inputs: conventions, known answers, and the attack that each is there for."""

import copy
import pickle

import pytest
import torch
from torch import nn

from aidefend import ConfigurationError, IncompatibleModel
from aidefend._core.stats import roc_auc
from aidefend.validate import (
    BitDepth,
    Consistency,
    Energy,
    Ensemble,
    FeatureSqueezing,
    MedianFilter,
    Reconstruction,
    load_detector,
    save_detector,
)

DETECTORS = [FeatureSqueezing(), FeatureSqueezing([BitDepth(1), MedianFilter(3)]), Consistency(), Consistency(2, 0.0)]
every_detector = pytest.mark.parametrize("detector", DETECTORS, ids=repr)


def linear(d, k=3, scale=1.0):
    layer = nn.utils.skip_init(nn.Linear, d, k)
    with torch.no_grad():
        layer.weight.copy_(scale * torch.randn(k, d, generator=torch.Generator().manual_seed(5)))
        layer.bias.zero_()
    return layer


MODEL = nn.Sequential(nn.Flatten(), linear(144)).eval()


def images(n=30, seed=0):
    return torch.rand(n, 1, 12, 12, generator=torch.Generator().manual_seed(seed))


def scored(detector, x, model=MODEL):
    with torch.no_grad():
        return detector.score(torch.zeros(len(x), 0), model(x), x=x, model=model)


@every_detector
def test_scores_are_in_range_by_row_and_repeatable(detector):
    x = images()
    score = scored(detector.fit(torch.zeros(30, 0), MODEL(x).detach()), x)
    assert score.shape == (30,) and bool((score >= 0).all()) and bool((score <= 2).all()) and float(score.max()) > 0
    alone = torch.cat([scored(detector, row[None]) for row in x])
    torch.testing.assert_close(score, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(scored(detector, x), score)
    assert scored(detector, x[:0]).shape == (0,)


@every_detector
def test_copies_and_files_keep_the_scores(detector, tmp_path):
    x = images()
    assert detector == copy.deepcopy(detector)
    assert torch.equal(scored(pickle.loads(pickle.dumps(detector)), x), scored(detector, x))
    save_detector(detector, tmp_path / "detector")
    assert load_detector(tmp_path / "detector") == detector


@every_detector
def test_a_missing_model_or_input_is_named(detector):
    x = images(4)
    none, logits = torch.zeros(4, 0), MODEL(x).detach()
    for given in ({}, {"x": x}, {"model": MODEL}):
        with pytest.raises(ConfigurationError, match="the inputs and the model"):
            detector.score(none, logits, **given)
    with pytest.raises(ConfigurationError, match="same number of rows"):
        detector.score(none, logits, x=x[:3], model=MODEL)
    with pytest.raises(ConfigurationError, match="Expected logits"):
        detector.score(none, None, x=x, model=MODEL)
    with pytest.raises(ConfigurationError, match="logits of 3 classes"):
        detector.score(none, logits[:, :2], x=x, model=MODEL)
    training = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), MODEL[1]).train()
    with pytest.raises(IncompatibleModel, match="eval mode"):
        detector.score(none, logits, x=x, model=training)


@every_detector
def test_the_model_is_as_it_was(detector):
    x, before = images(), copy.deepcopy(MODEL.state_dict())
    x.requires_grad_()
    detector.score(torch.zeros(30, 0), MODEL(x), x=x, model=MODEL)
    assert all(torch.equal(value, before[name]) for name, value in MODEL.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in MODEL.parameters())


def test_feature_squeezing_equals_the_formula():
    x = images()
    p = lambda z: MODEL(z).softmax(dim=1).detach()  # noqa: E731
    gaps = [(p(x) - p(squeeze(x))).abs().sum(dim=1) for squeeze in (BitDepth(1), MedianFilter(2))]
    expected = torch.maximum(*gaps)
    torch.testing.assert_close(scored(FeatureSqueezing([BitDepth(1), MedianFilter(2)]), x), expected)


def test_feature_squeezing_finds_a_perturbation_below_the_levels_of_grey():
    """Black and white images, and steps of 0.3 towards another class: one bit takes them all away."""
    clean = images(200).round()
    weight = MODEL[1].weight.detach()
    target = (MODEL(clean).argmax(dim=1) + 1) % 3
    step = (weight[target] - weight[MODEL(clean).argmax(dim=1)]).sign().reshape(200, 1, 12, 12)
    attacked = (clean + 0.3 * step).clamp(0, 1)
    assert float((MODEL(attacked).argmax(dim=1) == target).float().mean()) > 0.95
    found = scored(FeatureSqueezing([BitDepth(1)]), attacked)
    assert roc_auc(found, scored(FeatureSqueezing([BitDepth(1)]), clean)).value > 0.95


def test_inputs_that_are_no_images_are_squeezed_by_bits_alone():
    model, x = linear(6).eval(), torch.rand(20, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scored(FeatureSqueezing(), x, model), scored(FeatureSqueezing([BitDepth(5)]), x, model))


def test_consistency_equals_the_mean_over_the_four_shifts():
    x = images()
    p = lambda z: MODEL(z).softmax(dim=1).detach()  # noqa: E731
    wide = nn.functional.pad(x, [1, 1, 1, 1], mode="replicate")
    moved = [wide[:, :, :12, 1:13], wide[:, :, 2:, 1:13], wide[:, :, 1:13, :12], wide[:, :, 1:13, 2:]]
    expected = torch.stack([(p(x) - p(m)).abs().sum(dim=1) for m in moved]).mean(dim=0)
    torch.testing.assert_close(scored(Consistency(1, 0.0), x), expected)


def test_consistency_is_higher_near_the_border_between_classes():
    model = linear(2, 2, 0.0).eval()
    with torch.no_grad():
        model.weight.copy_(30 * torch.eye(2))
    near, far = torch.tensor([[0.5, 0.5], [0.5, 0.51]]), torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    assert float(scored(Consistency(noise=0.05), near, model).min()) > 100 * float(
        scored(Consistency(noise=0.05), far, model).max()
    )


def test_the_noise_depends_on_the_seed_alone():
    x = images()
    assert torch.equal(scored(Consistency(seed=1), x), scored(Consistency(seed=1), x))
    assert not torch.equal(scored(Consistency(seed=1), x), scored(Consistency(seed=2), x))


def test_consistency_refuses_what_changes_nothing():
    with pytest.raises(ConfigurationError, match="shift or noise"):
        Consistency(shift=0, noise=0.0)
    model, x = linear(6).eval(), torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigurationError, match="noise > 0"):
        scored(Consistency(1, 0.0), x, model)
    with pytest.raises(ConfigurationError, match="wider than shift"):
        scored(Consistency(12, 0.0), images(3))


def projector(rows, rank):
    """The linear autoencoder of these rows: projection on their principal directions."""
    mean = rows.mean(dim=0)
    right = torch.linalg.svd(rows - mean).Vh[:rank]
    return lambda z: (z - mean) @ right.T @ right + mean


def test_reconstruction_is_the_squared_distance_to_what_the_autoencoder_knows():
    stream = torch.Generator().manual_seed(0)
    plane = torch.randn(100, 2, generator=stream) @ torch.randn(2, 6, generator=stream)
    detector = Reconstruction(projector(plane, 2), on="features").fit(plane)
    off = torch.linalg.svd(plane - plane.mean(dim=0)).Vh[-1]
    torch.testing.assert_close(detector.score(plane), torch.zeros(100), rtol=0, atol=1e-6)
    torch.testing.assert_close(detector.score(plane + 3 * off), torch.full((100,), 9 / 6), rtol=1e-4, atol=1e-4)
    assert detector.uses_features and not Reconstruction(nn.Identity()).uses_features


def test_reconstruction_of_inputs_needs_no_model_and_no_logits():
    x = images()
    score = Reconstruction(lambda z: 0 * z).score(torch.zeros(30, 0), x=x)
    torch.testing.assert_close(score, x.square().flatten(1).mean(dim=1))
    with pytest.raises(ConfigurationError, match="the inputs"):
        Reconstruction(nn.Identity()).score(torch.zeros(3, 0))
    with pytest.raises(ConfigurationError, match=r"returns the shape \(30, 1, 12, 12\)"):
        Reconstruction(nn.Flatten()).score(torch.zeros(30, 0), x=x)
    with pytest.raises(IncompatibleModel, match="autoencoder in eval mode"):
        Reconstruction(nn.Dropout(0.5).train()).score(torch.zeros(30, 0), x=x)


def test_an_ensemble_of_features_and_inputs(tmp_path):
    x = images(200)
    logits = MODEL(x).detach()
    fitted = Ensemble([Energy(), FeatureSqueezing()]).fit(torch.zeros(200, 0), logits, x=x, model=MODEL)
    assert fitted.uses_inputs and not fitted.uses_features
    score = scored(fitted, x)
    save_detector(fitted, tmp_path / "detector")
    assert torch.equal(scored(load_detector(tmp_path / "detector"), x), score)
    with pytest.raises(ConfigurationError, match="the inputs and the model"):
        fitted.score(torch.zeros(200, 0), logits)
