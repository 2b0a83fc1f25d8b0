"""What each output mode takes from a thief and from a membership attacker: clones by query budget, AUC of membership.

python -m benchmarks.validate_outputs --data mnist.npz [--seeds 5] [--shadows 8] [--quick]
A small CNN is trained on 2,000 images until it fits them (so that membership shows). Extraction: `Extraction` asks
about images that the victim was not trained on and fits a copy to the answers, for budgets of 250, 1,000 and 4,000
rows; the agreement of copy and victim, and the accuracy of the copy, on test images. Membership: `LossThreshold` (loss
and margin) on the answers to 2,000 members and 2,000 non-members. Two more attackers for the modes that hide numbers:
averages over 16 neighbours of each image (noise of the input below `NOISE`), where the noise of `KeyedNoise` is drawn
anew; and labels alone of 16 noisier neighbours (members keep their label more often). `LiRA` trains shadow networks as
the victim was trained, on halves of the 4,000 rows, and reads them through the same output mode (with a key of its own
for `KeyedNoise`); beside its AUC, the share of members found at 1 % of the others. The logits are the row to compare
with. A network answers equal batches once: the modes only show its logits in another form. Writes
benchmarks/results/validate_outputs_DATA.json after each mode, with mean, least and most over the seeds; a run with the
same settings goes on where the last one ended.
"""

import argparse
import dataclasses
import hashlib
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aidefend._core.stats import roc_auc, tpr_at_fpr
from aidefend.attacks import Extraction, LiRA, LossThreshold
from aidefend.validate import KeyedNoise, LabelOnly, ReverseSigmoid, Rounded, Tempered, TopK
from aidefend.validate.outputs import harden
from benchmarks.record import earlier, write_result
from benchmarks.sanitize_screen import trained

FIRST_SEED = 1500
MEMBERS, EPOCHS = 2000, 40
FPR = 0.01
NEIGHBOURS, NOISE, SHAKE = 16, 0.02, 0.3
MODES: dict[str, Any] = {
    "logits": None,
    "LabelOnly": LabelOnly(),
    "TopK(1)": TopK(1),
    "TopK(3)": TopK(3),
    "Rounded(1)": Rounded(1),
    "Rounded(3)": Rounded(3),
    "Tempered(4)": Tempered(4.0),
    "ReverseSigmoid": ReverseSigmoid(),
    "KeyedNoise(0.5)": KeyedNoise(bytes(range(32)), scale=0.5),
    "KeyedNoise(2)": KeyedNoise(bytes(range(32)), scale=2.0),
    "KeyedNoise(2, free)": KeyedNoise(bytes(range(32)), scale=2.0, argmax="free"),
}
Answer = Callable[[Tensor], Tensor]


class Remembered:
    """A network that computes the logits of equal batches once, whatever form a client sees them in."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.known: dict[bytes, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """(N, ...) inputs to (N, K) logits."""
        key = hashlib.blake2b(x.contiguous().numpy().tobytes(), digest_size=16).digest()
        if key not in self.known:
            with torch.no_grad():
                self.known[key] = torch.cat([self.model(part) for part in x.split(1000)])
        return self.known[key].clone()


def answers_of(model: Answer, output: Any) -> Answer:
    """What a client sees: logits, probabilities, or labels as one-hot rows."""

    def ask(x: Tensor) -> Tensor:
        logits = model(x)
        if output is None:
            return logits
        shown = harden(output, logits, x)
        return shown if shown.ndim == 2 else torch.nn.functional.one_hot(shown, logits.shape[1]).float()

    return ask


def student(seed: int) -> nn.Module:
    """Of another architecture than the victim."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


def clones(
    ask: Answer, model: Answer, own: Tensor, test: tuple[Tensor, Tensor], budgets: tuple[int, ...], seed: int
) -> list[dict[str, float]]:
    """Agreement and accuracy of the copy for each budget."""
    found = []
    for budget in budgets:
        result = Extraction(student, queries=budget, epochs=15)(ask, own, seed=seed)
        assert result.student is not None
        with torch.no_grad():
            accuracy = float((result.student(test[0]).argmax(dim=1) == test[1]).double().mean())
        found.append(
            {"budget": budget, "agreement": result.agreement(model, test[0]).value, "clone_accuracy": accuracy}
        )
    return found


def averaged(ask: Answer, seed: int) -> Answer:
    """The mean log-probability over neighbours: what a patient client makes of the answers."""

    def mean(x: Tensor) -> Tensor:
        stream, total = torch.Generator().manual_seed(seed), torch.zeros(len(x), 10)
        for _ in range(NEIGHBOURS):
            total += ask(x + NOISE * torch.randn(x.shape, generator=stream)).clamp(min=1e-6).log()
        return total / NEIGHBOURS

    return mean


def stability(ask: Answer, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Share of noisy neighbours that still get the right label: (N,)."""
    stream, right = torch.Generator().manual_seed(seed), torch.zeros(len(x))
    for _ in range(NEIGHBOURS):
        right += ask(x + SHAKE * torch.randn(x.shape, generator=stream)).argmax(dim=1) == y
    return right / NEIGHBOURS


class Shadows:
    """Networks trained as the victim was, each once, and read through any output mode."""

    def __init__(self, count: int, epochs: int) -> None:
        self.count, self.epochs = count, epochs
        self.models: dict[int, Answer] = {}

    def found(self, ask: Answer, output: Any, x: Tensor, y: Tensor, seed: int) -> dict[str, float]:
        """What `LiRA` finds among rows of which the first half are members."""
        if isinstance(output, KeyedNoise):  # the attacker does not have the key
            output = dataclasses.replace(output, key=bytes(range(100, 132)))

        def train(dataset: Any, number: int) -> Answer:
            if number not in self.models:
                self.models[number] = Remembered(trained(*dataset.tensors, number, epochs=self.epochs))
            return answers_of(self.models[number], output)

        score = LiRA(shadows=self.count)(ask, x, y, train_fn=train, seed=seed)
        inside, outside = score.chunk(2)
        return {"lira": roc_auc(inside, outside).value, "lira, found at 1 %": tpr_at_fpr(inside, outside, FPR).value}


def membership(
    ask: Answer, inside: tuple[Tensor, Tensor], outside: tuple[Tensor, Tensor], seed: int, logits: bool
) -> dict[str, float]:
    """AUC of each attacker without shadow models; 0.5 = nothing learned."""
    scores: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "loss": lambda x, y: LossThreshold()(ask, x, y),
        "margin": lambda x, y: LossThreshold("margin")(ask, x, y),
        "labels of neighbours": lambda x, y: stability(ask, x, y, seed),
    }
    if not logits:
        mean = averaged(ask, seed)
        scores["average of neighbours"] = lambda x, y: LossThreshold()(mean, x, y)
    return {name: roc_auc(score(*inside), score(*outside)).value for name, score in scores.items()}


def run(
    data: dict[str, Any], seed: int, budgets: tuple[int, ...], shadows: Shadows, done: set[str]
) -> Iterator[dict[str, Any]]:
    """All modes of one victim that are not done."""
    todo = {name: output for name, output in MODES.items() if name not in done}
    if not todo:
        return
    order = np.random.default_rng(seed).permutation(len(data["train_x"]))[: 2 * MEMBERS + max(budgets)]
    x = torch.from_numpy(data["train_x"][order]).float().div(255).unsqueeze(1)
    y = torch.from_numpy(data["train_y"][order]).long()
    test = torch.from_numpy(data["test_x"][:4000]).float().div(255).unsqueeze(1)
    labels = torch.from_numpy(data["test_y"][:4000]).long()
    model = Remembered(trained(x[:MEMBERS], y[:MEMBERS], seed, epochs=EPOCHS))
    inside, outside = (x[:MEMBERS], y[:MEMBERS]), (x[MEMBERS : 2 * MEMBERS], y[MEMBERS : 2 * MEMBERS])
    for name, output in todo.items():
        ask = answers_of(model, output)
        accuracy = float((ask(test).argmax(dim=1) == labels).double().mean())
        found = clones(ask, model, x[2 * MEMBERS :], (test, labels), budgets, seed)
        auc = membership(ask, inside, outside, seed, output is None)
        auc |= shadows.found(ask, output, x[: 2 * MEMBERS], y[: 2 * MEMBERS], seed)
        shown = " ".join(f"{one['budget']}: {one['agreement']:.3f}" for one in found)
        print(f"seed {seed} {name:20} right {accuracy:.3f}  agreement {shown}  {auc}", flush=True)
        yield {"mode": name, "seed": seed, "accuracy": accuracy, "clones": found, "membership": auc}


def over(values: Iterable[float]) -> list[float]:
    """Mean, least and most."""
    each = list(values)
    return [statistics.fmean(each), min(each), max(each)]


def summary(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each figure over the seeds."""
    found = []
    for name in dict.fromkeys(row["mode"] for row in table):
        mine = [row for row in table if row["mode"] == name]
        each = zip(*(row["clones"] for row in mine), strict=True)
        shown = ("agreement", "clone_accuracy")
        copies = [{"budget": same[0]["budget"]} | {k: over(one[k] for one in same) for k in shown} for same in each]
        auc = {key: over(row["membership"][key] for row in mine) for key in mine[0]["membership"]}
        accuracy = over(row["accuracy"] for row in mine)
        found.append({"mode": name, "seeds": len(mine), "accuracy": accuracy, "clones": copies, "membership": auc})
    return found


def form(figure: list[float]) -> str:
    """Mean (least to most)."""
    mean, least, most = figure
    return f"{mean:.3f} ({least:.3f} to {most:.3f})"


def main() -> None:
    """Print a line for each mode and seed, then mean (least to most) over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--shadows", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="one seed, two budgets")
    arguments = parser.parse_args()
    with np.load(arguments.data) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    budgets = (250, 1000) if arguments.quick else (250, 1000, 4000)
    seeds = [FIRST_SEED + i for i in range(1 if arguments.quick else arguments.seeds)]
    name = f"validate_outputs_{Path(arguments.data).stem}"
    settings = {"budgets": list(budgets), "shadows": arguments.shadows, "members": MEMBERS, "epochs": EPOCHS}
    table = earlier(name, settings).get("rows", [])
    for seed in seeds:
        done = {row["mode"] for row in table if row["seed"] == seed}
        for row in run(data, seed, budgets, Shadows(arguments.shadows, EPOCHS), done):
            table.append(row)
            known = sorted({row["seed"] for row in table})
            write_result(name, {**settings, "over_seeds": summary(table), "rows": table}, seeds=known)
    for row in summary(table):
        print(f"\n{row['mode']}, {row['seeds']} seeds: right {form(row['accuracy'])}")
        for one in row["clones"]:
            shown = f"agreement {form(one['agreement'])}, accuracy of the clone {form(one['clone_accuracy'])}"
            print(f"  {one['budget']} queries: {shown}")
        print("  membership: " + ", ".join(f"{key} {form(value)}" for key, value in row["membership"].items()))


if __name__ == "__main__":
    main()
