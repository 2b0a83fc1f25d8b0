import hashlib
import os

import pytest
import safetensors.torch
import torch

from aidefend import ConfigurationError, Evidence, Severity, UnsafeArtifact
from aidefend.artifacts import Limits, inspect_artifact
from aidefend.artifacts.global_names import find_globals
from tests.artifacts.hostile_files import array, header_file, legacy, saved
from tests.artifacts.hostile_pickles import HEAD, checkpoint, mkdir, state, text


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "model"
    (place / "sub").mkdir(parents=True)
    torch.save({"w": torch.ones(2)}, place / "model.pt")
    safetensors.torch.save_file({"w": torch.ones(2)}, place / "model.safetensors")
    (place / "README.md").write_text("# A model\n\nmusic\nfor code.\n")
    (place / "sub/evil.bin").write_bytes(HEAD + mkdir("x") + b".")
    (place / "sub/evil.pt").write_bytes(checkpoint(state(mkdir("x"))))
    (place / "sub/old.pth").write_bytes(legacy({"w": torch.ones(1)}))
    (place / "sub/array.npy").write_bytes(array(torch.ones(2).numpy()))
    (place / "sub/modeling.py").write_text("import os\n")
    (place / "sub/noise").write_bytes(bytes(range(256)) * 4)
    (place / "sub/link.pt").symlink_to("/etc/passwd")
    os.mkfifo(place / "sub/pipe.pt")
    return place


def verdicts(evidence: Evidence) -> dict[str, tuple[str, Severity]]:
    return {item.setting["path"]: (item.value, item.severity) for item in evidence.findings if "path" in item.setting}


def test_each_file_of_a_folder_gets_a_verdict_and_nothing_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("loaded"))
    evidence = inspect_artifact(folder)
    assert verdicts(evidence) == {
        "README.md": ("text", Severity.INFO),
        "model.pt": ("accepted", Severity.INFO),
        "model.safetensors": ("accepted", Severity.INFO),
        "sub/array.npy": ("unsupported", Severity.LOW),
        "sub/evil.bin": ("unsafe", Severity.CRITICAL),
        "sub/evil.pt": ("unsafe", Severity.CRITICAL),
        "sub/link.pt": ("unreadable", Severity.HIGH),
        "sub/modeling.py": ("unsupported", Severity.MEDIUM),
        "sub/noise": ("unrecognised", Severity.HIGH),
        "sub/old.pth": ("unsafe", Severity.HIGH),
        "sub/pipe.pt": ("unreadable", Severity.HIGH),
    }
    assert evidence["artifacts.files"].value == 11
    assert evidence["artifacts.files"].setting["unsafe"] == 3
    assert "artifacts.nothing_recognised" not in evidence
    found = evidence["artifacts.unsafe"].setting
    assert found["globals"] == ["posix.mkdir"] and "unpickling executes code" in found["reason"]
    assert found["sha256"] == hashlib.sha256((folder / "sub/evil.bin").read_bytes()).hexdigest()
    assert evidence["artifacts.unrecognised"].status == "failed"
    assert evidence.digest == inspect_artifact(folder).digest
    assert str(folder.parent) not in evidence.to_json()
    assert Evidence.from_dict(evidence.to_dict()) == Evidence(evidence.findings, evidence.metadata)


def test_titles_name_the_code_or_the_broken_rule(folder):
    titles = {item.setting["path"]: item.title for item in inspect_artifact(folder).findings if "path" in item.setting}
    assert titles["sub/evil.bin"] == "sub/evil.bin: unsafe, pickle that names posix.mkdir"
    assert titles["sub/evil.pt"] == "sub/evil.pt: unsafe, zip that names posix.mkdir"
    assert titles["model.pt"] == "model.pt: torch checkpoint, passes every structural check"
    assert "legacy torch pickle: torch before 1.6" in titles["sub/old.pth"]
    (folder / "cut.pt").write_bytes((folder / "model.pt").read_bytes()[:-1])
    titles = [item.title for item in inspect_artifact(folder / "cut.pt").findings]
    assert titles[0].startswith("cut.pt: unsafe, zip: Expected a zip that ends with its directory")


def test_a_whole_saved_module_is_refused_but_no_attack(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    finding = inspect_artifact(tmp_path / "module.pt")["artifacts.unsafe"]
    assert finding.severity == Severity.HIGH and "torch.nn.modules.linear.Linear" in finding.setting["globals"]


def test_a_single_file_is_named_by_its_name(folder):
    evidence = inspect_artifact(folder / "sub/evil.pt")
    assert [item.id for item in evidence.findings] == ["artifacts.unsafe", "artifacts.files"]
    assert evidence["artifacts.unsafe"].setting["path"] == "evil.pt"
    assert evidence.worst == Severity.CRITICAL


def test_nothing_recognised_is_a_failed_finding(tmp_path):
    evidence = inspect_artifact(tmp_path)
    assert evidence["artifacts.nothing_recognised"].status == "failed" and evidence.worst == Severity.HIGH
    (tmp_path / "README.md").write_text("weights elsewhere")
    (tmp_path / "config.json").write_text("{}")
    evidence = inspect_artifact(tmp_path)
    assert evidence["artifacts.nothing_recognised"].n == 2 and evidence.worst == Severity.HIGH
    torch.save({"w": torch.ones(1)}, tmp_path / "model.pt")
    assert inspect_artifact(tmp_path).worst == Severity.INFO


def test_a_digest_on_the_deny_list_is_critical(folder):
    bad = hashlib.sha256((folder / "model.pt").read_bytes()).hexdigest()
    evidence = inspect_artifact(folder, deny={bad})
    assert evidence["artifacts.denied"].severity == Severity.CRITICAL
    assert evidence["artifacts.denied"].setting["path"] == "model.pt"
    assert verdicts(evidence)["model.safetensors"] == ("accepted", Severity.INFO)
    for wrong in ({"abc"}, {bad.upper()}, {3}, bad, 3):
        with pytest.raises(ConfigurationError, match="SHA-256"):
            inspect_artifact(folder, deny=wrong)


def test_payloads_keep_their_verdict_under_any_name(tmp_path):
    """Scanners that go by the extension skip these."""
    for name in ("model.model", "model.npy", "model", "model.txt", "model.json", "weights.dat"):
        path = tmp_path / name
        for data in (HEAD + mkdir("x") + b".", b"cposix\nmkdir\n(S'x'\ntR.", b"\x80\x04" + mkdir("x") + b"."):
            path.write_bytes(data)
            evidence = inspect_artifact(path)
            assert evidence["artifacts.unsafe"].severity == Severity.CRITICAL, (name, data)


def test_tampered_archives_still_name_what_they_hide(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(checkpoint(state(mkdir("x"))) + b"trailing")
    assert inspect_artifact(path)["artifacts.unsafe"].setting["globals"] == ["posix.mkdir"]


def test_files_over_a_limit_and_lying_extensions_are_unsafe(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(header_file({}, b""))
    assert "content that .pt names" in inspect_artifact(path)["artifacts.unsafe"].setting["reason"]
    (tmp_path / "big.pt").write_bytes(saved({"w": torch.ones(1000)}))
    evidence = inspect_artifact(tmp_path, limits=Limits(max_file_bytes=3000))
    assert "max_file_bytes" in evidence["artifacts.unreadable"].setting["reason"]
    with pytest.raises(UnsafeArtifact, match="max_file_bytes"):
        inspect_artifact(tmp_path / "big.pt", limits=Limits(max_file_bytes=3000))
    with pytest.raises(UnsafeArtifact, match="max_members"):
        inspect_artifact(tmp_path, limits=Limits(max_members=1))


def test_folders_that_are_links_or_too_deep_are_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(UnsafeArtifact, match="a folder, not a link"):
        inspect_artifact(tmp_path / "link")
    deep = tmp_path / "/".join(["d"] * 40)
    deep.mkdir(parents=True)
    with pytest.raises(UnsafeArtifact, match="deep"):
        inspect_artifact(tmp_path)
    with pytest.raises(UnsafeArtifact, match="No such file"):
        inspect_artifact(tmp_path / "absent")


def test_names_are_read_through_texts_memo_and_stacked_pickles():
    stack = b"\x80\x04\x8c\x05posix\x94\x8c\x05mkdir\x94\x93."
    memo = b"\x80\x04\x8c\x05mkdir\x94\x8c\x05posix\x940h\x01h\x00\x93."
    assert find_globals(stack) == ["posix.mkdir"]
    assert find_globals(memo) == ["posix.mkdir"]
    assert find_globals(HEAD + b"N." + HEAD + b"cos\nsystem\n.") == ["os.system"]
    assert find_globals(b"\xff\xff" + HEAD + b"cos\nsystem\n.") == ["os.system"]
    assert find_globals(b"(ios\nsystem\n.") == ["os.system"]
    assert find_globals(HEAD + b"\x82\x05.") == ["extension registry code 5"]
    assert find_globals(HEAD + b"\x95\x02\0\0\0\0\0\0\0" + text("a") + b"cos\nsystem\n") == ["os.system"]
    assert find_globals(b"") == []
