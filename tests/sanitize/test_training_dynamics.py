"""Training dynamics: what is kept of each epoch, in any order and sharding, and what it says."""

import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from aidefend import AidefendError
from aidefend.sanitize import TrainingDynamics


def block_of(losses, labels=None, logits=None, ids=None, epoch=None):
    n = len(losses)
    labels = torch.zeros(n, dtype=torch.int64) if labels is None else labels
    block = {"ids": ids or tuple(map(str, range(n))), "features": torch.zeros(n, 1), "labels": labels}
    block["losses"] = torch.as_tensor(losses)
    if logits is not None:
        block["logits"] = logits
    return block if epoch is None else {**block, "epoch": epoch}


def sure_of(classes):
    return torch.nn.functional.one_hot(torch.tensor(classes), 2).float()


def test_forgetting_and_learning_are_counted():
    dynamics = TrainingDynamics()
    for answers in ([1, 0, 1], [0, 1, 1], [1, 0, 1], [0, 0, 1]):
        dynamics.partial_fit(block_of([1.0, 1.0, 1.0], logits=sure_of(answers)))
    first, second, third = (dynamics.trajectory(row) for row in "012")
    assert (first.forgotten, first.learned) == (1, 1)
    assert (second.forgotten, second.learned) == (1, 0)
    assert (third.forgotten, third.learned) == (0, -1)
    assert first.losses.tolist() == [1.0] * 4


def test_shortcuts_are_early_and_wrong_labels_late():
    """A real training: a feature that gives the label away, and labels that nothing supports."""
    stream = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    x = torch.randn(400, 20, generator=stream)
    x[:, 0] += 1.2 * (2 * labels - 1)
    shortcut, wrong = torch.arange(400) < 30, torch.arange(400) >= 370
    x[shortcut, 1] = 8.0 * (2 * labels[shortcut] - 1).float()
    labels = torch.where(wrong, 1 - labels, labels)
    model = nn.Linear(20, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kinds = {seeks: TrainingDynamics(seeks) for seeks in ("shortcuts", "wrong labels", "both")}
    for epoch in range(8):
        optimizer.zero_grad()
        losses = cross_entropy(model(x), labels, reduction="none")
        losses.mean().backward()
        optimizer.step()
        with torch.no_grad():
            logits = model(x)
        block = block_of(cross_entropy(logits, labels, reduction="none"), labels, logits, epoch=epoch)
        for dynamics in kinds.values():
            dynamics.partial_fit(block)
    scores = {seeks: dynamics.score(block) for seeks, dynamics in kinds.items()}
    rest = ~shortcut & ~wrong
    assert scores["shortcuts"][shortcut].median() > scores["shortcuts"][rest].quantile(0.9)
    assert scores["wrong labels"][wrong].median() > scores["wrong labels"][rest].quantile(0.9)
    assert torch.equal(scores["both"], torch.maximum(scores["shortcuts"], scores["wrong labels"]))


def test_any_sharding_of_rows_and_epochs_gives_the_same_scores():
    losses = torch.rand(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(12) % 2
    whole = TrainingDynamics()
    for epoch in range(4):
        whole.partial_fit(block_of(losses[epoch], labels, epoch=epoch))
    everything = block_of(losses[0], labels)
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 5):
        by_epoch, by_row = TrainingDynamics(), TrainingDynamics()
        for epoch in order:
            by_epoch = by_epoch.merge(TrainingDynamics().partial_fit(block_of(losses[epoch], labels, epoch=epoch)))
        for rows in (range(5), range(5, 12)):
            shard, ids = TrainingDynamics(), tuple(map(str, rows))
            for epoch in range(4):
                shard.partial_fit(block_of(losses[epoch][list(rows)], labels[list(rows)], ids=ids))
            by_row = by_row.merge(shard)
        for other in (by_epoch, by_row, pickle.loads(pickle.dumps(by_row))):
            assert torch.equal(other.score(everything), whole.score(everything))


def test_losses_that_are_not_finite_are_left_and_strangers_have_no_score():
    dynamics = TrainingDynamics().partial_fit(block_of([1.0, float("nan"), 2.0, 3.0]))
    dynamics.partial_fit(block_of([1.0, 5.0, float("inf"), 3.0]))
    assert torch.isfinite(dynamics.score(block_of([0.0] * 4))).all()
    lost = TrainingDynamics().partial_fit(block_of([1.0, float("nan"), 2.0]))
    assert lost.score(block_of([0.0] * 3)).isnan().tolist() == [False, True, False]
    assert bool(lost.score(block_of([0.0], ids=("stranger",))).isnan().all())
    assert bool(lost.score(block_of([0.0], labels=torch.tensor([1]))).isnan().all())


def test_equal_losses_score_nothing():
    dynamics = TrainingDynamics().partial_fit(block_of([1.0] * 5))
    assert dynamics.score(block_of([1.0] * 5)).tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda d: d.partial_fit({name: v for name, v in block_of([1.0]).items() if name != "losses"}), "losses"),
        (lambda d: d.partial_fit(block_of([1.0], epoch=-1)), "epoch"),
        (lambda d: d.partial_fit(block_of([1.0], epoch=0)), "once an epoch"),
        (lambda d: d.partial_fit(block_of([1.0], labels=torch.tensor([1]))), "label 0"),
        (lambda d: d.merge(TrainingDynamics().partial_fit(block_of([1.0]))), "once an epoch"),
        (lambda d: d.merge(TrainingDynamics("shortcuts")), "Merge detectors"),
        (lambda d: d.trajectory("nobody"), "row_id"),
        (lambda d: TrainingDynamics("sunshine"), "seeks"),
    ],
)
def test_what_cannot_be_is_refused(act, message):
    dynamics = TrainingDynamics().partial_fit(block_of([1.0]))
    with pytest.raises(AidefendError, match=message):
        act(dynamics)
