"""Eighteen unsafe set-ups of private training: what Opacus does with each, and what we do.

python -m benchmarks.privacy_setups [--runs 150]
Each set-up runs as a user would write it. `accepted` means that training went on and an epsilon could be printed; the
proof is measured in the same run. Ours must refuse it with an error of its own, or show that it cannot happen. The
choice of set-ups is ours: run them, and add your own. Writes benchmarks/results/privacy_setups.json.
"""

import argparse
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from aidefend import AidefendError
from aidefend._core.stats import clopper_pearson
from aidefend.privacy import PrivacyConfig, epsilon, make_private
from benchmarks.record import write_result

DELTA = 1e-5
LOSS = nn.CrossEntropyLoss(reduction="none")


class Outcome(NamedTuple):
    """Whether the set-up went through, and what was measured or said."""

    accepted: bool
    proof: str


class SetUp(NamedTuple):
    """One way to break the guarantee, tried on both."""

    name: str
    opacus: Callable[[], Outcome]
    ours: Callable[[], Outcome]


def rows(n: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random numbers, two classes."""
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, generator=stream), torch.arange(n) % 2


def net(middle: nn.Module | None = None) -> nn.Sequential:
    """A small classifier, with something in the middle."""
    return nn.Sequential(nn.Linear(8, 16), *([] if middle is None else [middle]), nn.ReLU(), nn.Linear(16, 2))


class MinusBatchMean(nn.Module):
    """Couples the rows of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        """Deviation from the batch."""
        return x - x.mean(0)


def frozen_batch_norm() -> nn.Module:
    """Batch normalisation whose parameters do not train."""
    return nn.BatchNorm1d(16).requires_grad_(False)


class Opaque:
    """Opacus's engine around one model, as its tutorial has it."""

    def __init__(self, model: nn.Module, data: Any = None, batch: int = 16, **options: Any) -> None:
        from opacus import PrivacyEngine

        self.engine = PrivacyEngine()
        self.criterion = options.pop("criterion", nn.CrossEntropyLoss())
        self.loader = data if isinstance(data, DataLoader) else DataLoader(TensorDataset(*(data or rows())), batch)
        base = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options}
        parts = self.engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
            data_loader=self.loader,
            criterion=self.criterion,
            **base,
        )
        self.model, self.optimizer, self.private_loader = parts[0], parts[1], parts[-1]
        if len(parts) == 4:
            self.criterion = parts[2]

    def step(self, x: Tensor, y: Tensor) -> None:
        """One turn of the loop."""
        self.optimizer.zero_grad()
        self.criterion(self.model(x), y).backward()
        self.optimizer.step()

    def epsilon(self) -> float:
        """What it reports."""
        return float(self.engine.get_epsilon(DELTA))


def config(**changes: Any) -> PrivacyConfig:
    """Of our runs."""
    base = {"expected_batch_size": 16, "public_size": 64, "steps": 4, "max_grad_norm": 1.0, "delta": DELTA}
    return PrivacyConfig(**{**base, "noise_multiplier": 1.0, **changes})


def private(model: nn.Module | None = None, data: Any = None, loss: Any = LOSS, **changes: Any) -> Any:
    """Our wrapped run."""
    model = net() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return make_private(model, optimizer, rows() if data is None else data, loss, config(**changes))


def turn(run: Any, x: Tensor, y: Tensor) -> None:
    """One turn of our loop."""
    run.optimizer.zero_grad()
    run.loss(run.model(x), y).backward()
    run.optimizer.step()


def refusal(attempt: Callable[[], object]) -> Outcome:
    """The error of ours that an attempt meets."""
    try:
        attempt()
    except AidefendError as error:
        return Outcome(False, f"refused: {type(error).__name__}: {' '.join(str(error).split())}"[:160])
    return Outcome(True, "went through")


def coupling(middle: Callable[[], nn.Module] | None, criterion: nn.Module, label: int | None = None) -> Outcome:
    """How far one example moves the per-sample gradients of the others in Opacus's hooks."""
    torch.manual_seed(0)
    model = net(middle() if middle else None)
    run = Opaque(model, criterion=criterion)
    x, y = rows(8)
    found = []
    for change in (False, True):
        other_x, other_y = x.clone(), y.clone()
        if change and label is None:
            other_x[7] += 3.0
        elif change:
            other_y[7] = label
        run.optimizer.zero_grad()
        run.criterion(run.model(other_x), other_y).backward()
        found.append(torch.cat([p.grad_sample[:7].flatten(1) for p in model.parameters() if p.requires_grad], dim=1))
    moved = float((found[0] - found[1]).norm(dim=1).max())
    run.optimizer.step()
    return Outcome(True, f"one example moves another's gradient by {moved:.2f}; epsilon {run.epsilon():.2f} printed")


def lower_bound(spreads: Callable[[int], list[float]], runs: int) -> float:
    """Epsilon from below (95 % each), by the threshold between 4/8 and 4/9 fixed beforehand."""
    hits, false = (clopper_pearson(sum(value > 0.4714 for value in spreads(n)), runs, 0.95) for n in (8, 9))
    return max(0.0, math.log(max(hits.low - DELTA, 1e-12) / false.high))


def size_in_opacus(runs: int) -> Outcome:
    """All-zero data: only the size can show."""
    reported = []

    def spreads(n: int) -> list[float]:
        found = []
        for _ in range(runs):
            model = nn.Linear(1000, 1, bias=False)
            data = (torch.zeros(n, 1000), torch.zeros(n, 1))
            run = Opaque(model, data, noise_multiplier=4.0, criterion=nn.MSELoss())
            run.optimizer.param_groups[0]["lr"] = 1.0
            before = model.weight.detach().clone()
            run.step(*next(iter(run.private_loader)))
            found.append(float((model.weight - before).std()))
            if not reported:
                reported.append(run.epsilon())
        return found

    bound = lower_bound(spreads, runs)
    return Outcome(
        True, f"epsilon {reported[0]:.3f} printed, at least {bound:.2f} shown by an attack in {2 * runs} runs"
    )


def size_in_ours(runs: int) -> Outcome:
    """The same attack."""

    def spreads(n: int) -> list[float]:
        found = []
        for _ in range(runs):
            model = nn.Linear(1000, 1, bias=False)
            data = (torch.zeros(n, 1000), torch.zeros(n))
            run = make_private(
                model,
                torch.optim.SGD(model.parameters(), 1.0),
                data,
                lambda outputs, targets: (outputs[:, 0] - targets).square(),
                config(expected_batch_size=8, public_size=8, steps=1, noise_multiplier=4.0),
            )
            before = model.weight.detach().clone()
            turn(run, *next(iter(run.loader)))
            found.append(float((model.weight - before).std()))
            run.release()
        return found

    bound, told = lower_bound(spreads, runs), epsilon([(4.0, 1.0, 1)], DELTA)
    return Outcome(bound > told, f"epsilon {told:.3f} printed, the same attack shows {bound:.2f}")


def infinite_row(**options: Any) -> Outcome:
    """One example is infinite."""
    x, y = rows()
    x[3] = torch.inf
    model = net()
    run = Opaque(model, (x, y), batch=64, **options)
    run.step(x, y)
    broken = all(bool(torch.isnan(p).all()) for p in model.parameters())
    return Outcome(True, f"all weights NaN: {broken}; epsilon {run.epsilon():.2f} printed")


def infinite_row_ours(**changes: Any) -> Outcome:
    """The row is left out, and counted."""
    x, y = rows()
    x[3] = torch.inf
    model = net()
    run = private(model, (x, y), expected_batch_size=64, **changes)
    turn(run, *next(iter(run.loader)))
    finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
    return Outcome(not finite, f"cannot happen: weights finite, {run.masked_rows} row masked")


def original_loader() -> Outcome:
    """Shuffled batches under Poisson's epsilon."""
    run = Opaque(net(), DataLoader(TensorDataset(*rows()), 16, shuffle=True))
    for x, y in run.loader:
        run.step(x, y)
    return Outcome(True, f"epsilon {run.epsilon():.2f} printed for Poisson batches that were never drawn")


def whole_set() -> Outcome:
    """All rows in each step under the rate of a quarter."""
    run = Opaque(net())
    for _ in range(4):
        run.step(*rows())
    true = epsilon([(1.0, 1.0, 4)], DELTA)
    return Outcome(True, f"epsilon {run.epsilon():.2f} printed, {true:.2f} spent")


def without_poisson() -> Outcome:
    """poisson_sampling=False."""
    run = Opaque(net(), poisson_sampling=False)
    for x, y in run.private_loader:
        run.step(x, y)
    return Outcome(True, f"epsilon {run.epsilon():.2f} printed, that of Poisson batches")


def over_budget() -> Outcome:
    """Five epochs on the budget of one."""
    from opacus import PrivacyEngine

    model, engine = net(), PrivacyEngine()
    loader = DataLoader(TensorDataset(*rows(640)), 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model_, optimizer_, loader_ = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        target_epsilon=1.0,
        target_delta=DELTA,
        epochs=1,
        max_grad_norm=1.0,
    )
    for _ in range(5):
        for x, y in loader_:
            optimizer_.zero_grad()
            nn.functional.cross_entropy(model_(x), y).backward()
            optimizer_.step()
    return Outcome(True, f"target 1.0, spent {float(engine.get_epsilon(DELTA)):.2f} without a word")


def over_budget_ours() -> Outcome:
    """The step after the last."""
    run = private(steps=2)

    def beyond() -> None:
        for _ in range(2):
            for x, y in run.loader:
                turn(run, x, y)

    return refusal(beyond)


def weighted_sampler() -> Outcome:
    """64 of 1,000 rows by weight."""
    x, y = rows(1000)
    sampler = WeightedRandomSampler(torch.rand(1000).tolist(), 64)
    run = Opaque(net(), DataLoader(TensorDataset(x, y), 16, sampler=sampler))
    sizes = [len(batch) for batch, _ in run.private_loader]
    return Outcome(
        True, f"the sampler is dropped: batches of {sum(sizes) / len(sizes):.0f} rows where 16 were asked for"
    )


def leave_in_mid_batch(run: Opaque) -> None:
    """Break out of Opacus's memory manager after three of eight pieces."""
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    with BatchMemoryManager(
        data_loader=run.private_loader, max_physical_batch_size=4, optimizer=run.optimizer
    ) as loader:
        for index, (x, y) in enumerate(loader):
            run.step(x, y)
            if index == 2:
                break


def memory_manager_break() -> Outcome:
    """A loop left in the middle of a logical batch."""
    run = Opaque(net(), batch=32)
    leave_in_mid_batch(run)
    run.optimizer.zero_grad()
    left = [p.summed_grad for p in run.optimizer.params if getattr(p, "summed_grad", None) is not None]
    return Outcome(True, f"{len(left)} partial sums survive zero_grad and join the next batch")


def memory_manager_workers() -> Outcome:
    """The same with a worker that reads ahead."""
    run = Opaque(net(), DataLoader(TensorDataset(*rows()), 32, num_workers=1))
    leave_in_mid_batch(run)
    return Outcome(
        True, f"{len(run.optimizer._step_skip_queue)} marks of the old batch shift the borders of the next one"
    )


def broken_loop() -> Outcome:
    """Ours: a batch that is left without a step."""
    run = private(insecure_seed=1, insecure_no_noise=True)
    x, y = next(iter(run.loader))
    run.loss(run.model(x), y).backward()
    error = refusal(lambda: turn_without_zero(run))
    return Outcome(error.accepted, f"{error.proof}; {run.steps_taken} steps charged")


def turn_without_zero(run: Any) -> None:
    """The next batch without zero_grad: the old gradient would add up."""
    x, y = next(iter(run.loader))
    run.loss(run.model(x), y).backward()
    run.optimizer.step()


def microbatches() -> Outcome:
    """Ours: small pieces change nothing but memory."""
    torch.manual_seed(0)
    model, found = net(), []
    for microbatch in (None, 4):
        run = private(model, microbatch=microbatch, insecure_seed=1, insecure_no_noise=True)
        x, y = next(iter(run.loader))
        run.loss(run.model(x), y).backward()
        found.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))
        run.optimizer.zero_grad()
        run.release()
    apart = float((found[0] - found[1]).abs().max())
    return Outcome(apart > 1e-6, f"cannot happen: the gradient with and without microbatch differs by {apart:.0e}")


def same_noise(gradients: Callable[[], Tensor]) -> tuple[bool, float]:
    """Whether the global seed brings the same noise again."""
    torch.manual_seed(7)
    first = gradients()
    torch.manual_seed(7)
    second = gradients()
    return bool(torch.equal(first, second)), float((first - second).abs().max())


def seeded_noise() -> Outcome:
    """Whoever knows the global seed subtracts the noise."""
    model = net()
    start = [p.detach().clone() for p in model.parameters()]
    run = Opaque(model)

    def gradients() -> Tensor:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), start, strict=True):
                parameter.copy_(value)
        run.step(*rows(8))
        return torch.cat([p.grad.flatten().clone() for p in model.parameters()])

    return Outcome(True, f"the same seed gives the same noise: {same_noise(gradients)[0]}")


def seeded_noise_ours() -> Outcome:
    """Noise knows no global seed."""
    model = net()

    def gradients() -> Tensor:
        run = private(model, expected_batch_size=64)
        turn(run, *next(iter(run.loader)))
        run.release()
        return torch.cat([p.grad.flatten().clone() for p in model.parameters()])

    same, apart = same_noise(gradients)
    return Outcome(same, f"cannot happen: with the same seed the noise differs by {apart:.2f}")


def scaled_loss() -> Outcome:
    """Gradients are clipped after a factor of 65,536."""
    model = net()
    run = Opaque(model, noise_multiplier=0.0)
    x, y = rows(16)
    lengths = []
    for scale in (1.0, 2.0**16):
        run.optimizer.zero_grad()
        (nn.functional.cross_entropy(run.model(x), y) * scale).backward()
        samples = torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], dim=1)
        lengths.append(float(samples.norm(dim=1).median()))
    return Outcome(True, f"lengths {lengths[0]:.2f} become {lengths[1]:.0f} before they are clipped to 1")


class Harmful:
    """Writes a marker when it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.marker,)


@contextmanager
def marked_checkpoint() -> Iterator[tuple[Path, Path]]:
    """A checkpoint that runs code, and the marker that tells whether it did."""
    with tempfile.TemporaryDirectory() as folder:
        marker, path = Path(folder) / "marker", Path(folder) / "checkpoint"
        torch.save({"module_state_dict": Harmful(str(marker))}, path)
        yield path, marker


def harmful_checkpoint() -> Outcome:
    """load_checkpoint unpickles whatever is there."""
    run = Opaque(net())
    with marked_checkpoint() as (path, marker):
        with suppress(Exception):  # the code of the file has run by then
            run.engine.load_checkpoint(path=str(path), module=run.model)
        return Outcome(marker.exists(), f"code of the file ran: {marker.exists()}")


def harmful_checkpoint_ours() -> Outcome:
    """Resume reads tensors and numbers."""
    with marked_checkpoint() as (path, marker):
        found = refusal(lambda: private().resume(path))
        said = found.proof.replace(f"{path.parent}/", "")[:120]
        return Outcome(found.accepted or marker.exists(), f"{said}; code of the file ran: {marker.exists()}")


def foreign_batch(n: int) -> Outcome:
    """Rows that our loader did not draw."""
    run = private()
    iter(run.loader).__next__()
    return refusal(lambda: turn(run, *rows(n, seed=5)))


def set_ups(runs: int) -> list[SetUp]:
    """All eighteen."""
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 50.0]))
    ignoring = nn.CrossEntropyLoss(ignore_index=1)
    loader = DataLoader(TensorDataset(*rows()), 16, shuffle=True)
    sampled = DataLoader(TensorDataset(*rows()), 16, sampler=WeightedRandomSampler([1.0] * 64, 64))
    plain = nn.CrossEntropyLoss()
    return [
        SetUp("size of the data set in scale and rate", lambda: size_in_opacus(runs), lambda: size_in_ours(runs)),
        SetUp(
            "batch norm without parameters",
            lambda: coupling(lambda: nn.BatchNorm1d(16, affine=False), plain),
            lambda: refusal(lambda: private(net(nn.BatchNorm1d(16, affine=False)))),
        ),
        SetUp(
            "batch norm with frozen parameters",
            lambda: coupling(frozen_batch_norm, plain),
            lambda: refusal(lambda: private(net(frozen_batch_norm()))),
        ),
        SetUp(
            "a module that subtracts the batch mean",
            lambda: coupling(MinusBatchMean, plain),
            lambda: refusal(lambda: private(net(MinusBatchMean()))),
        ),
        SetUp(
            "class weights with a mean",
            lambda: coupling(None, weighted, label=1 - int(rows(8)[1][7])),
            lambda: refusal(lambda: private(loss=weighted)),
        ),
        SetUp(
            "ignored labels with a mean",
            lambda: coupling(None, ignoring, label=0),
            lambda: refusal(lambda: private(loss=ignoring)),
        ),
        SetUp("an infinite row, hooks", infinite_row, infinite_row_ours),
        SetUp(
            "an infinite row, ghost",
            lambda: infinite_row(grad_sample_mode="ghost"),
            lambda: infinite_row_ours(microbatch=8),
        ),
        SetUp("the original shuffled loader", original_loader, lambda: refusal(lambda: private(data=loader))),
        SetUp("the whole set in each step", whole_set, lambda: foreign_batch(64)),
        SetUp("batches that are not Poisson", without_poisson, lambda: refusal(lambda: config(sampling="shuffled"))),
        SetUp("more steps than the budget", over_budget, over_budget_ours),
        SetUp("a weighted sampler", weighted_sampler, lambda: refusal(lambda: private(data=sampled))),
        SetUp("a loop left in mid-batch", memory_manager_break, broken_loop),
        SetUp("micro-batches with workers", memory_manager_workers, microbatches),
        SetUp("noise from the global seed", seeded_noise, seeded_noise_ours),
        SetUp(
            "a scaled loss (GradScaler)",
            scaled_loss,
            lambda: refusal(scaled_ours),
        ),
        SetUp("a harmful checkpoint", harmful_checkpoint, harmful_checkpoint_ours),
    ]


def scaled_ours() -> None:
    """A factor on the loss, as GradScaler has it."""
    run = private()
    x, y = next(iter(run.loader))
    (run.loss(run.model(x), y) * 2.0**16).backward()


def tried(attempt: Callable[[], Outcome]) -> Outcome:
    """An error of Opacus's counts as a refusal."""
    try:
        return attempt()
    except Exception as error:
        return Outcome(False, f"refused: {type(error).__name__}: {error}"[:160])


def main() -> None:
    """Run all, print the table, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=150, help="of the size attack, on each side")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    table = []
    for each in set_ups(options.runs):
        theirs, ours = tried(each.opacus), each.ours()
        table.append({"set_up": each.name, "opacus": theirs._asdict(), "aidefend": ours._asdict()})
        print(f"{each.name}\n  Opacus   {'ACCEPTED' if theirs.accepted else 'refused '}  {theirs.proof}")
        print(f"  aidefend {'ACCEPTED' if ours.accepted else 'safe    '}  {ours.proof}", flush=True)
    refused = {peer: sum(not row[peer]["accepted"] for row in table) for peer in ("opacus", "aidefend")}
    met = refused["aidefend"] == len(table)
    summary = [
        f"{'met   ' if met else 'MISSED'} unsafe set-ups refused: Opacus {refused['opacus']} of {len(table)}, "
        f"aidefend {refused['aidefend']} of {len(table)}"
    ]
    write_result("privacy_setups", {"set_ups": table, "summary": summary}, seeds=range(1))
    print(*summary, sep="\n")


if __name__ == "__main__":
    main()
