"""How close minimum-norm attacks come to the best known distance, ours beside adv-lib's, at equal numbers of passes.

python -m benchmarks.adversarial_optimality [--data PATH] [--rows 200] [--passes 2000] [--seeds 3] [--epochs 6]
    [--quick]
Measure: area under accuracy over eps, from 0 to the largest distance that the best attack of each row needs; the
optimality of an attack is 1 less its excess over the area of the envelope of all attacks, as a share of the largest
possible excess (AttackBench, Cina et al. 2025). Forward and backward passes are counted at the model, each as one, on
the mean over the rows. Writes benchmarks/results/adversarial_optimality.json.
"""

import argparse
import functools
import statistics
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aidefend import Threat, datasets
from aidefend.attacks import APGD, DDN, FMN, SigmaZero
from benchmarks.adversarial_evaluation import objectives, train
from benchmarks.record import write_result

Run = Callable[[nn.Module, Tensor, Tensor, int], Tensor]
WHOLE = {"linf": 1.0, "l2": 28.0, "l1": 784.0, "l0": 784.0}
PEERS = {
    "linf": ("APGD-T adv-lib",),
    "l2": ("DDN adv-lib", "FMN adv-lib"),
    "l1": ("PDPGD adv-lib",),
    "l0": ("sigma-zero adv-lib",),
}
EXACT = 1e-3  # of the share: the rounding of the search itself


class Counted(nn.Module):
    """The net; counts rows that pass forward and rows whose gradient comes back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.passes = model, 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        self.passes += len(x)
        outputs: Tensor = self.model(x)
        if outputs.requires_grad:
            outputs.register_hook(self._back)
        return outputs

    def _back(self, grad: Tensor) -> None:
        self.passes += len(grad)


def ours(attack: Any) -> Run:
    """An attack of the library, minimum norm."""

    def run(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        stream = torch.Generator().manual_seed(seed)
        found: Tensor = attack.run(model, x, y, goal="min_norm", generator=stream).x_adv
        return found

    return run


def peer(attack: Callable[..., Tensor], **options: Any) -> Run:
    """An attack of adv-lib: a function of (model, inputs, labels)."""

    def run(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return attack(model, x, y, **options)

    return run


def candidates(norm: str, passes: int) -> dict[str, Run]:
    """All attacks of one norm with settings that use about `passes` passes."""
    lib, steps = adv_lib(), passes // 2
    threat = Threat(norm, WHOLE[norm])  # type: ignore[arg-type]  # one of the four
    found: dict[str, Run] = {"FMN": ours(FMN(threat, steps))}
    if norm == "linf":
        search = {"norm": float("inf"), "max_eps": 1.0, "binary_search_steps": 10}
        per_target = max(2, steps // (10 * 9))
        found["APGD margin"] = ours(APGD(threat, max(2, steps // 11), loss="margin"))
        found["APGD-T adv-lib"] = peer(lib.auto_pgd.minimal_apgd, **search, targeted_version=True, n_iter=per_target)
        found["APGD adv-lib"] = peer(lib.auto_pgd.minimal_apgd, **search, n_iter=max(2, steps // 10))
    if norm == "l2":
        found["DDN"] = ours(DDN(threat, steps))
        found["DDN adv-lib"] = peer(lib.ddn, steps=steps, levels=None)
    if norm == "l1":
        found["APGD margin"] = ours(APGD(threat, max(2, steps // 11), loss="margin"))
        found["PDPGD adv-lib"] = peer(lib.pdpgd, norm=1, num_steps=steps)
    if norm == "l0":
        found["SigmaZero"] = ours(SigmaZero(threat, steps))
        found["sigma-zero adv-lib"] = peer(lib.sigma_zero, num_steps=steps)
    order = {"linf": float("inf"), "l2": 2, "l1": 1, "l0": 0}[norm]
    found["FMN adv-lib"] = peer(lib.fmn, norm=order, steps=steps)
    return found


@functools.cache
def adv_lib() -> Any:
    """adv-lib without torchvision, which it needs for one distance that nothing here uses."""
    vision, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    vision.models = models  # type: ignore[attr-defined]
    sys.modules.setdefault("torchvision", vision)
    sys.modules.setdefault("torchvision.models", models)
    import adv_lib.attacks
    import adv_lib.attacks.auto_pgd

    return adv_lib.attacks


def distances(run: Run, model: nn.Module, x: Tensor, y: Tensor, norm: str, seed: int) -> tuple[Tensor, float]:
    """Distance of each row (0 where it is wrong already, inf where nothing was found), and passes a row."""
    counted = Counted(model)
    x_adv = run(counted, x, y, seed).detach()
    with torch.no_grad():
        wrong, inside = model(x_adv).argmax(dim=1) != y, ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(dim=1)
        length = Threat(norm, 1.0).distance(x_adv, x)  # type: ignore[arg-type]  # one of the four
        clean_wrong = model(x).argmax(dim=1) != y
    found = torch.where(wrong & inside, length, torch.inf)
    return torch.where(clean_wrong, 0.0, found), counted.passes / len(x)


def optimality(found: Mapping[str, Tensor]) -> dict[str, float]:
    """1 = as good as the envelope on every row, 0 = nothing found."""
    envelope = torch.stack(list(found.values())).amin(dim=0)
    reach = float(envelope[envelope.isfinite()].max())
    best = envelope.clamp(max=reach).mean()
    worst = torch.where(envelope > 0, reach, 0.0).mean()
    return {name: float(1 - (own.clamp(max=reach).mean() - best) / (worst - best)) for name, own in found.items()}


def main() -> None:
    """Train two nets a seed, run everything, print the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder or .npz with the full MNIST; default: the embedded subset")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--passes", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="one seed, 50 rows, 400 passes")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.passes, options.seeds = 50, 400, 1
    images = datasets.load(options.data) if options.data else datasets.mnist_subset()
    x, y = images.test_x[: options.rows], images.test_y[: options.rows]
    table = []
    for seed in range(options.seeds):
        for net in ("plain", "pgd"):
            model = train(images.train_x, images.train_y, objectives(Threat("linf", 0.3))[net], options.epochs, seed)
            for norm in WHOLE:
                runs = candidates(norm, options.passes)
                found = {name: distances(run, model, x, y, norm, seed) for name, run in runs.items()}
                shares = optimality({name: own for name, (own, _) in found.items()})
                for name, (own, passes) in found.items():
                    row = {"seed": seed, "net": net, "norm": norm, "attack": name, "optimality": shares[name]}
                    row |= {"median": float(own.median()), "found": float(own.isfinite().float().mean())}
                    table.append(row | {"passes": passes})
                    print(_line(table[-1]), flush=True)
    summary = _summary(table)
    result = {"rows": table, "summary": summary, "n": options.rows, "passes": options.passes, "data": images.source}
    write_result("adversarial_optimality", result, seeds=range(options.seeds), packages=("adv-lib",))
    print(*summary, sep="\n")


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"seed {row['seed']} {row['net']:6} {row['norm']:4} {row['attack']:20} optimality {row['optimality']:.4f}  "
        f"median {row['median']:.4g}  found {row['found']:.0%}  passes {row['passes']:.0f}"
    )


def _summary(table: list[dict[str, Any]]) -> list[str]:
    lines = []
    for norm, peers in PEERS.items():
        means = {
            name: statistics.mean(row["optimality"] for row in table if (row["norm"], row["attack"]) == (norm, name))
            for name in dict.fromkeys(row["attack"] for row in table if row["norm"] == norm)
        }
        own = max((name for name in means if "adv-lib" not in name), key=means.__getitem__)
        best_peer = max(peers, key=means.__getitem__)
        verdict = "met   " if means[own] >= means[best_peer] - EXACT else "MISSED"
        lines.append(f"{verdict} {norm}: {own} {means[own]:.4f} against {best_peer} {means[best_peer]:.4f}")
    return lines


if __name__ == "__main__":
    main()
