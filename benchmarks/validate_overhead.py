"""What a guard costs over the bare model: the specification alone, and with the default detectors.

python -m benchmarks.validate_overhead [--calls 400] [--bank 1000] [--clock wall] [--quick]
A small CNN on 28 x 28 images and a transformer of 12 layers on 64 tokens, weights as they are made, batches of 1 and of
64 (a quarter of the calls). Three ways, call by call in shuffled order: the bare model; the model behind
`InputSpec.check`; a guard with its default detectors (`Energy`, `NearestNeighbours(k=50)`), no collaborators. A fourth
times the matrix product with the bank alone, which is subtracted. The cost of a way is its median difference to the
bare model in the same round.
Limits: specification <= 5 % of the bare median + 60 us; guard <= 10 % + 400 us beyond the product. Prints p50 and p99
of each. With --clock thread, times are the processor's for the calling thread: what other programs take while they run
does not count, what they leave in the caches does. Writes benchmarks/results/validate_overhead.json.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aidefend.validate import Guard, InputSpec
from benchmarks.interleaved import interleave
from benchmarks.record import write_result

SEED = 1400
LIMITS = {"specification": (0.05, 60e-6), "guard": (0.10, 400e-6)}


class Transformer(nn.Module):
    """Twelve layers of width 128 over 64 tokens of 32 numbers; the mean of the last layer goes into a linear head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, dropout=0.0, norm_first=True)
        self.embed = nn.Linear(32, 128)
        self.body = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 64, 32) to (N, 10)."""
        return self.head(self.body(self.embed(x)).mean(dim=1))  # type: ignore[no-any-return]


def cnn() -> nn.Sequential:
    """Two convolutions and two linear layers."""
    body = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*body, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10))


def worlds() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Models in eval mode and the shape of one row."""
    torch.manual_seed(SEED)
    return {"cnn": (cnn().eval(), (1, 28, 28)), "transformer": (Transformer().eval(), (64, 32))}


def candidates(model: nn.Module, guard: Guard, spec: InputSpec, x: Tensor) -> dict[str, Callable[[], object]]:
    """The four ways on one batch."""
    bank = guard.detectors[1].bank  # type: ignore[attr-defined]
    features = torch.randn(len(x), bank.shape[1], generator=torch.Generator().manual_seed(SEED))

    def bare() -> Tensor:
        with torch.no_grad():
            answer: Tensor = model(x)
        return answer

    def specification() -> Tensor:
        if not bool(spec.check(x).accepted.all()):
            raise AssertionError("the batch is clean")
        return bare()

    return {
        "bare": bare,
        "specification": specification,
        "guard": lambda: guard(x).outputs,
        "product": lambda: features @ bank.T,
    }


def measured(
    name: str, model: nn.Module, guard: Guard, x: Tensor, calls: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Costs of one model and batch."""
    ways = candidates(model, guard, guard.spec, x)
    rounds = {"rounds": calls, "warmup": max(5, calls // 20)}
    seconds = interleave(ways, reference="bare", seed=SEED, clock=clock, **rounds).seconds
    median = {way: statistics.median(values) for way, values in seconds.items()}
    row: dict[str, Any] = {"model": name, "batch": len(x), "bare_median": median["bare"], "product": median["product"]}
    for way, (share, constant) in LIMITS.items():
        beyond = [own - bare for own, bare in zip(seconds[way], seconds["bare"], strict=True)]
        cost = statistics.median(beyond) - (median["product"] if way == "guard" else 0.0)
        allowed = share * median["bare"] + constant
        row[way] = {"cost": cost, "allowed": allowed, "holds": cost <= allowed}
    for way, values in seconds.items():
        cuts = statistics.quantiles(values, n=100)
        row[f"{way}_p50_p99"] = [cuts[49], cuts[98]]
    return row


def show(row: dict[str, Any]) -> None:
    """One batch in a few lines, in microseconds."""
    print(f"{row['model']}, batch {row['batch']}, product with the bank {1e6 * row['product']:.0f} us")
    for way in ("bare", "specification", "guard"):
        low, high = (1e6 * value for value in row[f"{way}_p50_p99"])
        line = f"  {way:14} p50 {low:9.0f} us  p99 {high:9.0f} us"
        if way in LIMITS:
            own = row[way]
            line += f"  costs {1e6 * own['cost']:7.0f} of {1e6 * own['allowed']:.0f} us allowed"
            line += "" if own["holds"] else "  MISSED"
        print(line, flush=True)


def main() -> None:
    """Print each model and batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--bank", type=int, default=1000)
    parser.add_argument("--clock", choices=("wall", "thread"), default="wall")
    parser.add_argument("--quick", action="store_true", help="60 calls")
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.thread_time
    calls = 60 if arguments.quick else arguments.calls
    torch.set_num_threads(1)
    stream, rows = torch.Generator().manual_seed(SEED), []
    for name, (model, shape) in worlds().items():
        data = torch.rand(arguments.bank + 1000, *shape, generator=stream)
        fit, calibration = data[: arguments.bank], data[arguments.bank :]
        with Guard.calibrate(model, calibration, InputSpec.infer(data), fit=fit) as guard:
            for size in (1, 64):
                x = torch.rand(size, *shape, generator=stream)
                rows.append(measured(name, model, guard, x, calls if size == 1 else calls // 4, clock))
                show(rows[-1])
    load = os.getloadavg()[0]  # of the machine: other programs share it, and every figure grows with them
    setting = {"clock": arguments.clock, "load": load, "calls": calls}
    result = {"bank_rows": arguments.bank, "bank_width": 128, **setting, "rows": rows}
    if not arguments.quick:
        write_result("validate_overhead", result, seeds=[SEED])


if __name__ == "__main__":
    main()
