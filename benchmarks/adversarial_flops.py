"""FLOPs of one adversarial training step, counted operator by operator, against the least that the method needs.

python -m benchmarks.adversarial_flops [--batch 4] [--steps 10] [--quick]
Nets: the SmallCNN of the TRADES script (with its dropout, in train mode) and the two-convolution net of the Fast-AT
script. Floor = attack steps x (forward + input gradient) + the training passes; TRADES reuses its clean logits. The
target is <= 1.02 x floor for each method. "exact answer" is TRADES as it comes: where dropout or BatchNorm trains, the
attack gets the clean answer of its own mode, for one forward pass more; it has no target.
Writes benchmarks/results/adversarial_flops.json.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from aidefend import Threat
from aidefend.adversarial import AWP, TRADES, FastTraining, PGDTraining
from aidefend.attacks import PGD
from benchmarks.adversarial_evaluation import mnist_net
from benchmarks.record import write_result

TARGET = 1.02
THREAT = Threat("linf", 0.3)


class FlopCounter(TorchDispatchMode):
    """Adds up the published formula of each operator that runs, in forward and backward passes alike.

    No module is tracked: torch's own FlopCounterMode does, and breaks on `autograd.grad` to a leaf.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and count it."""
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


def flops(work: Callable[[], object]) -> int:
    """FLOPs of whatever `work` runs; what its dropout draws is put back."""
    with torch.random.fork_rng(), FlopCounter() as counter:
        work()
    return counter.total


@dataclass(frozen=True)
class Costs:
    """FLOPs of the parts of a step: a forward pass, an attack's pass to the input, a plain training step."""

    forward: int
    attack_step: int
    plain: int


def parts(model: nn.Module, x: Tensor, y: Tensor) -> Costs:
    """Counted, not derived: the first layer needs no input gradient in training, and no weight gradient in attacks."""

    def to_the_input() -> Tensor:
        frozen = {name: value.detach() for name, value in model.named_parameters()}
        point = x.clone().requires_grad_()
        return torch.autograd.grad(cross_entropy(torch.func.functional_call(model, frozen, point), y), point)[0]

    forward = flops(lambda: model(x))
    return Costs(forward, flops(to_the_input), flops(lambda: cross_entropy(model(x), y).backward()))


def small_cnn(seed: int) -> nn.Sequential:
    """The net of the TRADES script for MNIST."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(1024, 200), nn.ReLU(), nn.Dropout(0.5), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)),
        )


NETS: dict[str, Callable[[int], nn.Module]] = {"SmallCNN": small_cnn, "two convolutions": mnist_net}


def methods(steps: int) -> dict[str, tuple[Any, Callable[[Costs], int]]]:
    """Objective and floor by name."""
    attack = PGD(THREAT, steps)
    two_passes = lambda c: steps * c.attack_step + 2 * c.plain  # noqa: E731 - a formula
    return {
        f"PGD-{steps}": (PGDTraining(attack), lambda c: steps * c.attack_step + c.plain),
        f"TRADES-{steps}": (TRADES(attack, reuse_clean=True), two_passes),
        f"TRADES-{steps}, exact answer": (TRADES(attack), two_passes),
        "FGSM-RS": (FastTraining(PGD(THREAT)), lambda c: c.attack_step + c.plain),
        f"AWP + PGD-{steps}": (AWP(PGDTraining(attack)), two_passes),
    }


def measure(batch: int, steps: int) -> list[dict[str, Any]]:
    """One row for each net and method."""
    stream = torch.Generator().manual_seed(0)
    x, y = torch.rand(batch, 1, 28, 28, generator=stream), torch.randint(10, (batch,), generator=stream)
    rows = []
    for net, make in NETS.items():
        model = make(0)
        costs = parts(model, x, y)
        for name, (objective, floor) in methods(steps).items():
            counted = flops(lambda objective=objective, model=model: objective(model, x, y).backward())
            share = counted / floor(costs)
            row = {"net": net, "method": name, "flops": counted, "over_plain": counted / costs.plain}
            judged = "exact" not in name
            rows.append(row | {"floor_over_plain": floor(costs) / costs.plain, "over_floor": share, "judged": judged})
    return rows


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a batch of 1; the counts per sample are the same")
    options = parser.parse_args()
    rows = measure(1 if options.quick else options.batch, options.steps)
    for row in rows:
        print(_line(row))
    write_result("adversarial_flops", {"rows": rows, "target": TARGET}, seeds=[0])
    missed = [row["method"] for row in rows if row["judged"] and row["over_floor"] > TARGET]
    print(f"MISSED: {missed}" if missed else f"met: every method <= {TARGET} x its floor")


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['net']:17} {row['method']:24} {row['over_plain']:6.2f} x plain, floor {row['floor_over_plain']:6.2f}"
        f" x: {row['over_floor']:.4f}{'' if row['judged'] else '  (no target)'}"
    )


if __name__ == "__main__":
    main()
