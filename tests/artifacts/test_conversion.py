import subprocess
import sys
import warnings

import pytest
import safetensors.torch
import torch

from aidefend import ConfigurationError, UnsafeArtifact
from aidefend.artifacts import Limits, conversion, convert, safe_load
from aidefend.artifacts.safetensors_format import write_safetensors
from tests.artifacts.hostile_files import legacy, torchscript
from tests.artifacts.hostile_pickles import HEAD, checkpoint, mkdir, state


def test_a_checkpoint_becomes_safetensors_that_the_library_reads(tmp_path):
    tied = torch.arange(6.0).reshape(2, 3)
    weights = {
        "tied": tied,
        "tied too": tied,
        "turned": tied.t(),
        "half": torch.ones(3).bfloat16(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "conj": torch.tensor([1 + 2j]).conj(),
        "empty": torch.empty(0, 2),
        "scalar": torch.tensor(3),
        "flag": torch.tensor([True, False]),
    }
    torch.save({"model": weights, "epoch": 3}, tmp_path / "all.ckpt")
    (tmp_path / "all.safetensors").write_text("older")
    with pytest.raises(UnsafeArtifact, match=r'entry="model"'):
        convert(tmp_path / "all.ckpt")
    with pytest.raises(UnsafeArtifact, match="an entry 'ema'"):
        convert(tmp_path / "all.ckpt", entry="ema")
    assert (tmp_path / "all.safetensors").read_text() == "older"
    written = convert(tmp_path / "all.ckpt", entry="model")
    assert written == tmp_path / "all.safetensors"
    ours, theirs = safe_load(written), safetensors.torch.load_file(written)
    assert list(ours) == list(weights) and set(theirs) == set(weights)
    for name, value in weights.items():
        for loaded in (ours[name], theirs[name]):
            assert loaded.dtype == value.dtype and torch.equal(loaded, value.detach().resolve_conj())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.ckpt", "all.safetensors"]


def test_our_writer_and_the_library_agree():
    state_dict = {"a": torch.arange(4.0), "b": torch.ones(3, dtype=torch.int8), "c": torch.ones(2, 2).double()}
    loaded = safetensors.torch.load(write_safetensors(state_dict))
    assert all(
        torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in state_dict.items()
    )


def test_hostile_and_foreign_files_are_refused_before_a_process_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started"))
    path = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = {
            "legacy torch pickle.*torch.save": legacy({"w": torch.ones(1)}),
            "pickle that names posix.mkdir in model.pt": HEAD + mkdir(str(tmp_path / "marker")) + b".",
            "posix.mkdir": checkpoint(state(mkdir(str(tmp_path / "marker")))),
            "torchscript": torchscript(),
        }
    for words, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(UnsafeArtifact, match=words):
            convert(path)
    torch.save({"w": torch.ones(1, dtype=torch.complex128)}, path)
    with pytest.raises(UnsafeArtifact, match="safetensors type"):
        convert(path)
    assert [item.name for item in tmp_path.iterdir()] == ["model.pt"]


def test_malformed_arguments_are_named(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"w": torch.ones(1)}, path)
    (tmp_path / "link.safetensors").symlink_to(path)
    for call, words in [
        (lambda: convert(path, to="onnx"), "to to be one of"),
        (lambda: convert(path, timeout=0), "timeout"),
        (lambda: convert(path, output=path), "output to be a file of its own"),
        (lambda: convert(path, output=tmp_path), "output to be a file of its own"),
        (lambda: convert(path, output=tmp_path / "link.safetensors"), "output to be a file of its own"),
        (lambda: convert(3), "path to be a file name"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            call()
    (tmp_path / "w.safetensors").write_bytes(write_safetensors({"w": torch.ones(1)}))
    with pytest.raises(ConfigurationError, match="needs no conversion"):
        convert(tmp_path / "w.safetensors", output=tmp_path / "x.safetensors")


def test_a_process_that_is_stopped_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    torch.save({"w": torch.ones(1)}, path)
    with pytest.raises(UnsafeArtifact, match=r"within 0\.05 s"):
        convert(path, timeout=0.05)
    monkeypatch.setattr(conversion, "_BASE_MEMORY", 2**26)
    with pytest.raises(UnsafeArtifact, match="ran out of memory or time"):
        convert(path)
    assert [item.name for item in tmp_path.iterdir()] == ["model.pt"]


def test_what_the_process_wrote_is_checked_before_it_appears(tmp_path, monkeypatch):
    """The planted violation: a worker that writes something else."""
    path = tmp_path / "model.pt"
    torch.save({"w": torch.ones(1)}, path)

    class Done:
        returncode = 0

    def write(data):
        return lambda *_, stdout, **__: (stdout.write(data), Done())[1]

    for data in (write_safetensors({"w": torch.ones(2)}), write_safetensors({"v": torch.ones(1)}), b"", HEAD + b"N."):
        monkeypatch.setattr(subprocess, "run", write(data))
        with pytest.raises(UnsafeArtifact):
            convert(path)
    assert [item.name for item in tmp_path.iterdir()] == ["model.pt"]


def test_the_process_cannot_open_files_sockets_or_processes_when_it_parses(tmp_path):
    """The worker's own steps, with a probe where it would parse the file."""
    probe = f"""
import json, os, resource, socket, sys
sys.path[:] = {[str(item) for item in sys.path if item]!r}
from aidefend.artifacts import conversion_worker as worker

def attempt(action):
    try:
        action()
    except OSError as error:
        return error.strerror
    return "allowed"

def convert(data, order):
    if order["name"] == "warm-up.pt":
        return b""
    seen = {{
        "open": attempt(lambda: open({str(tmp_path / "x")!r}, "w")),
        "socket": attempt(socket.socket),
        "environment": sorted(os.environ),
    }}
    return json.dumps(seen).encode()

worker._convert = convert
sys.exit(worker.main())
"""
    order = '{"paths": [], "memory": 17179869184, "seconds": 60, "bytes": 1000, "name": "m.pt"}'
    order = order.replace("[]", str([str(item) for item in sys.path if item]).replace("'", '"'))
    done = subprocess.run(
        [sys.executable, "-I", "-c", probe, order], input=b"", capture_output=True, env={}, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = __import__("json").loads(done.stdout)
    assert seen["open"] == seen["socket"] == "Too many open files"
    assert set(seen["environment"]) <= {"LC_CTYPE"}
    assert not (tmp_path / "x").exists()


def test_limits_reach_the_process(tmp_path):
    limits = Limits(dtypes=frozenset({torch.float32, torch.int64}), max_items=5, finite=False)
    numbers = conversion._limits_as_json(limits)
    assert numbers["dtypes"] == ["float32", "int64"] and numbers["max_items"] == 5 and numbers["finite"] is False
