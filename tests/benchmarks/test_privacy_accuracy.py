"""The account of the benchmark of private linear models: all that it releases is bounded and paid for."""

import pytest
import torch

from aidefend.privacy import epsilon
from benchmarks import privacy_accuracy as benchmark


@pytest.mark.parametrize(("target", "steps"), [(2.36, 160), (1.2, 40)])
def test_the_mean_and_all_steps_stay_within_the_target(target, steps):
    noise = benchmark.noise_for(target, steps)
    spent = epsilon([(benchmark.MEAN_NOISE, 1.0, 1), (noise, 1.0, steps)], benchmark.DELTA)
    assert 0.999 * target < spent <= target
    assert epsilon([(noise, 1.0, steps)], benchmark.DELTA) < spent  # the mean is not free


def test_one_row_moves_the_private_mean_by_one(monkeypatch):
    frozen = torch.randn(5, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(benchmark, "secure_normal", lambda shape: frozen)
    rows = torch.nn.functional.normalize(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)))
    means = []
    monkeypatch.setattr(torch.nn.functional, "normalize", lambda x: x)
    for kept in (rows, rows[1:]):
        means.append(-benchmark.centred(kept, torch.zeros(1, 5), 30)[1][0])
    assert float((means[0] - means[1]).norm()) * 30 == pytest.approx(1, rel=1e-4)
    assert torch.allclose(means[1] * 30 - rows[1:].sum(0), benchmark.MEAN_NOISE * frozen, rtol=1e-3)


def test_drawn_images_are_images_and_fixed():
    for draw in (benchmark.strokes, benchmark.shapes):
        images = draw(20, seed=0)
        assert images.shape == (20, 1, 28, 28) and float(images.min()) >= 0 and float(images.max()) <= 1
        assert float(images.std()) > 0.1 and torch.equal(images, draw(20, seed=0))
        assert not torch.equal(images, draw(20, seed=1))
