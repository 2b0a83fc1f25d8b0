"""The command line: readable help, JSON on demand, exit codes that scripts can rely on."""

import json

import numpy as np
import pytest
import torch

from aidefend.__main__ import FOUND, OK, USAGE, main
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
