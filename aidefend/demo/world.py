"""What the chapters share: the data, a small network, a plain training loop, and the form of a chapter's result."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Subset, TensorDataset

from aidefend import datasets
from aidefend._core.checks import refuse
from aidefend._core.evidence import Evidence, Finding
from aidefend._core.progress import progress
from aidefend._core.random import derive_seed, make_generator
from aidefend._core.stats import Interval
from aidefend.audit import Figure, SummaryRow

TRAIN_ROWS, TEST_ROWS = 6_000, 1_000

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Schedule = Callable[[float], Loss]


@dataclasses.dataclass(frozen=True)
class Chapter:
    """What one chapter found."""

    title: str
    text: str
    rows: tuple[SummaryRow, ...]
    evidence: Evidence
    figures: tuple[Figure, ...] = ()


@dataclasses.dataclass
class World:
    """Data and seed, and the models and facts that later chapters take from earlier ones."""

    train: TensorDataset
    test: TensorDataset
    source: str
    seed: int
    models: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def seed_of(self, name: str) -> int:
        """The seed of one part of the work."""
        return derive_seed(self.seed, name) % 2**31

    def net(self, name: str) -> nn.Sequential:
        """A fresh small network for this data, its weights from the seed of `name`."""
        x, y = self.rows("train")
        return small_net(self.seed_of(name), tuple(x.shape[1:]), int(y.max()) + 1)

    def rows(self, part: str) -> tuple[Tensor, Tensor]:
        """(x, y) of "train" or "test"."""
        x, y = (self.train if part == "train" else self.test).tensors
        return x, y


class Tell(Protocol):
    """Says one line about what happens."""

    def __call__(self, text: str) -> None:
        """Print it."""


def open_world(data: str | None, seed: int) -> World:
    """The embedded digits, a named set in the usual places, or a path; at most 6,000 + 1,000 rows of it."""
    if data is None:
        images = datasets.mnist_subset()
    elif data in ("mnist", "fashion-mnist"):
        images = datasets.find(data)  # type: ignore[arg-type]  # one of the two names, just checked
    else:
        images = datasets.load(Path(data))
    if any(size % 2 or size < 8 for size in images.train_x.shape[2:]):
        rule = "images of even height and width, at least 8"
        raise refuse(rule, "data", tuple(images.train_x.shape[1:]), "Crop or pad the images")
    train = _some(images.train_x, images.train_y, TRAIN_ROWS, seed)
    return World(train, _some(images.test_x, images.test_y, TEST_ROWS, seed), images.source, seed)


def _some(x: Tensor, y: Tensor, rows: int, seed: int) -> TensorDataset:
    if len(x) <= rows:
        return TensorDataset(x, y)
    chosen = torch.randperm(len(x), generator=make_generator(seed=seed))[:rows].sort().values
    return TensorDataset(x[chosen], y[chosen])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Layers made inside get their first weights from the seed; the global stream is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def small_net(seed: int, shape: tuple[int, ...] = (1, 28, 28), classes: int = 10) -> nn.Sequential:
    """Two convolutions and two linear layers, after folding 2 x 2 pixels into channels: quick on a CPU.

    Args:
        seed: Of the first weights.
        shape: (C, H, W) of one image, H and W even.
        classes: Number of classes.
    """
    channels, height, width = shape
    with seeded(seed):
        body = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * channels, 16, 2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        features = 32 * (height // 4) * (width // 4)
        return nn.Sequential(*body, nn.Linear(features, 100), nn.ReLU(), nn.Linear(100, classes))


def plain_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The usual criterion, in the form of an objective."""
    return cross_entropy(model(x), y)


def train(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    epochs: int,
    seed: int,
    objective: Schedule = lambda done: plain_loss,
    rate: float = 4e-3,
    batch_size: int = 128,
    name: str = "training",
) -> nn.Module:
    """A plain training loop: Adam with a one-cycle schedule. Objectives take the place of the criterion in one line.

    Args:
        model: Trained in place.
        dataset: Map-style samples (x, y), small enough for memory.
        epochs: Passes over it.
        seed: Of the order.
        objective: From the share of the training that is done, in (0, 1], to the loss (model, x, y) of a step.
        rate: Highest learning rate.
        batch_size: Rows a step.
        name: Shown beside the progress bar.
    """
    x, y = stacked(dataset)
    stream = make_generator(seed=seed)
    steps = epochs * -(-len(x) // batch_size)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, cycle_momentum=False)
    model.train()
    for epoch in progress(range(epochs), name):
        batches = torch.randperm(len(x), generator=stream).split(batch_size)
        for step, rows in enumerate(batches, start=epoch * len(batches) + 1):
            optimizer.zero_grad()
            objective(step / steps)(model, x[rows], y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def stacked(dataset: Dataset[Any]) -> tuple[Tensor, Tensor]:
    """All rows of a small map-style data set as tensors."""
    if isinstance(dataset, TensorDataset):
        x, y = dataset.tensors
        return x, y
    if isinstance(dataset, Subset) and isinstance(dataset.dataset, TensorDataset):
        x, y = dataset.dataset.tensors
        return x[dataset.indices], y[dataset.indices]
    pairs = [dataset[i] for i in range(len(dataset))]  # type: ignore[arg-type]  # map-style, so it has a length
    return torch.stack([torch.as_tensor(x) for x, _ in pairs]), torch.tensor([int(y) for _, y in pairs])


def predictions(model: nn.Module, x: Tensor) -> Tensor:
    """Predicted classes (N,)."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(dim=1) for part in torch.split(x, 500)])


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of rows whose class is right."""
    return float((predictions(model, x) == y).double().mean())


def percent(value: float) -> str:
    """0.1234 as '12.3 %'."""
    return f"{100 * value:.1f} %"


def between(value: float, low: float, high: float) -> str:
    """A share with its interval."""
    return f"{percent(value)} ({100 * low:.1f} to {100 * high:.1f})"


def measured(identity: str, title: str, value: Interval | float, n: int | None = None, **more: Any) -> Finding:
    """A finding without severity: a share with its interval, or one number."""
    found = value if isinstance(value, Interval) else (value, None, None)
    return Finding(identity, title, value=found[0], low=found[1], high=found[2], n=n, **more)


def renamed(finding: Finding, arm: str, *, secure: bool = False) -> Finding:
    """The finding of one arm of a comparison; `secure` marks numbers that depend on secure randomness."""
    name = arm.lower().replace(" ", "_")
    fields = finding.to_dict() | {"id": f"{finding.id}.{name}", "title": f"{finding.title} ({arm})"}
    return Finding.from_dict(fields | {"deterministic": finding.deterministic and not secure})


def share_of(finding: Finding) -> str:
    """The finding's value in percent."""
    return "not shown" if not isinstance(finding.value, float) else percent(finding.value)
