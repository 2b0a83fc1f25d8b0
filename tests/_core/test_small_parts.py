"""Errors, checks, randomness, storage, neighbours, progress."""

import json
import multiprocessing
import os
import pickle
import sqlite3

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

import aidefend
from aidefend import AidefendError, ConfigurationError, IncompatibleModel, InputRejected, MissingExtra, Report
from aidefend._core import checks, storage
from aidefend._core.errors import Offender
from aidefend._core.neighbours import k_nearest
from aidefend._core.progress import progress
from aidefend._core.random import (
    derive_seed,
    make_generator,
    normal,
    row_generator,
    secure_bytes,
    secure_normal,
    secure_uniform,
    uniform,
)


def test_every_public_name_loads_and_no_other():
    for name in aidefend.__all__:
        if name in aidefend._HOMES:
            assert getattr(aidefend, name).__name__ == name
    assert aidefend.__all__ == sorted(aidefend.__all__) == dir(aidefend)
    assert set(aidefend.__all__) == {*aidefend._ROOMS, *aidefend._HOMES, "__version__"}
    with pytest.raises(AttributeError, match="nothing"):
        _ = aidefend.nothing


def test_errors_pickle_with_their_facts():
    report = Report(["a"], torch.tensor([False]))
    errors = [
        IncompatibleModel("Bad.", [Offender("net.1", "BatchNorm in train mode", "Call eval()")]),
        InputRejected("1 row refused", report),
        MissingExtra("cryptography", "sign"),
        ConfigurationError("x"),
    ]
    for error in errors:
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error) and isinstance(again, AidefendError)
    assert "net.1: BatchNorm in train mode. Call eval()." in str(errors[0])
    assert pickle.loads(pickle.dumps(errors[1])).report.ids == ("a",)
    assert isinstance(errors[2], ImportError) and "aidefend[sign]" in str(errors[2])


BAD = [
    lambda: checks.check_int(True, "n"),
    lambda: checks.check_int(1.0, "n"),
    lambda: checks.check_int(0, "n"),
    lambda: checks.check_int(9, "n", 1, 8),
    lambda: checks.check_number(float("nan"), "n"),
    lambda: checks.check_number("1", "n"),
    lambda: checks.check_number(0.0, "n", 0.0, 1.0, open_low=True),
    lambda: checks.check_probability(1.0, "n"),
    lambda: checks.check_choice("c", ("a", "b"), "n"),
    lambda: checks.check_tensor([1.0], "n"),
    lambda: checks.check_tensor(torch.tensor(1.0), "n"),
    lambda: checks.check_tensor(torch.eye(2).to_sparse(), "n"),
    lambda: checks.check_tensor(torch.ones(2), "n", ndim=2),
    lambda: checks.check_tensor(torch.ones(2), "n", floating=False),
    lambda: checks.check_tensor(torch.ones(2).long(), "n", floating=True),
    lambda: checks.check_tensor(torch.ones(2), "n", rows=3),
    lambda: checks.check_tensor(torch.tensor([float("inf")]), "n"),
    lambda: checks.check_not_empty(0, "n"),
    lambda: checks.check_labels(torch.tensor([-1]), 1, name="n"),
    lambda: checks.check_labels(torch.tensor([3]), 1, 3, name="n"),
    lambda: checks.check_labels(torch.tensor([0.0]), 1, name="n"),
    lambda: checks.check_labels(torch.tensor([True]), 1, name="n"),
    lambda: checks.check_logits(torch.zeros(2), 2, "n"),
    lambda: checks.check_logits(torch.zeros(2, 1), 2, "n"),
    lambda: checks.check_logits(torch.zeros(2, 3).long(), 2, "n"),
    lambda: checks.check_logits([[1.0]], 1, "n"),
    lambda: checks.check_inside(torch.tensor([1.1]), 0.0, 1.0, "n"),
]


@pytest.mark.parametrize("call", BAD)
def test_messages_have_rule_value_and_cure(call):
    with pytest.raises(AidefendError, match=r"^Expected .+, got n=.+\. .+\.$"):
        call()


def test_good_arguments_pass():
    assert checks.check_int(3, "n") == 3 and checks.check_number(1, "n") == 1.0
    assert checks.check_labels(torch.tensor([1, 0], dtype=torch.uint8), 2, 2).dtype == torch.int64
    assert checks.check_logits(torch.zeros(0, 3), 0).shape == (0, 3)
    checks.check_inside(torch.zeros(0), 0.0, 1.0)
    assert len(checks.describe("x" * 500)) == 160 and checks.describe("/a" * 200 + "/name.pt").endswith("name.pt'")
    assert checks.check_same_rows(("a", "b"), 2, 2) == 2


def test_seeds_are_independent_streams():
    assert derive_seed(0, "a", 1) != derive_seed(0, "a1") and 0 <= derive_seed(5) < 2**63
    assert row_generator(0, "r").random() == row_generator(0, "r").random() != row_generator(0, "s").random()
    assert torch.equal(torch.rand(2, generator=make_generator(seed=3)), torch.rand(2, generator=make_generator(seed=3)))
    given_stream = torch.Generator()
    assert make_generator(given_stream) is given_stream
    like = torch.zeros(0, dtype=torch.bfloat16)
    assert uniform((4,), make_generator(seed=0), like).dtype == like.dtype
    assert normal((4,), make_generator(seed=0), like).dtype == like.dtype
    with pytest.raises(ConfigurationError, match="seed"):
        make_generator(seed=-1)


def test_secure_noise_is_standard_normal_and_never_repeats():
    """Kolmogorov-Smirnov on 20,000 draws; false failure 1e-6."""
    torch.manual_seed(0)
    first = secure_normal((100, 200), dtype=torch.float64)
    torch.manual_seed(0)
    assert not torch.equal(first, secure_normal((100, 200), dtype=torch.float64))
    assert scipy_stats.kstest(first.flatten().numpy(), "norm").pvalue > 1e-6
    values = secure_uniform(10_000)
    assert values.min() > 0 and values.max() < 1 and secure_normal((0, 3)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_secure_noise_of_every_size_is_uncorrelated_and_has_long_tails(dtype):
    """Half of the numbers are cosines and half are sines of the same draws: pairs must be independent."""
    for size in (0, 1, 2, 3, 7, (1 << 17) + 1):
        assert secure_normal((size,), dtype=dtype).shape == (size,)
    values = secure_normal((400_001,), dtype=dtype).double()
    assert bool(torch.isfinite(values).all())
    cosines, sines = values[:200_001][:131_072].chunk(2)  # one block: its first half and its second
    for a, b in ((cosines, sines), (cosines.square(), sines.square())):
        correlation = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
        assert abs(correlation) < 6 / len(a) ** 0.5
    assert 4 < float(values.abs().max()) < 7
    assert float((values > 3).double().mean()) == pytest.approx(scipy_stats.norm.sf(3), rel=0.3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_noise_of_its_own():
    secure_normal((4,))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, secure_bytes(32))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 32) != secure_bytes(32)
    os.close(reading)
    os.close(writing)


def test_canonical_json_is_one_text():
    left = {"b": torch.tensor([1.0, float("nan")]), "a": {3, 1}, "c": np.float32(0.5), "d": (None, True, np.inf)}
    assert storage.canonical_json(left) == '{"a":[1,3],"b":[1.0,"nan"],"c":0.5,"d":[null,true,"inf"]}'
    assert json.loads(storage.pretty_json(left)) == json.loads(storage.canonical_json(dict(reversed(left.items()))))


def test_atomic_write_leaves_all_or_nothing(tmp_path):
    target = tmp_path / "f.txt"
    storage.write_atomic(target, "one")
    mode = target.stat().st_mode & 0o777
    assert mode & 0o077 == 0o644 & 0o077 & mode
    with pytest.raises(ZeroDivisionError), storage.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "one" and [path.name for path in tmp_path.iterdir()] == ["f.txt"]
    target.chmod(0o600)
    storage.write_atomic(target, b"two")
    assert target.read_bytes() == b"two" and target.stat().st_mode & 0o777 == 0o600
    with pytest.raises(AidefendError, match="existing folder"):
        storage.write_atomic(tmp_path / "no" / "f", "x")


def _add(path, times):
    connection = storage.open_database(path)
    for _ in range(times):
        with storage.transaction(connection):
            (value,) = connection.execute("SELECT v FROM t").fetchone()
            connection.execute("UPDATE t SET v = ?", (value + 1,))


def test_transactions_are_atomic_across_processes_and_roll_back(tmp_path):
    path = tmp_path / "d.sqlite"
    connection = storage.open_database(path)
    connection.execute("CREATE TABLE t (v INTEGER)")
    connection.execute("INSERT INTO t VALUES (0)")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add, args=(path, 25)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert connection.execute("SELECT v FROM t").fetchone() == (50,)
    with pytest.raises(sqlite3.OperationalError), storage.transaction(connection):
        connection.execute("UPDATE t SET v = 0")
        connection.execute("no sql")
    assert connection.execute("SELECT v FROM t").fetchone() == (50,)
    connection.close()


sizes = st.integers(1, 9)


@given(st.integers(0, 1000), st.integers(1, 4), st.sampled_from(["euclidean", "cosine"]), st.booleans(), sizes)
def test_neighbours_equal_the_full_matrix(seed, k, metric, exclude_self, block):
    stream = torch.Generator().manual_seed(seed)
    bank = torch.randn(11, 3, generator=stream, dtype=torch.float64)
    queries = bank if exclude_self else torch.randn(6, 3, generator=stream, dtype=torch.float64)
    full = torch.cdist(queries, bank)
    if metric == "cosine":
        full = 1 - torch.nn.functional.cosine_similarity(queries[:, None], bank[None], dim=2)
    if exclude_self:
        full.fill_diagonal_(torch.inf)
    distances, rows = k_nearest(queries, bank, k, metric=metric, exclude_self=exclude_self, block=block)
    assert torch.allclose(distances, full.sort(dim=1).values[:, :k], atol=1e-9)
    assert torch.allclose(full.gather(1, rows), distances, atol=1e-9)


def test_neighbours_at_the_edges():
    zero = torch.zeros(1, 3)
    assert k_nearest(zero, torch.eye(3), 1, metric="cosine")[0].item() == 1.0
    assert k_nearest(torch.zeros(0, 3), torch.eye(3), 2)[0].shape == (0, 2)
    twins = torch.ones(2, 3)
    assert k_nearest(twins, twins, 1, exclude_self=True)[1].flatten().tolist() == [1, 0]
    for bad in (
        lambda: k_nearest(zero, torch.eye(3), 4),
        lambda: k_nearest(zero, torch.eye(3)[:1], 1, exclude_self=True),
        lambda: k_nearest(zero, torch.eye(4), 1),
        lambda: k_nearest(zero * torch.nan, torch.eye(3), 1),
    ):
        with pytest.raises(ConfigurationError, match="Expected"):
            bad()


def test_progress_is_silent_off_a_terminal(capsys):
    assert list(progress(range(3), "work")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(progress(range(3), "work", enabled=True)) == [0, 1, 2]
    assert "work" in capsys.readouterr().err


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no text for you")


def test_messages_survive_hostile_values():
    nested: list[object] = []
    for _ in range(200):
        nested = [nested, nested]  # 2 ** 200 brackets if it were written out
    assert len(checks.describe(nested)) <= 160
    assert checks.describe(Hostile()) == "an object of type Hostile"
    assert checks.describe([Hostile()])
