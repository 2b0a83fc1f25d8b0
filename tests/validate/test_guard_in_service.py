"""A guard under concurrency: asyncio, threads of several principals, DDP, compiled and half-precision parts."""

import asyncio
import threading

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from aidefend.monitor import AuditLog, Bucket, DriftMonitor, QueryBudget
from aidefend.validate import Energy, Guard, InputSpec, KeyedNoise, NearestNeighbours
from tests.validate.small_world import Recorder, model, rows, strange

FIT, CALIBRATION, TEST = rows(200, 1), rows(300, 2), rows(80, 3)[0]
DETECTORS = [Energy(), NearestNeighbours(k=5)]


def guard_of(network=None, **options):
    options = {"detectors": DETECTORS, "alpha": 0.05, "fit": FIT, **options}
    return Guard.calibrate(model() if network is None else network, CALIBRATION, **options)


def same(a, b):
    return torch.equal(a.accepted, b.accepted) and torch.equal(a.outputs.nan_to_num(), b.outputs.nan_to_num())


def test_tasks_of_an_event_loop_get_their_own_rows():
    guard = guard_of(output=KeyedNoise(bytes(16)))
    parts = TEST.split(5)
    expected = [guard(part) for part in parts]

    async def ask(part):
        await asyncio.sleep(0)
        return await asyncio.to_thread(guard, part)

    async def everybody():
        return await asyncio.gather(*(ask(part) for _ in range(3) for part in parts))

    found = asyncio.run(everybody())
    assert len(found) == 48 and all(same(one, expected[i % 16]) for i, one in enumerate(found))
    assert guard._capture._passes == {}


def test_principals_share_nothing_but_the_model(tmp_path):
    """Each thread is a principal; books, events and answers of each are those of its own calls."""
    budget = QueryBudget(tmp_path / "budget.sqlite", Bucket(1000.0), overrides={"team-0": Bucket(6.0)})
    log = AuditLog(tmp_path / "log.jsonl", b"0123456789abcdef")
    guard = guard_of(budget=budget, log=log)
    batches = {f"team-{i}": torch.cat([rows(2, 40 + i)[0], strange(1)]) for i in range(4)}
    expected = {name: guard_of()(x) for name, x in batches.items()}
    wrong, start = [], threading.Barrier(4)

    def work(name):
        start.wait()
        for turn in range(6):
            decision = guard(batches[name], principal=name)
            spent = name == "team-0" and turn >= 2
            fits = not decision.accepted.any() if spent else same(decision, expected[name])
            if not fits or spent != (decision.reasons[0] == ("budget: exceeded",)):
                wrong.append((name, turn))

    threads = [threading.Thread(target=work, args=(name,)) for name in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and log.verify(key=b"0123456789abcdef").ok
    assert [budget.spent(name) for name in sorted(batches)] == [6.0, 18.0, 18.0, 18.0]


@pytest.fixture
def one_process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_replica_of_ddp_is_guarded_like_the_model_inside(one_process_group):
    replica = DistributedDataParallel(model())
    guard = guard_of(replica)
    assert guard.facts.layer == "2" and same(guard(TEST), guard_of()(TEST))
    guard.close()
    assert not any(module._forward_pre_hooks for module in replica.modules())


def test_everything_at_once_under_inference_mode_around_a_compiled_half_precision_model(tmp_path):
    torch.compiler.reset()
    network = model().bfloat16()
    recorder = Recorder()
    options = {"output": KeyedNoise(bytes(16)), "log": recorder, "promise": "class-conditional", "alpha": 0.1}
    guard = Guard.calibrate(
        torch.compile(network, backend="eager"),
        CALIBRATION[0].bfloat16(),
        InputSpec((6,), torch.bfloat16, -30.0, 30.0),
        DETECTORS,
        fit=FIT[0].bfloat16(),
        **options,
    )
    guard.follow(DriftMonitor(calibration_n=guard.calibration.n))
    x = torch.cat([TEST, strange(3)]).bfloat16()
    with torch.inference_mode():
        inside = guard(x.clone(), principal="team-a")
    outside = guard(x, principal="team-a")
    assert (
        same(inside, outside)
        and not outside.reasons[0]
        and outside.accepted[:80].double().mean() > 0.7
        and not outside.accepted[80:].any()
    )
    assert [event["rows"] for event in recorder.events] == [83, 83]
    torch.compiler.reset()


@pytest.mark.parametrize("make", ["calibrate", "load", "recalibrate"])
def test_a_guard_that_was_made_in_inference_mode_can_be_attacked_and_moved(make, tmp_path):
    """Planted violation: its arrays were tensors of that mode, which no gradient may pass."""
    before = guard_of()
    before.save(tmp_path / "guard")
    network = model()
    with torch.inference_mode():
        if make == "calibrate":
            guard = guard_of(network)
        elif make == "load":
            guard = Guard.load(tmp_path / "guard", network)
        else:
            guard = before
            guard.recalibrate(rows(300, 9), reason="a new day")
        assert guard(TEST).accepted.any()
    x = TEST[:4].clone().requires_grad_()
    guard.attackable()(x).square().sum().backward()
    assert bool((x.grad != 0).any(dim=1).all())
    guard.double()
    assert guard(TEST.double()[:2]).reasons[0] == ("input: wrong dtype",)
