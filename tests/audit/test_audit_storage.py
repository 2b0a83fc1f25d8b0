"""A folder with one planted problem of each kind, and the traps: links, devices, huge and hostile names."""

import os
import pickle
import time
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidefend._core.errors import ConfigurationError
from aidefend._core.evidence import Severity
from aidefend.audit import audit_storage
from aidefend.audit.secrets import entropy, find_secrets

KEY = "q7Zr0pLw" + "9Xk2Vb4T"


def kinds(evidence):
    return {
        (item.id.removeprefix("storage."), item.setting["path"]) for item in evidence.findings if "path" in item.setting
    }


@pytest.fixture
def folder(tmp_path):
    tmp_path.chmod(0o755)
    return tmp_path


def test_a_tidy_folder_has_no_findings(folder):
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    (folder / "manifest.json").write_text('{"files": {}}')
    (folder / "README.md").write_text("Train with `train.py`; the token comes from the environment.")
    (folder / "fresh.tmp").write_text("still in use")
    np.savez(folder / "data.npz", x=np.zeros(3))  # numpy reads no pickles unless told to
    (folder / "firmware.bin").write_bytes(b"\x7fELF")
    evidence = audit_storage(folder)
    assert kinds(evidence) == set() and evidence["storage.problems"].value == 0
    assert evidence["storage.problems"].n == 7 and evidence.worst is Severity.INFO


def test_every_planted_problem_is_found(folder):
    (folder / "models").mkdir()
    (folder / "models" / "a.pkl").write_bytes(pickle.dumps({"a": 1}))
    (folder / "models" / "renamed.dat").write_bytes(pickle.dumps([1], protocol=4))
    for name in ("b.pt", "pytorch_model.bin"):
        with zipfile.ZipFile(folder / "models" / name, "w") as archive:
            archive.writestr("archive/data.pkl", b"x")
    (folder / "models" / "c.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    (folder / "models" / "d.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    (folder / "models" / "d.safetensors.sig").write_bytes(b"signature")
    (folder / "config.yaml").write_text(f"model: small\napi_key: {KEY}\n")
    (folder / "open.txt").write_text("x")
    (folder / "open.txt").chmod(0o666)
    (folder / "shared").mkdir()
    (folder / "shared").chmod(0o777)
    old = folder / ".weights.partial"
    old.write_bytes(b"half")
    os.utime(old, (time.time() - 9 * 86_400,) * 2)
    (folder / "away").symlink_to("/etc")
    evidence = audit_storage(folder)
    assert kinds(evidence) == {
        ("unsafe_checkpoint", "models/a.pkl"),
        ("unsafe_checkpoint", "models/renamed.dat"),
        ("unsafe_checkpoint", "models/b.pt"),
        ("unsafe_checkpoint", "models/pytorch_model.bin"),
        ("unsigned_checkpoint", "models/pytorch_model.bin"),
        ("unsigned_checkpoint", "models/a.pkl"),
        ("unsigned_checkpoint", "models/renamed.dat"),
        ("unsigned_checkpoint", "models/b.pt"),
        ("unsigned_checkpoint", "models/c.safetensors"),
        ("secret", "config.yaml"),
        ("permissions", "open.txt"),
        ("permissions", "shared"),
        ("leftover", ".weights.partial"),
        ("link", "away"),
    }
    assert evidence["storage.secret"].setting["line"] == 2
    assert evidence["storage.problems"].value == 14
    assert KEY not in evidence.to_json(), "a report must not repeat the secret"
    assert evidence.digest == audit_storage(folder).digest


def test_links_are_never_followed_and_special_files_never_read(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.env").write_text(f"password={KEY}")
    (folder / "out").symlink_to(outside)
    (folder / "secret.env").symlink_to(outside / "secret.env")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.env")  # opening it would wait forever
    evidence = audit_storage(folder)
    assert {kind for kind, _ in kinds(evidence)} == {"link"} and evidence["storage.problems"].n == 5
    with pytest.raises(ConfigurationError, match="no link"):
        audit_storage(folder / "out")


def test_limits_are_kept_and_said(folder):
    for number in range(20):
        (folder / f"{number:02}.txt").write_text("x")
    evidence = audit_storage(folder, max_files=5)
    assert evidence["storage.complete"].status == "not shown" and evidence["storage.problems"].n == 5
    (folder / "late.txt").write_text("x" * 100 + f"\npassword = {KEY}")
    assert ("secret", "late.txt") in kinds(audit_storage(folder))
    assert ("secret", "late.txt") not in kinds(audit_storage(folder, max_read=50))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_cannot_be_read_is_a_failed_check(folder):
    (folder / "closed").mkdir(mode=0o000)
    assert audit_storage(folder)["storage.unreadable"].status == "failed"


def test_hostile_names_are_carried_safely(folder):
    (folder / "a\n<script>\x1b[31m.pkl").write_bytes(pickle.dumps(1))
    os.close(os.open(os.fsencode(folder) + b"/bad\xff.pkl", os.O_CREAT | os.O_WRONLY, 0o600))
    paths = {item.setting.get("path") for item in audit_storage(folder).findings}
    assert "bad\\udcff.pkl" in paths
    audit_storage(folder).to_json()


def test_bad_arguments(folder):
    for call, match in [
        (lambda: audit_storage(folder / "missing"), "existing folder"),
        (lambda: audit_storage(folder, max_files=0), "max_files"),
        (lambda: audit_storage(folder, stale_days=-1.0), "stale_days"),
    ]:
        with pytest.raises(ConfigurationError, match=match):
            call()


@pytest.mark.parametrize(
    "line",
    [
        "-----BEGIN RSA PRIVATE KEY-----",
        "aws: AKIA" + "ABCDEFGHIJKLMNOP",
        "ghp_" + "a1B2" * 9,
        "hf_" + "a1B2" * 9,
        "url = postgres://admin:" + "hunter2x@db/prod",
        f'"client_secret": "{KEY}"',
        f"DB_PASSWORD={KEY}",
        "eyJhbGciOiJI." + "eyJzdWIiOiIxMjM0.abcdefghij",
    ],
)
def test_secrets_that_must_be_found(line):
    assert len(find_secrets(f"first\n{line}\n")) == 1 and find_secrets(f"first\n{line}\n")[0].line == 2


@pytest.mark.parametrize(
    "line",
    [
        "api_key: ${API_KEY}",
        "password = <your password>",
        "token: changeme-please",
        "secret_name: production",
        "max_tokens: 1024",
        "tokenizer: bert-base-uncased",
        "password = os.environ['PASSWORD']",
        "access_key = getenv('ACCESS_KEY_1')",
        "sha256: 2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
        "-----BEGIN PUBLIC KEY-----",
    ],
)
def test_lines_that_are_no_secrets(line):
    assert find_secrets(line) == []


@given(st.text(max_size=400))
def test_any_text_is_searched_without_error(text):
    assert all(1 <= secret.line <= len(text.splitlines()) for secret in find_secrets(text))


def test_the_search_is_linear():
    """A quadratic pattern needs minutes here."""
    started = time.perf_counter()
    find_secrets(("secret" * 50_000) + "\n" + ("a_" * 100_000) + "=" + "\n" + "token = " * 50_000)
    assert time.perf_counter() - started < 2.0
    assert entropy("aaaa") == 0 and entropy("abcd") == 2
