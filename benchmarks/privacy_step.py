"""Time and memory of one private step over one step of plain SGD, ours beside Opacus's modes, at batch 512.

python -m benchmarks.privacy_step [--rounds 20] [--nets cnn,mlp,groupnorm-cnn,transformer] [--quick]
Every candidate starts from the same weights and takes the same 512 rows (ours: a full batch, so that the size is
fixed); all run interleaved in one process. Peak memory counts every allocation of torch, from its profiler. `noise` is
the time of the secure noise of one step as a share of our step. Writes benchmarks/results/privacy_step.json.
"""

import argparse
import copy
import itertools
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from aidefend._core.random import secure_normal
from aidefend.privacy import PrivacyConfig, make_private
from benchmarks.interleaved import interleave
from benchmarks.record import write_result

ROWS, STEPS = 512, 100_000
TIME_TARGET, PEER_TARGET, MEMORY_TARGET, NOISE_TARGET = 1.4, 1.5, 1.3, 0.1
LOSS = nn.CrossEntropyLoss(reduction="none")


class Transformer(nn.Module):
    """Two encoder layers of width 128 with four heads over 32 tokens, mean over the tokens, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(1000, 128), nn.Embedding(32, 128)
        self.layers = nn.ModuleList(_Encoder() for _ in range(2))
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of (N, 32) token ids."""
        places = torch.arange(x.shape[1], device=x.device).expand_as(x).contiguous()
        hidden = self.tokens(x) + self.places(places)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(hidden.mean(dim=1))
        return logits


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(128), nn.LayerNorm(128)
        self.mix, self.back = nn.Linear(128, 384), nn.Linear(128, 128)
        self.wide, self.narrow = nn.Linear(128, 512), nn.Linear(512, 128)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.mix(self.first(x)).unflatten(2, (3, 4, 32)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        x = x + self.back(seen.transpose(1, 2).flatten(2))
        narrowed: Tensor = self.narrow(nn.functional.gelu(self.wide(self.second(x))))
        return x + narrowed


def _mnist_cnn() -> nn.Module:
    first = [nn.Conv2d(1, 16, 8, 2, 3), nn.Tanh(), nn.MaxPool2d(2, 1)]
    second = [nn.Conv2d(16, 32, 4, 2), nn.Tanh(), nn.MaxPool2d(2, 1)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10))


def _mlp() -> nn.Module:
    hidden = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(1024, 10))


def _group_norm_cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 49, 10))


NETS: dict[str, Callable[[], nn.Module]] = {
    "cnn": _mnist_cnn,
    "mlp": _mlp,
    "groupnorm-cnn": _group_norm_cnn,
    "transformer": Transformer,
}


def data(net: str) -> tuple[Tensor, Tensor]:
    """Rows of the right shape; what they say does not matter to the time."""
    stream = torch.Generator().manual_seed(0)
    y = torch.randint(0, 10, (ROWS,), generator=stream)
    if net == "transformer":
        return torch.randint(0, 1000, (ROWS, 32), generator=stream), y
    return torch.rand(ROWS, 1, 28, 28, generator=stream), y


def plain_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Plain SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        LOSS(model(x), y).mean().backward()
        optimizer.step()

    return step


def our_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Through the loader, with the secure noise."""
    config = PrivacyConfig(
        expected_batch_size=ROWS, public_size=ROWS, steps=STEPS, max_grad_norm=1.0, delta=1e-5, noise_multiplier=1.0
    )
    private = make_private(model, torch.optim.SGD(model.parameters(), 1e-3), (x, y), LOSS, config)
    batches = iter(private.loader)

    def step() -> None:
        rows, targets = next(batches)
        private.optimizer.zero_grad()
        private.loss(private.model(rows), targets).backward()
        private.optimizer.step()

    return step


def opacus_step(mode: str, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Opacus's pieces with its fast noise, and without its loader."""
    from opacus import GradSampleModule
    from opacus.grad_sample import GradSampleModuleExpandedWeights, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    inner = torch.optim.SGD(model.parameters(), 1e-3)
    common: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": ROWS}
    if mode == "ghost":
        ghost = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0, use_ghost_clipping=True)
        optimizer: Any = DPOptimizerFastGradientClipping(inner, **common)
        loss: Any = DPLossFastGradientClipping(ghost, optimizer, nn.CrossEntropyLoss(), "mean")
        wrapped: Any = ghost
    else:
        kinds = {"hooks": GradSampleModule, "ew": GradSampleModuleExpandedWeights}
        extra = {"force_functorch": True} if mode == "functorch" else {}
        wrapped = kinds.get(mode, GradSampleModule)(model, **extra)
        optimizer, loss = DPOptimizer(inner, **common), nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        loss(wrapped(x), y).backward()
        optimizer.step()

    return step


def candidates(net: str) -> dict[str, Callable[[], Callable[[], None]]]:
    """Ways to make one step of each kind, from the same weights."""
    torch.manual_seed(0)
    model, (x, y) = NETS[net](), data(net)
    found: dict[str, Callable[[], Callable[[], None]]] = {
        "plain": lambda: plain_step(copy.deepcopy(model), x, y),
        "aidefend": lambda: our_step(copy.deepcopy(model), x, y),
    }
    for mode in ("hooks", "functorch", "ew", "ghost"):
        found[f"opacus {mode}"] = lambda mode=mode: opacus_step(mode, copy.deepcopy(model), x, y)
    return found


def working(net: str) -> dict[str, Callable[[], None]]:
    """The candidates that can take this net at all."""
    steps = {}
    for name, make in candidates(net).items():
        try:
            step = make()
            step()
            step()
        except Exception as error:
            print(f"  {net}: {name} cannot run ({type(error).__name__}: {str(error)[:100]})")
            if not name.startswith("opacus"):
                raise
            continue
        steps[name] = step
    return steps


def peak_memory(step: Callable[[], None], net: str) -> float:
    """Megabytes at the worst moment of one step: rows, parameters, and all that torch allocates on top, exactly."""
    fixed = sum(tensor.nbytes for tensor in (*data(net), *NETS[net]().parameters()))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return (fixed + max(live)) / 2**20


def noise_seconds(net: str) -> float:
    """Seconds of the secure noise of one step, median of nine."""
    shapes = [tuple(p.shape) for p in NETS[net]().parameters()]
    found = []
    for _ in range(9):
        start = time.perf_counter()
        for shape in shapes:
            secure_normal(shape)
        found.append(time.perf_counter() - start)
    return sorted(found)[4]


def run(net: str, rounds: int) -> dict[str, Any]:
    """All figures of one net."""
    steps = working(net)
    comparison = interleave(steps, reference="plain", rounds=rounds)
    rows = {row["name"]: row for row in comparison.rows()}
    peers = {name: row["ratio"] for name, row in rows.items() if name.startswith("opacus")}
    best = min(peers, key=peers.__getitem__)
    memory = {name: peak_memory(steps[name], net) for name in ("plain", "aidefend", best)}
    ours = rows["aidefend"]
    found = {
        "net": net,
        "over_plain": ours["ratio"],
        "best_peer": best,
        "peer_over_ours": peers[best] / ours["ratio"],
        "memory_megabytes": memory,
        "memory_over_plain": memory["aidefend"] / memory["plain"],
        "noise_share": noise_seconds(net) / ours["median_seconds"],
        "timing": comparison.rows(),
    }
    print(f"{net}\n{comparison.table()}")
    return found


def verdicts(found: dict[str, Any]) -> str:
    """One line for each net."""

    def mark(good: bool) -> str:
        return "met   " if good else "MISSED"

    time_mark, peer_mark = mark(found["over_plain"] <= TIME_TARGET), mark(found["peer_over_ours"] >= PEER_TARGET)
    memory_mark = mark(found["memory_over_plain"] <= MEMORY_TARGET)
    return (
        f"{found['net']:14} {time_mark} {found['over_plain']:.2f} x plain (<= 1.4)  "
        f"{peer_mark} {found['peer_over_ours']:.2f} x faster than {found['best_peer']} (>= 1.5)  "
        f"{memory_mark} memory {found['memory_over_plain']:.2f} x (<= 1.3)  "
        f"noise {found['noise_share']:.1%} of the step"
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    found = [run(net, 3 if options.quick else options.rounds) for net in options.nets.split(",")]
    summary = [verdicts(each) for each in found]
    noise = next((each["noise_share"] for each in found if each["net"] == "transformer"), None)
    if noise is not None:
        met = "met   " if noise <= NOISE_TARGET else "MISSED"
        summary.append(f"{met} secure noise {noise:.1%} of the transformer's step (<= 10 %)")
    result = {"nets": found, "summary": summary, "rows": ROWS, "threads": torch.get_num_threads()}
    write_result("privacy_step", result, seeds=range(1), packages=())
    print(*summary, sep="\n")


if __name__ == "__main__":
    main()
