"""Query monitoring: attacks flagged before they succeed, against benign accounts that are flagged, and what it costs.

python -m benchmarks.validate_queries [--mnist mnist.npz] [--fashion fashion_mnist.npz] [--images 20] [--strict]
A small CNN on each data set. Benign accounts (`benchmarks.query_traffic`) ask about half of the test images to
calibrate and about the other half to be counted; they include video, bursts of a still camera, retries, augmentation,
few classes. 1,000 are counted, in stores of as many accounts as set the threshold, and again in one store of all.
Attacks run on rows of the second half that the model knows, one account an attack, until their first success (a wrong
answer inside the threat) or their last query; thresholds never see them. "before" is the share of attacks that are
flagged before they succeed, or flagged (or stalled) at all if they do not; "survive" is the share that succeeds
unflagged. Attackers who know the monitor stand beside: steps as wide as its radius, widths found with an oracle
(`query_attackers_oars`), random shifts, copies of the model, and Blacklight against the same sequences (quick and slow
attacks: `benchmarks.validate_queries_time`). The threshold keeps
to alpha on average over calibrations, or, with --strict, for this very calibration with 95 % confidence. Writes
benchmarks/results/validate_queries.json after each row; a run with the same settings goes on where the last one ended.
"""

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from aidefend import Threat
from aidefend._core.stats import wilson
from aidefend.attacks import NES, Extraction, HopSkipJump, Square
from aidefend.validate import MemoryStore, QueryMonitor
from benchmarks.query_attackers import Boundary, jacobian_augmented, record
from benchmarks.query_attackers_adaptive import WideHopSkipJump, WideNES, WideSquare, shifted
from benchmarks.query_attackers_oars import OARS
from benchmarks.query_baseline import Blacklight
from benchmarks.query_traffic import KINDS, population
from benchmarks.record import earlier, write_result

ALPHA, MOST, LOOKED = 0.01, 1000, 100
COUNTED, STOLEN, THIEVES = 1000, 2000, 3
SHIFTED = ", shifted"
EPS = {"mnist": (0.1, 2.0), "fashion_mnist": (0.05, 1.0)}
KEY = b"a key for reproducible figures.."
Sequence = tuple[Tensor, bool]


def network() -> nn.Sequential:
    """A CNN of 0.1 M weights."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def trained(x: Tensor, y: Tensor, seed: int) -> nn.Sequential:
    """One pass over 40,000 rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for rows in torch.randperm(len(x))[:40_000].split(128):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def images(path: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (N, 1, 28, 28) in [0, 1], with labels."""
    with np.load(path) as arrays:
        x, tx = (torch.from_numpy(arrays[name])[:, None].float() / 255 for name in ("train_x", "test_x"))
        return x, torch.from_numpy(arrays["train_y"]).long(), tx, torch.from_numpy(arrays["test_y"]).long()


def flag_at(monitor: QueryMonitor, queries: Tensor, model: nn.Module, name: Callable[[int], str]) -> tuple[int, bool]:
    """At which query (from 1; 0 = never) an account is flagged, and whether it would be suspended for it."""
    outputs = model(queries)
    for i in range(len(queries)):
        standing = monitor.watch(name(i), queries[i : i + 1], outputs[i : i + 1])
        if standing.remark:
            return i + 1, "by others" not in standing.remark
    return 0, False


def plain_attacks(linf: float, l2: float) -> dict[str, tuple[Threat, Callable[..., object]]]:
    """The four published attacks, as the package has them, and the boundary walk of `query_attackers`."""
    ball, round_ball, free = Threat("linf", linf), Threat("l2", l2), Threat("l2", 1e3)
    square = Square(ball, 5000)
    nes = NES(ball, steps=100, pairs=20, sigma=0.01, step_size=linf / 10)
    hop = HopSkipJump(free, steps=20)
    return {
        "square": (ball, lambda m, x, y, g: square.run(m, x, y, generator=g)),
        "nes": (ball, lambda m, x, y, g: nes.run(m, x, y, generator=g)),
        "hopskipjump": (round_ball, lambda m, x, y, g: hop.run(m, x, y, generator=g)),
        "boundary": (round_ball, Boundary(MOST)),
    }


def adaptive_attacks(linf: float, l2: float, radius: float) -> dict[str, tuple[Threat, Callable[..., object]]]:
    """The same, with steps that keep queries `radius` (in x) apart where the threat leaves room for it."""
    ball, round_ball = Threat("linf", linf), Threat("l2", l2)
    share = min(0.5, radius**2 / (4 * linf**2 * 784))
    return {
        "square, wide": (ball, WideSquare(linf, share)),
        "nes, wide": (ball, WideNES(linf, radius / (2 * 784) ** 0.5)),
        "hopskipjump, wide": (round_ball, WideHopSkipJump(radius / 2**0.5)),
        "boundary, wide": (round_ball, Boundary(MOST, sideways=0.5, inwards=0.3)),
    }


def sequences(
    attack: tuple[Threat, Callable[..., object]], model: nn.Module, x: Tensor, y: Tensor, seed: int
) -> list[Sequence]:
    """All queries of the attack on each row, and whether it succeeds."""
    threat, run = attack
    return [record(run, model, x[i : i + 1], y[i : i + 1], threat, MOST, seed + i) for i in range(len(x))]


def shifted_sequences(
    attack: tuple[Threat, Callable[..., object]], model: nn.Module, x: Tensor, y: Tensor, seed: int
) -> list[Sequence]:
    """The attack through random shifts: what arrives, and whether the answer was wrong for a point in the threat."""
    threat, run = attack
    found = []
    for i in range(len(x)):
        moved, submitted = shifted(model, torch.Generator().manual_seed(seed + i))
        queries, success = record(run, moved, x[i : i + 1], y[i : i + 1], threat, MOST, seed + i)
        found.append((torch.cat(submitted)[: len(queries)], success))
    return found


def summary(found: Iterable[tuple[Sequence, int]]) -> dict[str, Any]:
    """Shares with their counts: flagged before success, surviving, and the queries it took."""
    rows = [(len(queries), success, at) for (queries, success), at in found]
    before = [0 < at < n or (at > 0 and not success) for n, success, at in rows]
    survive = [success and not early for (_, success, _), early in zip(rows, before, strict=True)]
    flags, wins = [at for _, _, at in rows if at], [n for n, success, _ in rows if success]
    return {
        "attacks": len(rows),
        "before": wilson(sum(before), len(rows)),
        "survive": wilson(sum(survive), len(rows)),
        "flag_query": statistics.median(flags) if flags else None,
        "success_query": statistics.median(wins) if wins else None,
        "successes": len(wins),
        "successes_within_10": sum(n <= 10 for n in wins),
    }


def show(data: str, arm: str, line: dict[str, Any]) -> dict[str, Any]:
    """Print and hand on."""
    shares = ", ".join(
        f"{name} {line[name][0]:.3f} [{line[name][1]:.3f}, {line[name][2]:.3f}]" for name in ("before", "survive")
    )
    print(
        f"{data}: {arm}: {shares}; flagged at {line['flag_query']}, succeeds at {line['success_query']}"
        f" ({line['successes']} of {line['attacks']}, {line['successes_within_10']} within 10 queries)",
        flush=True,
    )
    return line


class Bench:
    """Everything about one data set; `row` keeps each figure at once and skips those that are there."""

    def __init__(self, settings: dict[str, Any], name: str, path: str, size: tuple[int, int], strict: bool) -> None:
        count, self.accounts = size
        self.settings, self.name, self.strict, self.seed = settings, name, strict, int(settings["seed"])
        seed = self.seed
        self.own: dict[str, Any] = earlier("validate_queries", settings).get(name, {})
        x, y, tx, ty = images(path)
        self.model = trained(x, y, seed)
        half = len(tx) // 2
        self.natural, self.folder = tx[half:], tempfile.mkdtemp()
        self.days = population(tx[:half], ty[:half], self.accounts, seed)
        self.others = population(tx[half:], ty[half:], COUNTED, seed + 1)
        known = (self.model(tx[half:]).argmax(dim=1) == ty[half:]).nonzero().flatten() + half
        self.victims, self.truth = tx[known[:count]], ty[known[:count]]
        self.spare, self.spare_truth = tx[known[count : 2 * count]], ty[known[count : 2 * count]]
        self._calibrate()
        self.row("accuracy", lambda: float((self.model(tx).argmax(dim=1) == ty).float().mean()))
        rules = self.fresh()._rules
        self.radius = float(rules.norms.radii[1] * rules.sketcher.unit * rules.sketcher.scale[0])
        self.row("radius_in_x", lambda: self.radius)
        self.row("size", lambda: {"eps": EPS[name], "accounts": self.accounts, "images": count})

    def _calibrate(self) -> None:
        streams = [(queries, self.model(queries)) for _, queries in self.days]
        promise = "calibration-conditional" if self.strict else "marginal"
        rules = QueryMonitor.calibrate(streams, MemoryStore(), alpha=ALPHA, promise=promise, seed=self.seed, key=KEY)
        rules.save(f"{self.folder}/rules")

    def fresh(self, store: MemoryStore | None = None, clock: Callable[[], float] = lambda: 1.0) -> QueryMonitor:
        """A monitor that has seen nothing."""
        return QueryMonitor.load(f"{self.folder}/rules", MemoryStore() if store is None else store, clock=clock)

    def row(self, key: str, make: Callable[[], Any]) -> None:
        """One figure, kept as soon as it is known, beside what other runs have kept meanwhile."""
        key += ", strict" * self.strict
        if key not in self.own:
            self.own[key] = make()
            result = self.settings | earlier("validate_queries", self.settings)
            result[self.name] = result.get(self.name, {}) | self.own
            write_result("validate_queries", result, seeds=[self.seed])

    def sequences(self, attacks: dict[str, tuple[Threat, Callable[..., object]]], arm: str) -> list[Sequence]:
        """The queries of an attack on all victims."""
        make = shifted_sequences if arm.endswith(SHIFTED) else sequences
        return make(attacks[arm.removesuffix(SHIFTED)], self.model, self.victims, self.truth, self.seed)

    def flags(self, label: str, found: list[Sequence], each: int = 10**9) -> dict[str, Any]:
        """At which query of each sequence an account is flagged."""
        rows = [(one, flag_at(self.fresh(), one[0], self.model, lambda i: f"eve-{i // each}")[0]) for one in found]
        return show(self.name, label, summary(rows))


def run_data(bench: Bench) -> None:
    """All rows, those of the issue's target first."""
    plain_of, wide_of = plain_attacks(*EPS[bench.name]), adaptive_attacks(*EPS[bench.name], bench.radius)
    found = functools.cache(lambda arm: bench.sequences(plain_of | wide_of, arm))
    for arm in plain_of:
        bench.row(arm, lambda arm=arm: bench.flags(arm, found(arm)))
    bench.row("benign", lambda: benign_shares(bench, COUNTED // 4))
    for arm in wide_of:
        bench.row(arm, lambda arm=arm: bench.flags(arm, found(arm)))
    for arm in wide_of:
        bench.row(f"{arm}: oars, accounts", lambda arm=arm: oars(bench, arm, wide_of[arm], bit=False))
        bench.row(f"{arm}: oars, flag bit", lambda arm=arm: oars(bench, arm, wide_of[arm], bit=True))
    for each in (30, 10, 2):
        for arm in plain_of:
            label = f"{arm}, new account every {each}"
            bench.row(label, lambda arm=arm, label=label, each=each: bench.flags(label, found(arm)[:8], each=each))
    for label, pool in pools(bench).items():
        bench.row(f"extraction, {label}", lambda label=label, pool=pool: extraction(bench, label, pool))
    for arm in (f"square{SHIFTED}", f"hopskipjump{SHIFTED}"):
        bench.row(arm, lambda arm=arm: bench.flags(arm, found(arm)))
    for arm in (*plain_of, *wide_of):
        bench.row(f"blacklight, {arm}", lambda arm=arm: blacklight(bench, arm, found(arm)[:8]))
    bench.row("benign, one store", lambda: benign_shares(bench, COUNTED))


def oars(bench: Bench, arm: str, attack: tuple[Threat, Callable[..., object]], bit: bool) -> dict[str, Any]:
    """How many adaptive attacks succeed unflagged, beside the same attack without a monitor."""
    threat, run = attack
    adaptive = OARS(run, threat, MOST)
    outcomes = []
    for i in range(len(bench.victims)):
        x, y, seed = bench.victims[i : i + 1], bench.truth[i : i + 1], bench.seed + i
        start = lambda store: bench.fresh(store=store)  # noqa: E731
        if bit:
            outcomes.append(adaptive.by_flag_bit(start, bench.model, x, y, seed))
        else:
            own = (bench.spare[i : i + 1], bench.spare_truth[i : i + 1])
            outcomes.append(adaptive.by_accounts(start, bench.model, x, y, own, seed))
    wins, stopped = sum(one.success for one in outcomes), sum(one.flagged or one.stalled for one in outcomes)
    lost = sum((one.flagged or one.stalled) and not one.success for one in outcomes)
    line = {
        "attacks": len(outcomes),
        "before": wilson(lost, len(outcomes)),
        "survive": wilson(wins, len(outcomes)),
        "flagged": sum(one.flagged for one in outcomes),
        "stalled": sum(one.stalled for one in outcomes),
        "queries": statistics.median(one.queries for one in outcomes),
        "width": statistics.median(one.stretch for one in outcomes),
        "accounts": outcomes[0].accounts,
    }
    print(f"{bench.name}: {arm}, oars {'flag bit' if bit else 'accounts'}: {line}, stopped {stopped}", flush=True)
    return line


def benign_shares(bench: Bench, together: int) -> dict[str, Any]:
    """Flagged benign accounts, in all and by kind; so many ask side by side in one store."""
    flagged: list[bool] = []
    for start in range(0, len(bench.others), together):
        monitor = bench.fresh()
        part = bench.others[start : start + together]
        flagged += [monitor.watch(f"account-{i}", x, bench.model(x)).flagged for i, (_, x) in enumerate(part)]
    kinds = {kind: [f for f, (k, _) in zip(flagged, bench.others, strict=True) if k == kind] for kind in KINDS}
    shares = {"all": wilson(sum(flagged), len(flagged)), **{k: [sum(v), len(v)] for k, v in kinds.items()}}
    print(f"{bench.name}: benign accounts flagged, {together} together: {shares}", flush=True)
    return shares


def blacklight(bench: Bench, arm: str, known: list[Sequence]) -> dict[str, Any]:
    """The baseline, as published (the first hit counts) and with a number of hits read off benign accounts."""
    hits = [Blacklight(784, 2).hits(queries[:LOOKED]) for queries, _ in known]
    found = {}
    for label, least in (("first hit", 0), ("calibrated", blacklight_benign(bench)["allowed_hits"])):
        at = [next((i + 1 for i, hit in enumerate(own) if hit > least), 0) for own in hits]
        found[label] = show(bench.name, f"blacklight, {label}: {arm}", summary(zip(known, at, strict=True)))
    return found


def blacklight_benign(bench: Bench) -> dict[str, Any]:
    """Benign accounts with any hit, and with more than their own kind had in calibration."""
    key = "blacklight, benign" + ", strict" * bench.strict
    if key in bench.own:
        known: dict[str, Any] = bench.own[key]
        return known
    store = Blacklight(784, 0)
    peaks = sorted((store.hits(queries)[-1] for _, queries in bench.days[:100]), reverse=True)
    allowed = peaks[int(ALPHA * (len(peaks) + 1)) - 1]
    store = Blacklight(784, 1)
    benign = [store.hits(queries)[-1] for _, queries in bench.others[:40]]
    found = {
        "allowed_hits": allowed,
        "benign_first_hit": wilson(sum(peak > 0 for peak in benign), len(benign)),
        "benign_allowed": wilson(sum(peak > allowed for peak in benign), len(benign)),
    }
    bench.row("blacklight, benign", lambda: found)
    print(f"{bench.name}: blacklight: {found}", flush=True)
    return found


def pools(bench: Bench) -> dict[str, Callable[[int], Tensor]]:
    """What a thief asks about, by the number of the thief."""
    half = bench.natural[:2500]

    def mixtures(seed: int) -> Tensor:
        stream = torch.Generator().manual_seed(seed)
        first, second = (half[20 * seed : 20 * seed + 20][torch.randint(20, (STOLEN,), generator=stream)] for _ in "ab")
        return torch.lerp(first, second, torch.rand(STOLEN, 1, 1, 1, generator=stream))

    def jacobian(seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = network()
        stream = torch.Generator().manual_seed(seed)
        return jacobian_augmented(bench.model, half[100 * seed : 100 * seed + 100], student, STOLEN, 0.1, stream)

    def natural(seed: int) -> Tensor:
        return half[torch.randperm(len(half), generator=torch.Generator().manual_seed(seed))[:STOLEN]]

    def noise(seed: int) -> Tensor:
        return torch.rand(STOLEN, 1, 28, 28, generator=torch.Generator().manual_seed(seed))

    return {
        "Jacobian augmentation": jacobian,
        "mixtures of 20 images": mixtures,
        "noise": noise,
        "natural images": natural,
    }


def extraction(bench: Bench, label: str, pool: Callable[[int], Tensor]) -> dict[str, Any]:
    """Copies of the model: at which query the account is flagged, and what the copy is worth then and later."""
    found: list[dict[str, Any]] = []
    for thief in range(THIEVES):
        queries = pool(thief)
        at, _ = flag_at(bench.fresh(), queries, bench.model, lambda i: "eve")
        worth = {"agreement_at_end": STOLEN, "agreement_at_flag": at} if at else {"agreement_at_end": STOLEN}
        line: dict[str, Any] = {"flag_query": at}
        for key, count in worth.items():
            attack = Extraction(lambda seed: network(), queries=count, epochs=10)
            copy = attack(bench.model, queries[:count], seed=thief)
            line[key] = copy.agreement(bench.model, bench.natural[2500:]).value
        found.append(line)
        print(f"{bench.name}: extraction, {label}: {line}", flush=True)
    return {"queries": STOLEN, "flagged": sum(line["flag_query"] > 0 for line in found), "thieves": found}


def main() -> None:
    """Print a line for each arm and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist")
    parser.add_argument("--fashion")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--accounts", type=int, default=450)
    parser.add_argument("--strict", action="store_true", help="at most alpha for this very calibration, not on average")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings: dict[str, Any] = {"alpha": ALPHA, "most_queries": MOST, "counted": COUNTED, "seed": arguments.seed}
    for name, path in (("mnist", arguments.mnist), ("fashion_mnist", arguments.fashion)):
        if path is not None:
            run_data(Bench(settings, name, path, (arguments.images, arguments.accounts), arguments.strict))


if __name__ == "__main__":
    main()
