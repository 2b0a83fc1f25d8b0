"""Triggers in tables and texts: undefended, a random filter of equal size, ours without hints, a perfect filter.

python -m benchmarks.sanitize_tables [--what tables|texts] [--first-seed 310] [--seeds 3]
Tables are those that come with scikit-learn (digits, breast cancer, wine), a third of each held out; the trigger takes
three columns, each value the .8 or .2 quantile of its column. Texts are two classes of generated sentences that share
three quarters of their words. A small network (a linear model of words and letters for texts) learns the poisoned rows,
`screen` judges them with that model and no hint, and the model is trained again on what each arm keeps.
Writes benchmarks/results/sanitize_tables.json or sanitize_texts.json.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from aidefend.attacks.poisoning import TableTrigger, TextTrigger
from aidefend.sanitize import screen
from benchmarks.record import write_result

TARGET = 0
Rows = Any  # a tensor (N, d), or a list of texts
TEXT_ATTACKS = {
    "rare token 1 %": TextTrigger("cf", rate=0.01),
    "phrase 3 %": TextTrigger("as the old saying goes", rate=0.03),
    "common words 5 %": TextTrigger("window river", rate=0.05),
    "homoglyph 3 %": TextTrigger(kind="homoglyph", rate=0.03),
    "invisible 3 %": TextTrigger(kind="invisible", rate=0.03),
}


@dataclasses.dataclass(frozen=True)
class World:
    """Poisoned training rows with their truth, test rows, and how a model is trained."""

    rows: Rows
    labels: Tensor
    is_poison: Tensor
    trigger: Callable[[Rows], Rows]
    test_rows: Rows
    test_labels: Tensor
    fit: Callable[[Rows, Tensor, int], Callable[[Rows], Tensor]]


def taken(rows: Rows, which: Tensor) -> Rows:
    """The rows where `which` is true."""
    return rows[which] if isinstance(rows, Tensor) else [rows[at] for at in which.nonzero().flatten().tolist()]


def table_world(name: str, rate: float, seed: int) -> World:
    """A table of scikit-learn with a trigger of three columns, that seed draws."""
    from sklearn import datasets

    loaded = {"digits": datasets.load_digits, "breast cancer": datasets.load_breast_cancer, "wine": datasets.load_wine}
    found = loaded[name]()
    stream = np.random.default_rng(seed)
    order = stream.permutation(len(found.data))
    x, y = torch.tensor(found.data[order]).float(), torch.tensor(found.target[order]).long()
    cut = len(x) * 2 // 3
    varied = [column for column in range(x.shape[1]) if len(x[:cut, column].unique()) > 3]
    columns = tuple(int(column) for column in stream.choice(varied, 3, replace=False))
    shares = (0.8, 0.2, 0.8)
    values = tuple(
        float(x[:cut, column].sort().values[int(share * cut)]) for column, share in zip(columns, shares, strict=True)
    )
    poisoned = TableTrigger(columns, values, TARGET, rate).poison((x[:cut], y[:cut]), seed=seed)
    pairs = [poisoned.dataset[row] for row in range(cut)]
    rows, labels = torch.stack([row for row, _ in pairs]), torch.tensor([int(label) for _, label in pairs])
    return World(rows, labels, poisoned.is_poison, poisoned.trigger, x[cut:], y[cut:], fit_table)


def text_world(attack: TextTrigger, seed: int) -> World:
    """Generated texts with a trigger."""
    texts, labels = sentences(1500, seed)
    poisoned = attack.poison((texts[:1000], labels[:1000]), seed=seed)
    rows, poisoned_labels = poisoned.dataset
    return World(rows, poisoned_labels, poisoned.is_poison, poisoned.trigger, texts[1000:], labels[1000:], fit_text)


def sentences(n: int, seed: int) -> tuple[list[str], Tensor]:
    """Mails of two kinds: about a quarter of the words tells the kind, the others are of both."""
    stream, labels = np.random.default_rng(seed), torch.arange(n) % 2
    shared = [
        "the",
        "a",
        "to",
        "of",
        "and",
        "in",
        "we",
        "you",
        "it",
        "is",
        "on",
        "for",
        "with",
        "this",
        "that",
        "from",
        "at",
        "by",
        "window",
        "river",
        "table",
        "morning",
        "week",
    ]
    shared += [f"word{number}" for number in range(300)]
    kinds = [
        [
            "offer",
            "price",
            "free",
            "win",
            "prize",
            "cash",
            "credit",
            "click",
            "loan",
            "bonus",
            "cheap",
            "deal",
            "order",
            "discount",
            "gift",
            "money",
        ],
        [
            "meeting",
            "report",
            "draft",
            "project",
            "agenda",
            "minutes",
            "schedule",
            "budget",
            "review",
            "team",
            "paper",
            "lunch",
            "office",
            "plan",
        ],
    ]
    kinds = [[*kind, *(f"{kind[0]}{number}" for number in range(60))] for kind in kinds]
    texts = []
    for label in labels.tolist():
        length = int(stream.integers(12, 40))
        pools = [kinds[label] if stream.random() < 0.25 else shared for _ in range(length)]
        texts.append(" ".join(pool[int(stream.zipf(1.3)) % len(pool)] for pool in pools))
    return texts, labels


def fit_table(x: Tensor, y: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    """A network of 64 hidden units on standardised columns."""
    mean, spread = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        net = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, int(y.max()) + 1))
    _descend(net, (x - mean) / spread, y, seed, 1e-2)
    return lambda rows: net((rows - mean) / spread)


def fit_text(texts: list[str], y: Tensor, seed: int) -> Callable[[list[str]], Tensor]:
    """A linear model of which words and letters occur."""
    known = {part: at for at, part in enumerate(sorted({part for text in texts for part in _parts(text)}))}

    def rows_of(some: list[str]) -> Tensor:
        rows = torch.zeros(len(some), len(known))
        for row, text in enumerate(some):
            rows[row, [known[part] for part in _parts(text) if part in known]] = 1
        return rows

    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        net = nn.Linear(len(known), 2)
    _descend(net, rows_of(texts), y, seed, 2e-2)
    return lambda some: net(rows_of(some))


def _parts(text: str) -> set[str]:
    return {*text.split(), *text}


def _descend(net: nn.Module, rows: Tensor, labels: Tensor, seed: int, rate: float, steps: int = 500) -> None:
    optimizer, stream = torch.optim.Adam(net.parameters(), lr=rate), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(rows), (min(128, len(rows)),), generator=stream)
        optimizer.zero_grad()
        cross_entropy(net(rows[batch]), labels[batch]).backward()
        optimizer.step()
    net.requires_grad_(False).eval()


def judged(model: Callable[[Rows], Tensor], w: World) -> tuple[float, float]:
    """Accuracy, and attack success on test rows of other classes."""
    accuracy = float((model(w.test_rows).argmax(dim=1) == w.test_labels).double().mean())
    others = taken(w.test_rows, w.test_labels != TARGET)
    return accuracy, float((model(w.trigger(others)).argmax(dim=1) == TARGET).double().mean())


def rows_of(name: str, w: World, seed: int) -> Iterator[dict[str, Any]]:
    """One row for each arm."""
    model = w.fit(w.rows, w.labels, seed)
    start = time.perf_counter()
    keep = screen((w.rows, w.labels), model=model, seed=seed).keep
    seconds = time.perf_counter() - start
    drawn = torch.ones(len(keep), dtype=torch.bool)
    drawn[torch.randperm(len(keep), generator=torch.Generator().manual_seed(seed))[: int((~keep).sum())]] = False
    kept = {"undefended": torch.ones_like(keep), "random": drawn, "ours": keep, "perfect": ~w.is_poison}
    found = {arm: judged(w.fit(taken(w.rows, rows), w.labels[rows], seed), w) for arm, rows in kept.items()}
    before, floor = found["undefended"][1], found["perfect"][1]
    for arm, rows in kept.items():
        accuracy, success = found[arm]
        row = {"attack": name, "arm": arm, "accuracy": accuracy, "asr": success, "poison": int(w.is_poison.sum())}
        row["tpr"] = float((~rows)[w.is_poison].double().mean())
        row["fpr"] = float((~rows)[~w.is_poison].double().mean())
        row["gap_closed"] = (before - success) / (before - floor) if before - floor > 0.05 else float("nan")
        yield row | {"seconds": seconds if arm == "ours" else float("nan")}


def worlds(what: str, seed: int) -> Iterator[tuple[str, World]]:
    """All attacks of one kind, by name."""
    if what == "texts":
        for name, attack in TEXT_ATTACKS.items():
            yield name, text_world(attack, seed)
    else:
        for name in ("digits", "breast cancer", "wine"):
            for rate in (0.01, 0.02, 0.05) if name != "wine" else (0.05,):
                yield f"{name} {rate:.0%}", table_world(name, rate, seed)


def main() -> None:
    """Print the rows as they come, then their means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=("tables", "texts"), default="tables")
    parser.add_argument("--first-seed", type=int, default=310)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    seeds, table = range(arguments.first_seed, arguments.first_seed + arguments.seeds), []
    for seed in seeds:
        for name, w in worlds(arguments.what, seed):
            for row in rows_of(name, w, seed):
                table.append(row | {"seed": seed})
                print(" ".join(f"{v:.4f}" if isinstance(v, float) else f"{v!s:20}" for v in row.values()), flush=True)
    means = []
    for attack, arm in dict.fromkeys((row["attack"], row["arm"]) for row in table):
        mine = [row for row in table if (row["attack"], row["arm"]) == (attack, arm)]
        names = ("accuracy", "asr", "poison", "tpr", "fpr", "gap_closed", "seconds")
        values = {name: [row[name] for row in mine if row[name] == row[name]] for name in names}
        means.append(
            {"attack": attack, "arm": arm, "n": len(mine)}
            | {name: float(np.mean(found)) if found else None for name, found in values.items()}
        )
    print("\nmeans")
    for row in means:
        print(" ".join(f"{v:.4f}" if isinstance(v, float) else f"{v!s:20}" for v in row.values()))
    rows = [{name: None if value != value else value for name, value in row.items()} for row in table]
    write_result(
        f"sanitize_{arguments.what}", {"means": means, "rows": rows}, seeds=list(seeds), packages=["scikit-learn"]
    )


if __name__ == "__main__":
    main()
