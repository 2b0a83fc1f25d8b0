"""Chapter 3: what a model tells about its training data, with and without differential privacy."""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from aidefend._core.evidence import Evidence
from aidefend.attacks import LossThreshold
from aidefend.audit import SummaryRow, audit_membership
from aidefend.demo import figures
from aidefend.demo.world import Chapter, Tell, World, accuracy, measured, percent, renamed, seeded, train
from aidefend.privacy import PrivacyConfig, PrivacyStatement, make_private

EPSILON, DELTA = 3.0, 1e-5
OVERFIT_ROWS = 400


def membership(world: World, tell: Tell) -> Chapter:
    """Overfit a network on a few digits, train another with DP-SGD on all; run the same attack on both."""
    x, y = world.rows("train")
    few = TensorDataset(x[:OVERFIT_ROWS], y[:OVERFIT_ROWS])
    overfitted = train(
        _wide_net(world.seed_of("overfit"), x[0].numel(), int(y.max()) + 1),
        few,
        epochs=60,
        seed=world.seed_of("overfit"),
        rate=2e-3,
        batch_size=32,
        name="overfitting",
    )
    model, statement, epsilon = _private(world)
    world.models["overfitted"], world.models["private"] = overfitted, model
    test = world.rows("test")
    found = {
        "overfitted": audit_membership(overfitted, few, world.test, seed=world.seed),
        "private": audit_membership(model, world.train, world.test, samples=None, seed=world.seed),
    }
    evidence = Evidence()
    for name, result in found.items():
        evidence += Evidence(renamed(finding, name, secure=name == "private") for finding in result.findings)
        auc = result["membership.auc"]
        tell(f"{name}: membership AUC {auc.value:.3f} ({auc.low:.3f} to {auc.high:.3f}), n = {auc.n}")
    right = accuracy(model, *test)
    tell(f"private model: accuracy {percent(right)} at epsilon {epsilon:.2f}, delta {DELTA:g}")
    evidence += statement.to_evidence()
    title = "Accuracy of the private model"
    evidence += Evidence([measured("privacy.accuracy", title, right, len(test[0]), deterministic=False)])
    world.facts["epsilon"] = epsilon
    row = SummaryRow(
        "membership inference",
        "loss threshold",
        f"AUC {_auc(found['overfitted'])}, accuracy {percent(accuracy(overfitted, *test))}",
        f"AUC {_auc(found['private'])}, accuracy {percent(right)}, epsilon {epsilon:.2f}",
        "epsilon bounds every attack; the attack shown is one",
    )
    picture = figures.lines(
        {
            "overfitted": _roc(overfitted, few.tensors, test),
            f"private (epsilon {epsilon:.1f})": _roc(model, (x, y), test),
        },
        ("false-positive rate", "true-positive rate"),
        "ROC curve of the membership attack; the diagonal is guessing.",
        diagonal=True,
    )
    return Chapter("Membership inference", f"{_TEXT}\n\n{statement.to_markdown()}", (row,), evidence, (picture,))


_TEXT = (
    "An adversary who holds a person's record asks the model about it: a low loss betrays that it was trained on. "
    "make_private keeps the loop and bounds, by epsilon, what any such attack can learn."
)


def _private(world: World) -> tuple[nn.Module, PrivacyStatement, float]:
    config = PrivacyConfig(
        expected_batch_size=1_000,
        public_size=len(world.train),
        steps=100,
        max_grad_norm=1.0,
        delta=DELTA,
        target_epsilon=EPSILON,
    )
    x, y = world.rows("train")
    with seeded(world.seed_of("private net")):
        net = private_net(tuple(x.shape[1:]), int(y.max()) + 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=2.0, momentum=0.9)
    private = make_private(net, optimizer, world.train, _per_example, config)
    for x, y in private.loader:
        private.optimizer.zero_grad()
        private.loss(private.model(x), y).backward()
        private.optimizer.step()
    return net.eval(), private.statement(), private.epsilon()


class Edges(nn.Module):
    """Fixed features that no data shaped: strengths of eight edge directions, averaged over 4 x 4 pixels, one length.

    Learning only the layer above them needs few parameters, so that little noise suffices.
    """

    def __init__(self, length: float = 5.0) -> None:
        super().__init__()
        self.length = length
        place = torch.arange(-2.0, 3.0)
        down, right = torch.meshgrid(place, place, indexing="ij")
        bell = torch.exp(-(down**2 + right**2) / 2.88)
        angles = torch.arange(8) * math.pi / 4
        filters = torch.stack([(right * math.cos(a) + down * math.sin(a)) * bell for a in angles.tolist()])
        self.register_buffer("filters", filters[:, None] / filters.abs().sum(dim=(1, 2))[:, None, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, 8 * H // 4 * W // 4)."""
        grey = x.mean(dim=1, keepdim=True)
        strength = functional.conv2d(grey, cast("Tensor", self.filters), padding=2).relu()
        features: Tensor = functional.avg_pool2d(strength, 4).flatten(1)
        scaled: Tensor = self.length * features / (features.norm(dim=1, keepdim=True) + 1e-3)
        return scaled


def private_net(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Fixed edge features and one linear layer; every example is treated alone."""
    edges = Edges()
    return nn.Sequential(edges, nn.Linear(edges(torch.zeros(1, *shape)).shape[1], classes))


def _per_example(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, reduction="none")


def _wide_net(seed: int, features: int, classes: int) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(nn.Flatten(), nn.Linear(features, 512), nn.ReLU(), nn.Linear(512, classes))


def _auc(result: Evidence) -> str:
    auc = result["membership.auc"]
    return f"{auc.value:.3f} ({auc.low:.3f} to {auc.high:.3f})"


def _roc(model: nn.Module, members: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> tuple[list[float], list[float]]:
    attack = LossThreshold()
    return figures.roc(attack(model, *members), attack(model, *others))
