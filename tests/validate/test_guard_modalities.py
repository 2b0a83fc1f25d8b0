"""Every detector behind one guard on images, tables, text embeddings, sequences and token ids."""

import functools

import pytest
import torch
from scipy import stats
from torch import nn

from aidefend import ConfigurationError
from aidefend.validate import (
    GEN,
    BitDepth,
    Consistency,
    Energy,
    Ensemble,
    Entropy,
    FeatureSqueezing,
    Guard,
    InputSpec,
    LocalDimension,
    Mahalanobis,
    MaxLogit,
    MaxSoftmax,
    NearestNeighbours,
    Reconstruction,
    RelativeMahalanobis,
    Shifts,
    ViM,
)

ALPHA, CLASSES = 0.1, 3


class Recurrent(nn.Module):
    """A classifier of sequences (N, L, C) by the last state of a GRU."""

    def __init__(self, features):
        super().__init__()
        self.body, self.head = nn.GRU(features, 16, batch_first=True), nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


class OfTokens(nn.Module):
    """A classifier of token ids (N, L) by the mean of their embeddings."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(self.embedding(x).mean(dim=1))


def images(y, stream):
    """(N, 1, 12, 12): a bright bar whose place is the class."""
    x = 0.2 * torch.rand(len(y), 1, 12, 12, generator=stream)
    for label in range(CLASSES):
        x[y == label, :, 4 * label : 4 * label + 4] += 0.6
    return x


def table(y, stream):
    """(N, 8): columns in units of their own."""
    centres = torch.zeros(CLASSES, 8)
    centres[:, :3] = 3 * torch.eye(3)
    return (centres[y] + torch.randn(len(y), 8, generator=stream)) * torch.logspace(-2, 2, 8)


def embeddings(y, stream):
    """(N, 64) of length 1, as sentence encoders give them."""
    x = 2.0 * torch.eye(CLASSES, 64)[y] + 0.15 * torch.randn(len(y), 64, generator=stream)
    return nn.functional.normalize(x, dim=1)


def sequences(y, stream):
    """(N, 20, 2): waves whose frequency is the class, with any phase."""
    time = torch.linspace(0, 6, 20)[None]
    phase = 6.3 * torch.rand(len(y), 1, generator=stream)
    waves = torch.stack([torch.sin((y[:, None] + 1) * time + phase), torch.cos((y[:, None] + 1) * time + phase)], dim=2)
    return waves + 0.1 * torch.randn(len(y), 20, 2, generator=stream)


def tokens(y, stream):
    """(N, 10) int64: words of the class, words of all classes."""
    own = 10 * y[:, None] + torch.randint(0, 10, (len(y), 10), generator=stream)
    common = torch.randint(30, 40, (len(y), 10), generator=stream)
    return torch.where(torch.rand(len(y), 10, generator=stream) < 0.7, own, common)


MAKERS = {
    "images": (
        images,
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 16), nn.ReLU(), nn.Linear(16, 3)
        ),
    ),
    "table": (table, lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))),
    "embeddings": (embeddings, lambda: nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))),
    "sequences": (sequences, lambda: Recurrent(2)),
    "tokens": (tokens, OfTokens),
}
STRANGE = {
    "images": lambda x, stream: torch.rand(x.shape, generator=stream),
    "table": lambda x, stream: x[:, torch.randperm(8, generator=stream)],
    "embeddings": lambda x, stream: nn.functional.normalize(torch.randn(x.shape, generator=stream), dim=1),
    "sequences": lambda x, stream: 2 * torch.rand(x.shape, generator=stream) - 1,
    "tokens": lambda x, stream: torch.randint(40, 50, x.shape, generator=stream),
}
OF_OUTPUTS = [
    *(Energy(), MaxLogit(), MaxSoftmax(), Entropy(), GEN()),
    *(Mahalanobis(), RelativeMahalanobis(), NearestNeighbours(k=10), ViM(), LocalDimension()),
]


def drawn(kind, n, seed):
    stream = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (n,), generator=stream)
    return MAKERS[kind][0](y, stream), y


@functools.cache
def trained(kind):
    """A model that knows its classes; what it learns is no part of the test."""
    x, y = drawn(kind, 600, 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MAKERS[kind][1]()
        optimizer = torch.optim.Adam(network.parameters(), 0.02)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
    network.eval().requires_grad_(False)
    fresh, truth = drawn(kind, 300, 1)
    assert (network(fresh).argmax(dim=1) == truth).double().mean() > 0.9
    return network


def detectors_of(kind):
    """All that read outputs; those of inputs where inputs are numbers."""
    if kind == "tokens":
        return [*OF_OUTPUTS, Ensemble()]
    shape = (1, *drawn(kind, 1, 0)[0].shape[1:])
    average = nn.LayerNorm(shape[1:], elementwise_affine=False).eval()
    inputs = [FeatureSqueezing([BitDepth(3, (-400.0, 400.0))]), Consistency(noise=0.1), Reconstruction(average)]
    return [*OF_OUTPUTS, *inputs, Ensemble(), Ensemble(shifts=Shifts())]


@pytest.mark.parametrize("kind", MAKERS)
def test_every_detector_serves_every_kind_of_input(kind, tmp_path):
    """Each alone refuses clean rows as rarely as promised, survives a file, and together they find strange rows."""
    network, (clean, _), (test, _) = trained(kind), drawn(kind, 800, 2), drawn(kind, 400, 3)
    stream = torch.Generator().manual_seed(4)
    strange = STRANGE[kind](drawn(kind, 100, 5)[0], stream)
    spec = InputSpec((10,), torch.int64, 0, 49) if kind == "tokens" else InputSpec.infer(clean, margin=10.0)
    for detector in detectors_of(kind):
        guard = Guard.calibrate(network, clean, spec, [detector], ALPHA)
        rank, n = round(guard.calibration.level * (guard.calibration.n + 1)), guard.calibration.n
        refused = int((~guard(test).accepted).sum())
        assert refused <= stats.betabinom.ppf(0.99999, 400, rank, n + 1 - rank), detector
        assert guard.attackable()(test[:5]).shape == (5, CLASSES + 1)
        guard.save(tmp_path / "guard")
        again = {"autoencoder": detector.autoencoder} if isinstance(detector, Reconstruction) else {}
        with Guard.load(tmp_path / "guard", network, **again) as loaded:
            both = [one(strange).p_values[one.detectors[0].name] for one in (guard, loaded)]
        assert torch.equal(*both) and both[0].isfinite().all(), detector
        guard.close()
    with Guard.calibrate(network, clean, spec, [Ensemble()], ALPHA) as guard:
        assert guard.detection(strange).value > 0.5


class Pooled(nn.Module):
    """Sequences of any length."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x.mean(dim=1))


def test_sequences_of_several_lengths_and_the_detectors_that_cannot_have_them():
    stream = torch.Generator().manual_seed(0)
    batches = [torch.randn(30, length, 4, generator=stream) for length in (3, 5, 7) * 8]
    spec = InputSpec.infer(iter(batches))
    assert spec.shape == ((3, 7), 4)
    with Guard.calibrate(Pooled().eval(), iter(batches), spec, [Energy(), NearestNeighbours(k=5)], 0.05) as guard:
        assert all(guard(batch).accepted.double().mean() > 0.8 for batch in batches[:3])
        assert guard(torch.zeros(2, 9, 4)).reasons[0] == ("input: wrong shape",)
    with pytest.raises(ConfigurationError, match=r"inputs of one size.*detectors of features and logits"):
        Guard.calibrate(Pooled().eval(), iter(batches), spec, [Energy(), Consistency()], 0.05)
