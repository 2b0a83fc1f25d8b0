"""Feature collisions found by their neighbours: the share found, and of honest rows taken, in frozen features.

python -m benchmarks.sanitize_collisions [--victims 20] [--rows 3000] [--poison 25]
A small CNN is trained on clean digits; its penultimate layer stays frozen, as in transfer learning. For each victim (a
test image that the network gets right) 25 rows of the class that comes second are moved to its features within .3
(linf), labels right, and a linear head is trained on all rows: the attack works where the victim then gets the poison's
class. Scores on the same features: `NeighbourDisagreement` at three k, above 0, and cut so that 2 % of honest rows lie
above; and the vote of the k nearest rows as published (Peri et al. 2020), a row being taken where the vote is another
class. Means are over the victims that the attack turned. Target: at least 95 % found, at most 2 % of honest rows.
Writes benchmarks/results/sanitize_collisions.json.
"""

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from aidefend import Threat
from aidefend._core.batches import content_ids, gather_labelled
from aidefend._core.neighbours import k_nearest
from aidefend.attacks.poisoning import FeatureCollision
from aidefend.datasets import mnist_subset
from aidefend.sanitize import NeighbourDisagreement
from benchmarks.record import write_result
from benchmarks.sanitize_screen import trained

EPOCHS = 8
NEIGHBOURS = (10, 30, 60)
FOUND, TAKEN = 0.95, 0.02


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--victims", type=int, default=20)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--poison", type=int, default=25)
    arguments = parser.parse_args()
    digits = mnist_subset()
    x, y = digits.train_x[: arguments.rows], digits.train_y[: arguments.rows]
    model = trained(x, y, 0, EPOCHS)
    body = nn.Sequential(*list(model)[:-1])
    rows = []
    for victim, target in victims(model, digits.test_x, digits.test_y, arguments.victims):
        attack = FeatureCollision(body, victim, target, arguments.poison / len(x), Threat("linf", 0.3), steps=50)
        poisoned = attack.poison((x, y), seed=0)
        rows.append({"target": target} | judged(body, poisoned, victim, target))
        print(rows[-1], flush=True)
    means = summary([row for row in rows if row["works"]])
    print(means)
    write_result("sanitize_collisions", {"settings": vars(arguments), "rows": rows, "means": means}, seeds=[0])


def victims(model: nn.Module, x: Tensor, y: Tensor, count: int) -> list[tuple[Tensor, int]]:
    """Test images that the model gets right, one in ten, each with the class that comes second."""
    with torch.no_grad():
        top = model(x).topk(2)
    right = (top.indices[:, 0] == y).nonzero().flatten()[::10][:count].tolist()
    return [(x[row : row + 1], int(top.indices[row, 1])) for row in right]


def judged(body: nn.Module, poisoned: Any, victim: Tensor, target: int) -> dict[str, Any]:
    """Whether the attack works, and what each score finds and takes."""
    x, y = gather_labelled(poisoned.dataset)
    poison = poisoned.is_poison
    with torch.no_grad():
        features, of_victim = body(x).flatten(1), body(victim).flatten(1)
    found: dict[str, Any] = {"works": int(head_on(features, y)(of_victim).argmax()) == target}
    block = {"ids": content_ids(x, y), "features": features, "labels": y}
    for k in NEIGHBOURS:
        scores = NeighbourDisagreement(k=k).partial_fit(block).score(block)
        found[f"k={k}, above 0"] = shares(scores > 0, poison)
        honest = scores[~poison].sort(descending=True).values
        found[f"k={k}, top 2 %"] = shares(scores > honest[int(TAKEN * len(honest))], poison)
        near = y[k_nearest(features, features, k, exclude_self=True)[1]]
        found[f"k={k}, vote"] = shares(one_hot(near, 10).sum(dim=1).argmax(dim=1) != y, poison)
    return found


def shares(taken: Tensor, poison: Tensor) -> dict[str, float]:
    """Of the poison, and of honest rows."""
    return {"found": float(taken[poison].double().mean()), "taken": float(taken[~poison].double().mean())}


def head_on(features: Tensor, y: Tensor) -> nn.Module:
    """A linear head, full batches from zero."""
    head = nn.Linear(features.shape[1], 10)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(head(features), y).backward()
        optimizer.step()
    return head


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the victims that were turned, and whether the target is met."""
    names = [name for name in rows[0] if isinstance(rows[0][name], dict)] if rows else []
    means: dict[str, Any] = {"victims turned": len(rows)}
    for name in names:
        mean = {side: sum(row[name][side] for row in rows) / len(rows) for side in ("found", "taken")}
        means[name] = mean | {"target met": mean["found"] >= FOUND and mean["taken"] <= TAKEN}
    return means


if __name__ == "__main__":
    main()
