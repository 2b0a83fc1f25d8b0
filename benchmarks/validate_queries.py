"""Query monitoring: attacks flagged before they succeed, against benign accounts that are flagged, and what it costs.

python -m benchmarks.validate_queries [--mnist mnist.npz] [--fashion fashion_mnist.npz] [--images 8] [--short]
A small CNN on each data set. Benign accounts (`benchmarks.query_traffic`) ask about half of the test images to
calibrate and about the other half to be counted; they include video, bursts of a still camera, retries, augmentation,
few classes. Attacks run on rows of the second half that the model knows, one account an attack, until their first
success (a wrong answer inside the threat) or their last query; thresholds never see them. "before" is the share of
attacks that are flagged before they succeed, or flagged at all if they do not; "survive" is the share that succeeds
unflagged. Attackers who know the monitor (its radii, in the units of x, and how many queries an account may ask) stand
beside. Writes benchmarks/results/validate_queries.json.
"""

import argparse
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
from benchmarks.query_attackers import Boundary, record
from benchmarks.query_attackers_adaptive import WideHopSkipJump, WideNES, WideSquare, interleaved, shifted
from benchmarks.query_baseline import Blacklight
from benchmarks.query_traffic import KINDS, population
from benchmarks.record import earlier, write_result

ALPHA, MOST, LOOKED = 0.01, 400, 100
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


def run_data(
    result: dict[str, Any], name: str, path: str, images_count: int, accounts: int, seed: int, short: bool
) -> None:
    """Everything about one data set, into `result`; `short` leaves out disguises and easy traffic."""
    x, y, tx, ty = images(path)
    model = trained(x, y, seed)
    half = len(tx) // 2
    days = population(tx[:half], ty[:half], accounts, seed)
    streams = [(queries, model(queries)) for _, queries in days]
    folder = tempfile.mkdtemp()
    QueryMonitor.calibrate(streams, MemoryStore(), alpha=ALPHA, seed=seed, key=KEY).save(f"{folder}/rules")
    easy = (
        []
        if short
        else [stream for (kind, _), stream in zip(days, streams, strict=True) if kind not in ("video", "still camera")]
    )
    if not short:
        QueryMonitor.calibrate(easy, MemoryStore(), alpha=ALPHA, seed=seed, key=KEY).save(f"{folder}/easy")

    def fresh(rules: str = "rules", clock: Callable[[], float] = lambda: 1.0) -> QueryMonitor:
        return QueryMonitor.load(f"{folder}/{rules}", MemoryStore(), clock=clock)

    result["accuracy"] = float((model(tx).argmax(dim=1) == ty).float().mean())
    print(f"{name}: accuracy {result['accuracy']:.3f}", flush=True)
    others = population(tx[half:], ty[half:], accounts * 3 // 4, seed + 1)
    result["benign"] = {
        rules: benign_shares(name, rules, fresh(rules), others, model)
        for rules in ("rules", "easy")[: 1 if short else 2]
    }
    known = (model(tx[half:]).argmax(dim=1) == ty[half:]).nonzero().flatten()[:images_count] + half
    victims, truth = tx[known], ty[known]
    monitor = fresh()
    radius = float(monitor._rules.norms.radii[1] * monitor._rules.sketcher.unit * monitor._rules.sketcher.scale[0])
    result["radius_in_x"] = radius
    plain = {arm: sequences(attack, model, victims, truth, seed) for arm, attack in plain_attacks(*EPS[name]).items()}
    arms: dict[str, list[Sequence]] = dict(plain)
    for arm, attack in adaptive_attacks(*EPS[name], radius).items():
        arms[arm] = sequences(attack, model, victims, truth, seed)
    for arm in () if short else ("square", "hopskipjump"):
        attack = plain_attacks(*EPS[name])[arm]
        arms[f"{arm}, shifted"] = shifted_sequences(attack, model, victims, truth, seed)
    result["arms"] = {
        arm: show(name, arm, summary((one, flag_at(fresh(), one[0], model, lambda i: "eve")[0]) for one in found))
        for arm, found in arms.items()
    }
    if short:
        result["blacklight"] = blacklight(name, days[:40], others[:40], arms)
        return
    result["easy"] = {
        arm: show(
            name,
            f"{arm}, easy traffic",
            summary((one, flag_at(fresh("easy"), one[0], model, lambda i: "eve")[0]) for one in found),
        )
        for arm, found in plain.items()
    }
    result["disguised"] = disguises(name, plain, model, tx[half:], fresh)
    result["blacklight"] = blacklight(name, days[:40], others[:40], arms)
    if name == "mnist":
        result["extraction"] = extraction(model, tx[half:], fresh, seed)


def benign_shares(
    name: str, rules: str, monitor: QueryMonitor, days: list[tuple[str, Tensor]], model: nn.Module
) -> Any:
    """Flagged benign accounts, in all and by kind, while all ask side by side in one store."""
    flagged = [monitor.watch(f"account-{i}", queries, model(queries)).flagged for i, (_, queries) in enumerate(days)]
    kinds = {kind: [f for f, (k, _) in zip(flagged, days, strict=True) if k == kind] for kind in KINDS}
    shares = {"all": wilson(sum(flagged), len(flagged)), **{k: [sum(v), len(v)] for k, v in kinds.items()}}
    print(f"{name}: benign accounts flagged, calibrated on {rules}: {shares}", flush=True)
    return shares


def disguises(
    name: str, plain: dict[str, list[Sequence]], model: nn.Module, benign: Tensor, fresh: Callable[..., QueryMonitor]
) -> dict[str, Any]:
    """The same queries from many accounts, among benign ones, or slowly."""
    found: dict[str, Any] = {}
    for arm in ("square", "hopskipjump"):
        lines: dict[str, list[tuple[Sequence, int]]] = {}
        for number, one in enumerate(plain[arm][:6]):
            for each in (2, 10, 30):
                at, _ = flag_at(fresh(), one[0], model, lambda i, each=each: f"eve-{i // each}")
                lines.setdefault(f"{arm}, new account every {each}", []).append((one, at))
            mixed = interleaved(one[0][:200], benign[number * 37 :], 9)
            at, _ = flag_at(fresh(), mixed, model, lambda i: "eve")
            lines.setdefault(f"{arm}, 9 benign between", []).append((one, -(-at // 10)))
            for a_day in (10, 50):
                now = [1e9]
                monitor = fresh(clock=lambda now=now: now[0])
                at = 0
                for i in range(min(len(one[0]), 300)):
                    now[0] += 86_400 / a_day
                    if monitor.watch("eve", one[0][i : i + 1], model(one[0][i : i + 1])).remark:
                        at = i + 1
                        break
                lines.setdefault(f"{arm}, {a_day} queries a life", []).append((one, at))
        found |= {label: show(name, label, summary(rows)) for label, rows in lines.items()}
    return found


def blacklight(
    name: str, days: list[tuple[str, Tensor]], others: list[tuple[str, Tensor]], arms: dict[str, list[Sequence]]
) -> dict[str, Any]:
    """The baseline, as published (the first hit counts) and with a number of hits read off the same benign accounts."""
    store = Blacklight(784, 0)
    peaks = sorted((store.hits(queries)[-1] for _, queries in days[:100]), reverse=True)
    allowed = peaks[int(ALPHA * (len(peaks) + 1)) - 1]
    store = Blacklight(784, 1)
    benign = [store.hits(queries)[-1] for _, queries in others]
    found: dict[str, Any] = {
        "allowed_hits": allowed,
        "benign_first_hit": wilson(sum(peak > 0 for peak in benign), len(benign)),
        "benign_allowed": wilson(sum(peak > allowed for peak in benign), len(benign)),
    }
    print(f"{name}: blacklight: {found}", flush=True)
    for arm, known in arms.items():
        hits = [Blacklight(784, 2).hits(queries[:LOOKED]) for queries, _ in known]
        for label, least in (("first hit", 0), ("calibrated", allowed)):
            at = [next((i + 1 for i, hit in enumerate(own) if hit > least), 0) for own in hits]
            line = summary(zip(known, at, strict=True))
            found[f"{label}: {arm}"] = show(name, f"blacklight, {label}: {arm}", line)
    return found


def extraction(model: nn.Module, natural: Tensor, fresh: Callable[..., QueryMonitor], seed: int) -> dict[str, Any]:
    """Copies of the model: at which query the account is flagged, and what the copy is worth then and later."""
    stream = torch.Generator().manual_seed(seed)
    half = natural[:2500]
    pools = {
        "digits of its own": half,
        "mixtures of 20 digits": torch.lerp(
            half[torch.randint(20, (2500,), generator=stream)],
            half[torch.randint(20, (2500,), generator=stream)],
            torch.rand(2500, 1, 1, 1, generator=stream),
        ),
        "noise": torch.rand(2500, 1, 28, 28, generator=stream),
    }
    found: dict[str, Any] = {}
    for label, pool in pools.items():
        asked: list[Tensor] = []

        def victim(x: Tensor, asked: list[Tensor] = asked) -> Tensor:
            asked.append(x)
            return model(x)

        attack = Extraction(lambda seed: network(), queries=2000, epochs=10)
        copy = attack(victim, pool, seed=seed)
        queries = torch.cat(asked)[-2000:] if sum(map(len, asked)) > 2000 else torch.cat(asked)
        at, _ = flag_at(fresh(), queries, model, lambda i: "eve")
        line: dict[str, Any] = {"flag_query": at, "agreement_at_2000": copy.agreement(model, natural[2500:])}
        if at:
            early = Extraction(lambda seed: network(), queries=at, epochs=10)(model, pool, seed=seed)
            line["agreement_at_flag"] = early.agreement(model, natural[2500:])
        found[label] = line
        print(f"mnist: extraction, {label}: {line}", flush=True)
    return found


def main() -> None:
    """Print a line for each arm and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist")
    parser.add_argument("--fashion")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--accounts", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = {"alpha": ALPHA, "most_queries": MOST}
    result: dict[str, Any] = settings | earlier("validate_queries", settings)
    for name, path in (("mnist", arguments.mnist), ("fashion_mnist", arguments.fashion)):
        if path is None:
            continue
        result[name] = {"eps": EPS[name], "accounts": arguments.accounts, "images": arguments.images}
        try:
            run_data(result[name], name, path, arguments.images, arguments.accounts, arguments.seed, arguments.short)
        finally:  # what was measured is kept
            write_result("validate_queries", result, seeds=[arguments.seed])


if __name__ == "__main__":
    main()
