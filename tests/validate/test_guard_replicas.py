"""A guard around replicas of data parallelism and compiled models: the same verdicts, and one file for all of them."""

import datetime

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from aidefend import ConfigurationError
from aidefend.validate import Energy, Guard, InputSpec, NearestNeighbours
from aidefend.validate.model_identity import identify, plain_modules, unwrapped
from tests.validate.small_world import model, rows, strange

FIT, CALIBRATION = rows(200, 1), rows(300, 2)
TEST = torch.cat([rows(40, 3)[0], strange(3)])
SPEC = InputSpec((6,), low=-30.0, high=30.0)


def with_buffers():
    """The small classifier behind a BatchNorm, whose buffers DDP would share in every pass."""
    return nn.Sequential(nn.BatchNorm1d(6), *model()).eval()


def guard_of(network):
    return Guard.calibrate(network, CALIBRATION, SPEC, [Energy(), NearestNeighbours(k=5)], 0.05, FIT)


def same(a, b):
    return (
        torch.equal(a.accepted, b.accepted)
        and a.reasons == b.reasons
        and all(torch.equal(a.p_values[name], b.p_values[name]) for name in a.p_values)
        and torch.equal(a.outputs.nan_to_num(), b.outputs.nan_to_num())
    )


@pytest.fixture
def alone(tmp_path):
    """A process group of this process only."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch.distributed.destroy_process_group()


def half_compiled(network):
    """Only the first three layers are compiled: the wrapper is in the middle of the names."""
    return nn.Sequential(torch.compile(network[:3], backend="eager"), *network[3:])


def half_bare(network):
    return nn.Sequential(network[:3], *network[3:])


WRAPPED = {
    "replica": DistributedDataParallel,
    "data parallel": DataParallel,
    "compiled": lambda network: torch.compile(network, backend="eager"),
    "replica of a compiled model": lambda network: DistributedDataParallel(torch.compile(network, backend="eager")),
    "compiled replica": lambda network: torch.compile(DistributedDataParallel(network), backend="eager"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_one_file_serves_the_bare_model_and_the_wrapped_one(name, alone, tmp_path):
    bare, wrapped = guard_of(with_buffers()), guard_of(WRAPPED[name](with_buffers()))
    expected = bare(TEST)
    assert bare.facts == wrapped.facts and bare.facts.layer == "3" and same(wrapped(TEST), expected)
    assert expected.accepted[:40].any() and not expected.accepted[40:].any()
    bare.save(tmp_path / "bare")
    wrapped.save(tmp_path / "wrapped")
    for guard in (bare, wrapped):
        guard.close()
    torch.compiler.reset()
    network = WRAPPED[name](with_buffers())
    with Guard.load(tmp_path / "bare", network) as again:
        assert same(again(TEST), expected)
    assert not any(module._forward_pre_hooks for module in network.modules())
    with Guard.load(tmp_path / "wrapped", with_buffers()) as again:
        assert same(again(TEST), expected)
    other = with_buffers()
    with torch.no_grad():
        other[1].weight[0, 0] += 1e-3
    torch.compiler.reset()
    with pytest.raises(ConfigurationError, match="weights that the guard was calibrated for"):
        Guard.load(tmp_path / "wrapped", WRAPPED[name](other))


def test_a_wrapper_in_the_middle_changes_neither_names_nor_identity(alone, tmp_path):
    compiled, bare = half_compiled(with_buffers()), half_bare(with_buffers())
    assert list(plain_modules(compiled)) == list(plain_modules(bare)) == ["", "0", "0.0", "0.1", "0.2", "1"]
    assert identify(compiled) == identify(bare) and unwrapped(compiled) is compiled
    guard_of(compiled).save(tmp_path / "guard")
    assert same(Guard.load(tmp_path / "guard", bare)(TEST), guard_of(half_bare(with_buffers()))(TEST))
    torch.compiler.reset()
    layers = [Guard.calibrate(net, CALIBRATION, SPEC, layer="0.1", fit=FIT, alpha=0.05) for net in (compiled, bare)]
    assert layers[0].facts == layers[1].facts and layers[0].facts.layer == "0.1"


def test_a_name_that_only_looks_like_a_wrapper_is_kept():
    """Planted violation: text that is cut out of names would make two different models equal."""

    class Holder(nn.Module):
        def __init__(self, attribute):
            super().__init__()
            self.add_module(attribute, model())

    holders = [Holder(name) for name in ("module", "body")]
    assert list(plain_modules(holders[0]))[1:3] == ["module", "module.0"]
    assert identify(holders[0])["structure"] != identify(holders[1])["structure"]


def _serve(rank, folder):
    """One of two processes: ranks get different numbers of requests, as in service."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    limit = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    replica = DistributedDataParallel(with_buffers())
    calibrated, loaded = guard_of(replica), Guard.load(f"{folder}/bare", replica)
    found = [guard(TEST) for guard in (calibrated, loaded) for _ in range(1 + 3 * rank)]
    rows_of = [(one.accepted, one.outputs, dict(one.p_values), list(one.reasons)) for one in found]
    torch.save(rows_of, f"{folder}/found-{rank}")
    if rank:
        calibrated.save(f"{folder}/replica")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_decide_like_one(tmp_path):
    guard = guard_of(with_buffers())
    guard.save(tmp_path / "bare")
    torch.multiprocessing.spawn(_serve, args=(str(tmp_path),), nprocs=2)
    expected = guard(TEST)
    for rank, calls in ((0, 2), (1, 8)):
        found = torch.load(tmp_path / f"found-{rank}", weights_only=True)
        assert len(found) == calls
        for accepted, outputs, p_values, reasons in found:
            assert torch.equal(accepted, expected.accepted) and reasons == list(expected.reasons)
            assert torch.equal(outputs.nan_to_num(), expected.outputs.nan_to_num())
            assert all(torch.equal(p_values[name], expected.p_values[name]) for name in expected.p_values)
    assert same(Guard.load(tmp_path / "replica", with_buffers())(TEST), expected)
