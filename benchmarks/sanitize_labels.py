"""Wrong labels: ConfidentLearning beside cleanlab, on the same predictions of cross-validation.

python -m benchmarks.sanitize_labels --data mnist.npz [--seeds 5] [--timing-only]
Labels of digits (1,797), 3,000 MNIST digits and breast cancer (569) are flipped at 5 to 40 %, evenly or to the next
class; two classifiers predict them by 5-fold cross-validation. F1 of the rows that are called wrong, average precision
of the ranking, and time beside cleanlab's low-memory path, interleaved. The method was chosen with seeds 0 and 1 and
other MNIST digits; the seeds here begin at 100. Needs cleanlab. Writes benchmarks/results/sanitize_labels.json.
"""

import argparse
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from aidefend.sanitize import ConfidentLearning
from benchmarks.interleaved import interleave
from benchmarks.record import earlier, write_result

FIRST_SEED = 100
RATES = (0.05, 0.1, 0.2, 0.4)


def data_sets(path: str) -> Iterator[tuple[str, Any, Any]]:
    """Name, inputs (N, d) and true labels."""
    from sklearn.datasets import load_breast_cancer, load_digits
    from sklearn.preprocessing import StandardScaler

    digits, cancer = load_digits(), load_breast_cancer()
    yield "digits", digits.data / 16, digits.target
    yield "breast cancer", StandardScaler().fit_transform(cancer.data), cancer.target
    with np.load(path) as arrays:
        rows = np.random.default_rng(FIRST_SEED).permutation(len(arrays["train_x"]))[:3000]
        yield "MNIST", arrays["train_x"][rows].reshape(len(rows), -1) / 255, arrays["train_y"][rows].astype(int)


def flipped(y: Any, rate: float, kind: str, seed: int) -> tuple[Any, Any]:
    """Labels of which exactly this share is wrong, and which they are."""
    stream, classes = np.random.default_rng(seed), int(y.max()) + 1
    wrong = np.zeros(len(y), dtype=bool)
    wrong[stream.permutation(len(y))[: round(rate * len(y))]] = True
    shift = stream.integers(1, classes, len(y)) if kind == "symmetric" else 1
    return np.where(wrong, (y + shift) % classes, y), wrong


def predictions(model: str, x: Any, labels: Any) -> Any:
    """(N, K), each row by a model that has not seen it."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    forest = RandomForestClassifier(100, random_state=0, n_jobs=2)
    chosen = LogisticRegression(max_iter=200, C=0.05) if model == "logistic" else forest
    return cross_val_predict(chosen, x, labels, cv=5, method="predict_proba")


def block_of(chances: Any, labels: Any) -> dict[str, Any]:
    """The block that our detector takes."""
    logits = torch.from_numpy(np.log(np.clip(chances, 1e-12, 1)))
    ids = tuple(map(str, range(len(labels))))
    return {"ids": ids, "features": logits, "labels": torch.from_numpy(labels).long(), "logits": logits}


def ours(block: dict[str, Any]) -> tuple[Any, Any]:
    """Issues and scores."""
    detector = ConfidentLearning().partial_fit(block)
    return detector.issues(block).numpy(), detector.score(block).numpy()


def ours_issues(block: dict[str, Any]) -> Any:
    """What cleanlab's path for large data answers: the issues."""
    return ConfidentLearning().partial_fit(block).issues(block)


def peer(chances: Any, labels: Any) -> tuple[Any, Any]:
    """Cleanlab's default issues and quality scores."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    return find_label_issues(labels, chances), 1 - get_label_quality_scores(labels, chances)


def low_memory(chances: Any, labels: Any) -> Any:
    """Cleanlab's path for large data."""
    from cleanlab.experimental.label_issues_batched import find_label_issues_batched

    return find_label_issues_batched(labels, chances, n_jobs=1, verbose=False)


def measured(found: tuple[Any, Any], wrong: Any) -> tuple[float, float]:
    """F1 and average precision."""
    from sklearn.metrics import average_precision_score

    issues, scores = found
    return 2 * float((issues & wrong).sum()) / float(issues.sum() + wrong.sum()), average_precision_score(wrong, scores)


def rows(path: str, seeds: range) -> Iterator[dict[str, Any]]:
    """One row for each data set, classifier, kind and rate: means over the seeds."""
    for (name, x, y), model in itertools.product(data_sets(path), ("logistic", "forest")):
        kinds = ("symmetric", "next class") if y.max() > 1 else ("symmetric",)
        for kind, rate in itertools.product(kinds, RATES):
            both = []
            for seed in seeds:
                labels, wrong = flipped(y, rate, kind, seed)
                chances = predictions(model, x, labels)
                found = ours(block_of(chances, labels)), peer(chances, labels)
                both.append([value for each in found for value in measured(each, wrong)])
            f1, precision, f1_peer, precision_peer = np.mean(both, axis=0).tolist()
            row = {"data": name, "model": model, "noise": kind, "rate": rate, "f1": f1, "f1_cleanlab": f1_peer}
            yield row | {"average_precision": precision, "average_precision_cleanlab": precision_peer}


def main() -> None:
    """Print each row as it comes, then the summary and the times."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--timing-only", action="store_true", help="keep the other rows of the last result")
    arguments = parser.parse_args()
    seeds, table = range(FIRST_SEED, FIRST_SEED + arguments.seeds), []
    known = earlier("sanitize_labels", {}) if arguments.timing_only else {}
    for row in known.get("rows") or rows(arguments.data, seeds):
        table.append(row)
        print(" ".join(f"{v:.3f}" if isinstance(v, float) else f"{v:14}" for v in row.values()), flush=True)
    stream = np.random.default_rng(FIRST_SEED)
    labels = stream.integers(0, 10, 50_000)
    chances = stream.dirichlet(np.ones(10), 50_000) + 3 * np.eye(10)[labels] * (stream.random((50_000, 1)) > 0.1)
    chances /= chances.sum(axis=1, keepdims=True)
    block = block_of(chances, labels)
    timed = interleave(
        {"aidefend": lambda: ours_issues(block), "cleanlab low memory": lambda: low_memory(chances, labels)},
        reference="cleanlab low memory",
        rounds=7,
    )
    print(timed.table())
    wins = sum(row["f1"] >= row["f1_cleanlab"] - 1e-9 for row in table)
    means = {key: float(np.mean([row[key] for row in table])) for key in table[0] if "f1" in key or "average" in key}
    print(f"F1 at least cleanlab's in {wins} of {len(table)} settings; means {means}")
    result = {"rows": table, "f1_wins": wins, "means": means, "timing": timed.rows()}
    write_result("sanitize_labels", result, seeds=list(seeds), packages=["cleanlab", "scikit-learn"])


if __name__ == "__main__":
    main()
