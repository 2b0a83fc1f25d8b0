"""What every test stands on: reproducible examples, and guards that catch side effects and network access."""

import inspect
import random
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile(
    "aidefend",
    derandomize=True,
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("aidefend")

_INITIALISERS = (
    "_no_grad_normal_",
    "_no_grad_trunc_normal_",
    "_no_grad_uniform_",
    "kaiming_normal_",
    "kaiming_uniform_",
    "orthogonal_",
    "sparse_",
)
TESTS = str(Path(__file__).parent)
STREAMS = {
    "torch": (torch.get_rng_state, torch.set_rng_state),
    "numpy": (np.random.get_state, np.random.set_state),
    "random": (random.getstate, random.setstate),
}
INITIALISERS = [
    name
    for name, value in vars(torch.nn.init).items()
    if inspect.isfunction(value) and "generator" in inspect.signature(value).parameters
]
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "anomaly mode": (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    "cudnn.benchmark": (
        lambda: torch.backends.cudnn.benchmark,
        lambda value: setattr(torch.backends.cudnn, "benchmark", value),
    ),
    "cudnn.deterministic": (
        lambda: torch.backends.cudnn.deterministic,
        lambda value: setattr(torch.backends.cudnn, "deterministic", value),
    ),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "numpy error handling": (np.geterr, lambda value: np.seterr(**value)),
}


@pytest.fixture(autouse=True)
def _no_trace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test in which the library draws from a global random stream or leaves a global setting changed.

    A test's own `torch.manual_seed` and `torch.rand`, and the initial weights of the layers it builds, go to a stream
    that belongs to the test: reproducible in any order, and told from draws of the library. A test that must use the
    global streams says so with `@pytest.mark.global_random("why")`.
    """
    marked = request.node.get_closest_marker("global_random") is not None
    kept_streams = {name: read() for name, (read, _) in STREAMS.items()}
    kept_settings = {name: read() for name, (read, _) in SETTINGS.items()}
    if marked:
        torch.manual_seed(0)
    else:
        _give_the_test_its_own_stream(monkeypatch)
    yield
    drawn = [name for name, (read, _) in STREAMS.items() if not _same(read(), kept_streams[name])]
    changed = [name for name, (read, _) in SETTINGS.items() if read() != kept_settings[name]]
    for name in drawn:
        STREAMS[name][1](kept_streams[name])
    for name in changed:
        SETTINGS[name][1](kept_settings[name])
    if drawn and not marked:
        cure = "Pass generator= or seed=, also to DataLoader, or mark the test with global_random(reason)"
        pytest.fail(f"Expected untouched global random streams, got draws from {drawn}. {cure}.", pytrace=False)
    if changed:
        pytest.fail(f"Expected unchanged global settings, got a new {changed}. Put them back.", pytrace=False)


def _give_the_test_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = torch.Generator().manual_seed(0)
    for name in INITIALISERS:
        monkeypatch.setattr(torch.nn.init, name, _initialising_from(stream, getattr(torch.nn.init, name)))
    for name in ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"):
        monkeypatch.setattr(torch, name, _drawing_from(stream, getattr(torch, name)))
    monkeypatch.setattr(torch, "manual_seed", _seeding(stream, torch.manual_seed))


def _initialising_from(stream: torch.Generator, initialise: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(initialise)

    def initialise_from_stream(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        if call.arguments.get("generator") is None:
            call.arguments["generator"] = stream
        return initialise(*call.args, **call.kwargs)

    return initialise_from_stream


def _drawing_from(stream: torch.Generator, draw: Callable[..., Any]) -> Callable[..., Any]:
    def draw_from_stream(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("generator") is None and _called_by_a_test():
            kwargs["generator"] = stream
        return draw(*args, **kwargs)

    return draw_from_stream


def _seeding(stream: torch.Generator, seed_all: Callable[[int], torch.Generator]) -> Callable[[int], torch.Generator]:
    def seed_stream(seed: int) -> torch.Generator:
        return stream.manual_seed(seed) if _called_by_a_test() else seed_all(seed)

    return seed_stream


def _called_by_a_test() -> bool:
    """Whether the caller of the calling function is code in the folder of the tests."""
    return sys._getframe(2).f_code.co_filename.startswith(TESTS)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    if isinstance(first, tuple):
        return all(_same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that leaves this machine: only loopback and Unix sockets connect, only local names resolve."""
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, _only_local(getattr(socket.socket, name)))
    monkeypatch.setattr(socket, "getaddrinfo", _only_local_names(socket.getaddrinfo))
    monkeypatch.setattr(socket, "gethostbyname", _only_local_names(socket.gethostbyname))


def _only_local(reach: Callable[..., Any]) -> Callable[..., Any]:
    def reach_local(self: socket.socket, *args: Any) -> Any:
        if self.family != getattr(socket, "AF_UNIX", None):
            _refuse_remote(args[-1][0])
        return reach(self, *args)

    return reach_local


def _only_local_names(resolve: Callable[..., Any]) -> Callable[..., Any]:
    def resolve_local(host: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_remote(host)
        return resolve(host, *args, **kwargs)

    return resolve_local


def _refuse_remote(host: Any) -> None:
    name = host.decode() if isinstance(host, bytes) else str(host or "localhost")
    if name != "localhost" and name != "::1" and not name.startswith("127."):
        pytest.fail(
            f"Expected no network access, got a connection to {name!r}. Serve it from 127.0.0.1.", pytrace=False
        )


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository, whatever the current directory is."""
    return Path(__file__).parents[1]
