"""Robust accuracy and time of `evaluate_robustness` against AutoAttack, on five nets, interleaved in one run.

python -m benchmarks.adversarial_evaluation [--data PATH] [--eps 0.3] [--name NAME] [--rows 1000] [--seeds 3]
    [--first-seed 0] [--epochs 6] [--art-rows 100] [--quick]
The nets are trained in the run with the library's objectives: plain, Fast-AT (one step), PGD-AT, TRADES, and the plain
net behind rounded pixels, whose input gradient is zero. Peers: torchattacks AutoAttack "standard" and, on few rows of
one net, ART's. Rows of other seeds with the same settings stay in the file. Times are seconds of the processor, which
other processes on a shared machine do not lengthen.
Fashion-MNIST: --data its file, --eps 0.1 --name adversarial_fashion_mnist. Writes benchmarks/results/NAME.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aidefend import Threat, datasets
from aidefend.adversarial import TRADES, PGDTraining
from aidefend.attacks import PGD
from aidefend.audit import evaluate_robustness
from benchmarks.record import earlier, write_result

ROBUST = ("fast", "pgd", "trades")
Step = Callable[[nn.Module, Tensor, Tensor, float], Tensor]


class Rounded(nn.Module):
    """A net behind pixels of 17 levels: no gradient reaches the input, the accuracy stays."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        outputs: Tensor = self.model((16 * x).round() / 16)
        return outputs


def mnist_net(seed: int) -> nn.Sequential:
    """The net of the reference script of Fast-AT: two convolutions with stride 2, two linear layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        convolutions = [nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()]
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32 * 7 * 7, 100), nn.ReLU(), nn.Linear(100, 10))


def objectives(threat: Threat) -> dict[str, Step]:
    """The objectives of the nets at this threat; (model, x, y, share of the training done) -> loss."""

    def inner(done: float, steps: int, share: float) -> PGD:
        """The radius grows over the first fifth of the training, which keeps the net off the constant answer."""
        eps = threat.eps * min(1.0, done / 0.2)
        return PGD(threat.with_eps(eps), steps=steps, step_size=share * eps)

    return {
        "plain": lambda model, x, y, done: nn.functional.cross_entropy(model(x), y),
        "fast": lambda model, x, y, done: PGDTraining(inner(done, 1, 1.25))(model, x, y),
        "pgd": lambda model, x, y, done: PGDTraining(inner(done, 5, 1 / 3))(model, x, y),
        "trades": lambda model, x, y, done: TRADES(inner(done, 5, 1 / 3), beta=3.0)(model, x, y),
    }


def train(x: Tensor, y: Tensor, step: Step, epochs: int, seed: int) -> nn.Module:
    """Adam with a one-cycle schedule; batches of 128."""
    model, stream = mnist_net(seed), torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(x) // 128)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, cycle_momentum=False)
    done = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=stream).split(128):
            done += 1
            optimizer.zero_grad()
            step(model, x[rows], y[rows], done / steps).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def ours(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int) -> tuple[float, float, Any]:
    """(robust accuracy, seconds, result)."""
    start = time.process_time()
    result = evaluate_robustness(model, (x, y), threat, "standard", seed, batch_size=1000)
    return result.robust_accuracy, time.process_time() - start, result


def auto_attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int) -> tuple[float, float]:
    """The same with torchattacks."""
    import torchattacks

    start = time.process_time()
    attack = torchattacks.AutoAttack(model, norm="Linf", eps=eps, version="standard", n_classes=10, seed=seed)
    x_adv = attack(x, y)
    seconds = time.process_time() - start
    inside = (x_adv - x).abs().flatten(1).amax(dim=1) <= eps + 1e-6
    with torch.no_grad():
        broken = (model(x_adv).argmax(dim=1) != y) & inside | (model(x).argmax(dim=1) != y)
    return float((~broken).float().mean()), seconds


def art_auto_attack(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> tuple[float, float]:
    """The same with ART."""
    from art.attacks.evasion import AutoAttack
    from art.estimators.classification import PyTorchClassifier

    loss, shape = nn.CrossEntropyLoss(), tuple(x.shape[1:])
    classifier = PyTorchClassifier(model, loss, shape, 10, clip_values=(0.0, 1.0), device_type="cpu")
    start = time.process_time()
    x_adv = torch.from_numpy(AutoAttack(classifier, eps=eps, eps_step=eps / 4).generate(x.numpy(), y.numpy()))
    seconds = time.process_time() - start
    with torch.no_grad():
        return float((model(x_adv).argmax(dim=1) == y).float().mean()), seconds


def main() -> None:
    """Train, attack, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder or .npz with the full MNIST; default: the embedded subset")
    parser.add_argument("--eps", type=float, default=0.3)
    parser.add_argument("--name", default="adversarial_evaluation", help="of the file of results")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--art-rows", type=int, default=100, help="0: without ART")
    parser.add_argument("--quick", action="store_true", help="one seed, 200 rows, embedded subset, without ART")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.seeds, options.art_rows = 200, 1, 0
    images = datasets.load(options.data) if options.data else datasets.mnist_subset()
    x, y = images.test_x[: options.rows], images.test_y[: options.rows]
    threat, table = Threat("linf", options.eps), []
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for seed in seeds:
        rows = images.train_x, images.train_y
        nets = {name: train(*rows, step, options.epochs, seed) for name, step in objectives(threat).items()}
        nets["masked"] = Rounded(nets["plain"])
        for place, (name, model) in enumerate(nets.items()):
            row = _compare(name, model, x, y, threat, seed, ours_first=(place + seed) % 2 == 0)
            table.append(row)
            print(_line(row), flush=True)
        if seed == options.first_seed and options.art_rows:
            table_art = _with_art(nets["pgd"], x[: options.art_rows], y[: options.art_rows], threat)
            print(f"ART on {options.art_rows} rows of the PGD net: {table_art}", flush=True)
    settings = {"data": images.source, "n": options.rows, "eps": options.eps, "epochs": options.epochs}
    before = earlier(options.name, settings)
    table = [row for row in before.get("rows", []) if row["seed"] not in seeds] + table
    art = table_art if options.art_rows else before.get("art")
    result = settings | {"rows": table, "summary": _summary(table), "art": art}
    packages = ("torchattacks", "adversarial-robustness-toolbox")
    write_result(options.name, result, seeds=sorted({row["seed"] for row in table}), packages=packages)
    for line in result["summary"]:
        print(line)


def _compare(
    name: str, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int, *, ours_first: bool
) -> dict[str, Any]:
    """Both evaluations, in alternating order."""
    eps = float(threat.eps)
    peer = None if ours_first else auto_attack(model, x, y, eps, seed)
    accuracy, seconds, result = ours(model, x, y, threat, seed)
    peer = peer or auto_attack(model, x, y, eps, seed)
    with torch.no_grad():
        naive = PGD(threat, 40, step_size=eps / 30)(model, x, y, generator=torch.Generator().manual_seed(seed))
        naive_accuracy = float((model(naive).argmax(dim=1) == y).float().mean())
    row = {"net": name, "seed": seed, "clean": result.clean_accuracy, "pgd_40": naive_accuracy}
    row |= {"ours": accuracy, "auto_attack": peer[0], "seconds": seconds, "auto_attack_seconds": peer[1]}
    row |= {"trustworthy": result.trustworthy, "failed": [check.name for check in result.failed_checks]}
    return row | {"stages": [(stage.name, stage.attacked, stage.broken) for stage in result.stages]}


def _with_art(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> dict[str, float]:
    accuracy, seconds, _ = ours(model, x, y, threat, 0)
    peer, peer_seconds = art_auto_attack(model, x, y, float(threat.eps))
    return {"ours": accuracy, "art": peer, "time_ratio": seconds / peer_seconds, "art_seconds": peer_seconds}


def _line(row: dict[str, Any]) -> str:
    ratio = row["seconds"] / row["auto_attack_seconds"]
    verdict = "trustworthy" if row["trustworthy"] else f"not trustworthy: {', '.join(row['failed'])}"
    return (
        f"seed {row['seed']} {row['net']:7} clean {row['clean']:.1%}  PGD-40 {row['pgd_40']:.1%}  "
        f"ours {row['ours']:.1%}  "
        f"AutoAttack {row['auto_attack']:.1%}  time {row['seconds']:.1f} s, ratio {ratio:.3f}  {verdict}"
    )


def _summary(table: list[dict[str, Any]]) -> list[str]:
    lines = []
    for name in dict.fromkeys(row["net"] for row in table):
        rows = [row for row in table if row["net"] == name]
        gap = 100 * statistics.mean(row["ours"] - row["auto_attack"] for row in rows)
        ratio = statistics.median(row["seconds"] / row["auto_attack_seconds"] for row in rows)
        limit = 0.5 if name in ROBUST else 0.2
        lines.append(
            f"{'met   ' if gap <= 0.2 else 'MISSED'} {name}: robust accuracy {gap:+.2f} points from AutoAttack's "
            "(<= +0.2); "
            f"{'met   ' if ratio <= limit else 'MISSED'} time ratio {ratio:.3f} (<= {limit})"
        )
    return lines


if __name__ == "__main__":
    main()
