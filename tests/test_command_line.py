"""The command line: readable help, JSON on demand, exit codes that scripts can rely on."""

import contextlib
import importlib
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from aidefend.__main__ import FOUND, INTERRUPTED, OK, USAGE, main
from aidefend.artifacts import Manifest

KEY = b"a secret key of 16 bytes or more"
EVIL = b"cposix\nsystem\n(S'true'\ntR."


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.ones(3)}, path)
    return path


@pytest.mark.parametrize("verb", [[], ["demo"], ["audit"], ["screen"], ["inspect"], ["verify"]])
def test_help_reads_well(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: aidefend") and "Traceback" not in text
    assert max(len(line) for line in text.splitlines()) <= 100


@pytest.mark.parametrize("arguments", [[], ["dance"], ["inspect"], ["verify", "x"], ["demo", "--seed", "x"]])
def test_malformed_calls_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == USAGE
    assert "usage:" in capsys.readouterr().err


def test_inspect(tmp_path, model, capsys):
    assert main(["inspect", str(model)]) == OK
    (tmp_path / "evil.pt").write_bytes(EVIL)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "evil.pt"), "--json"]) == FOUND
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "aidefend.evidence/1" and found["findings"]
    assert main(["inspect", str(tmp_path / "missing")]) in (FOUND, USAGE)


def test_audit_of_a_folder(tmp_path, model, capsys):
    (tmp_path / "evil.pt").write_bytes(EVIL)
    outputs = [f"--{name}={tmp_path / name}" for name in ("html", "sarif", "junit")]
    assert main(["audit", str(tmp_path), *outputs]) == FOUND
    assert "evil.pt" in capsys.readouterr().out
    assert "<html" in (tmp_path / "html").read_text()
    assert json.loads((tmp_path / "sarif").read_text())["version"] == "2.1.0"
    assert (tmp_path / "junit").read_text().startswith("<?xml")


def test_verify(tmp_path, model, capsys):
    Manifest.of(model).sign(KEY).save(tmp_path / "manifest.json")
    (tmp_path / "key").write_bytes(KEY)
    call = ["verify", str(model), "--manifest", str(tmp_path / "manifest.json")]
    assert main([*call, "--key", str(tmp_path / "key")]) == OK
    assert main(call) == FOUND
    content = bytearray(model.read_bytes())
    content[-30] ^= 1
    model.write_bytes(bytes(content))
    capsys.readouterr()
    assert main([*call, "--key", str(tmp_path / "key"), "--json"]) == FOUND
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert main([*call, "--key", str(tmp_path / "missing")]) == USAGE
    assert main(["verify", str(model), "--manifest", str(tmp_path / "key")]) == USAGE


def test_verify_with_a_public_key(tmp_path, model):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    Manifest.of(model).sign(private).save(tmp_path / "manifest.json")
    for name, key in (("right", private), ("wrong", Ed25519PrivateKey.generate())):
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        (tmp_path / name).write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    call = ["verify", str(model), "--manifest", str(tmp_path / "manifest.json"), "--key"]
    assert main([*call, str(tmp_path / "right")]) == OK
    assert main([*call, str(tmp_path / "wrong")]) == FOUND


def test_screen(tmp_path, capsys):
    stream = np.random.default_rng(0)
    y = np.arange(400, dtype=np.int64) % 4
    x = stream.integers(0, 60, (400, 8, 8), dtype=np.uint8)
    for label in range(4):
        x[y == label, 2 * label : 2 * label + 2] += 150
    np.savez(tmp_path / "clean.npz", train_x=x, train_y=y, test_x=x[:8], test_y=y[:8])
    assert main(["screen", str(tmp_path / "clean.npz"), "--out", str(tmp_path / "report")]) in (OK, FOUND)
    assert "rows kept" in capsys.readouterr().out
    assert (tmp_path / "report").exists()
    assert main(["screen", str(tmp_path / "missing.npz")]) == USAGE


def test_a_damaged_key_is_a_malformed_call_and_no_finding(tmp_path, model, capsys):
    Manifest.of(model).sign(KEY).save(tmp_path / "manifest.json")
    (tmp_path / "key.pem").write_text("-----BEGIN PUBLIC KEY-----\nnonsense\n")
    call = ["verify", str(model), "--manifest", str(tmp_path / "manifest.json"), "--key", str(tmp_path / "key.pem")]
    assert main(call) == USAGE
    assert "Expected a PEM file with a public key" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["inspect", ""], ["audit", ""], ["screen", ""], ["demo", "--out", ""]])
def test_an_empty_path_is_not_the_current_folder(verb, capsys):
    assert main(verb) == USAGE
    assert "Expected" in capsys.readouterr().err


def test_a_policy_is_read_before_the_audit_and_its_problems_are_named(tmp_path, model, capsys):
    (tmp_path / "broken.toml").write_text("nonsense = [")
    assert main(["audit", str(model), "--policy", str(tmp_path / "broken.toml")]) == USAGE
    assert capsys.readouterr().out == ""
    (tmp_path / "strict.toml").write_text('[findings."artifacts.problems"]\nmin = 5\n')
    assert main(["audit", str(model), "--policy", str(tmp_path / "strict.toml"), "--json"]) == FOUND
    said = capsys.readouterr()
    assert "artifacts.problems: expected >= 5" in said.err and json.loads(said.out)["findings"]


@pytest.mark.parametrize("place", ["a file", "under a file"])
def test_the_demo_refuses_a_folder_that_cannot_be_made_at_once(tmp_path, place, capsys):
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" if place == "a file" else tmp_path / "file" / "deep" / "er"
    assert main(["demo", "--out", str(out)]) == USAGE
    said = capsys.readouterr()
    assert "folder that can be made" in said.err and said.out == ""


def test_the_demo_prints_json_alone(tmp_path, monkeypatch, capsys):
    def short(data, out, seed):
        sys.stdout.write("a line for readers")
        (tmp_path / "report.json").write_text(json.dumps({"seed": seed}))
        return OK

    monkeypatch.setattr("aidefend.demo.run", short)
    assert main(["demo", "--json", "--seed", "3", "--out", str(tmp_path)]) == OK
    said = capsys.readouterr()
    assert json.loads(said.out) == {"seed": 3} and "a line for readers" in said.err


def test_ctrl_c_that_comes_out_as_another_error_is_told_as_what_it_was(monkeypatch, capsys):
    def unlucky(options):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ImportError("initialization failed")  # as extension modules have it

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("aidefend.__main__._demo", unlucky)
    assert main(["demo"]) == INTERRUPTED
    assert "Interrupted." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_waits_for_the_end_of_an_import(tmp_path, monkeypatch, capsys):
    """In the middle of one, an extension module may swallow it or abort the process."""
    (tmp_path / "slow_to_start.py").write_text(
        "import contextlib, signal\n"
        "with contextlib.suppress(KeyboardInterrupt):\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "finished = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    finished = []

    def unlucky(options):
        finished.append(importlib.import_module("slow_to_start").finished)
        time.sleep(30)

    monkeypatch.setattr("aidefend.__main__._demo", unlucky)
    began = time.monotonic()
    assert main(["demo"]) == INTERRUPTED
    assert finished == [True] and time.monotonic() - began < 20
    assert "Interrupted." in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [0.0, 0.5, 6.0])
def test_ctrl_c_leaves_a_message_and_no_file(tmp_path, seconds):
    # from "up" on a signal meets our code: before, on a busy machine, it could meet the start of Python itself
    started = (
        "import sys, aidefend.__main__ as cli\n"
        "parser = cli._parser\n"
        "cli._parser = lambda: (print('up', flush=True), parser())[1]\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    call = [sys.executable, "-c", started, "demo", "--out", str(tmp_path / "out")]
    running = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert running.stdout is not None and running.stdout.readline() == "up\n"
    time.sleep(seconds)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    # Python dies of the signal itself where it arrives inside an exec() of an import; shells show both as 130
    assert running.returncode in (130, -signal.SIGINT)
    assert "Interrupted." in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
