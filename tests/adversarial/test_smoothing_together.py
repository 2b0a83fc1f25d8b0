"""Noise training, the certificate and an attack on the smoothed whole, on digits: certified <= attacked <= clean."""

import torch
from torch import nn

from aidefend import Threat, datasets
from aidefend.adversarial import Gaussian, SmoothedModel
from aidefend.attacks import EOT, PGD


def test_certified_is_at_most_attacked_is_at_most_clean():
    digits = datasets.mnist_subset()
    x, y = digits.train_x[:600], digits.train_y[:600]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    objective, stream = Gaussian(0.25), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(15):
        for rows in torch.randperm(600, generator=stream).split(100):
            optimizer.zero_grad()
            objective(model, x[rows], y[rows], generator=stream).backward()
            optimizer.step()
    smoothed = SmoothedModel(model.eval(), sigma=0.25, num_classes=10)
    test_x, test_y = digits.test_x[:60], digits.test_y[:60]
    certificate = smoothed.certify(test_x, n=1000, generator=stream)
    right = certificate.prediction == test_y
    held = right & (certificate.radius > 0.25)
    whole = smoothed.attackable(samples=32, seed=0)
    x_adv = PGD(Threat("l2", 0.25), 20)(EOT(whole, 2), test_x, test_y, generator=stream)
    attacked = smoothed.predict(x_adv, generator=stream)
    wrong = (attacked != test_y) & (attacked != -1)
    assert not (held & wrong).any()
    assert float(held.double().mean()) > 0.3
    stands = float((attacked == test_y).double().mean())
    assert float(held.double().mean()) <= stands <= float(right.double().mean()) + 0.05
