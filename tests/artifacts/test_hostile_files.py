import dataclasses
import os
import pickle
import socket
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from aidefend import Severity, UnsafeArtifact
from aidefend.artifacts import Limits, inspect_artifact, safe_load
from tests.artifacts.hostile import Hostile, corpus
from tests.artifacts.hostile_pickles import GADGETS, HEAD, checkpoint, mkdir, state, tensor

MARKER = "/tmp/aidefend-corpus-marker"  # noqa: S108  # replaced by a folder of the test's own
NAMES = [case.name for case in corpus(MARKER)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus")


@pytest.fixture(scope="module")
def cases(place) -> list[Hostile]:
    return corpus(str(place / "marker"))


def test_the_corpus_is_large_and_its_names_differ():
    assert len(NAMES) >= 250
    assert len({(case.filename, case.data) for case in corpus(MARKER)}) >= 250


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_each_file_is_refused_with_its_reason_and_nothing_runs(index, cases, place):
    case = cases[index]
    path = place / case.filename
    path.write_bytes(case.data)
    modules = set(sys.modules)
    with pytest.raises(UnsafeArtifact, match=case.words) as caught:
        safe_load(path)
    assert str(caught.value).startswith("Expected ") and str(caught.value).endswith(".")
    assert not (place / "marker").exists()
    named = {name.rpartition(".")[0] for name in GADGETS}
    assert not (set(sys.modules) - modules) & named


def test_no_file_of_the_corpus_is_accepted_by_inspection(cases, place):
    values = ("NaN", "infinity", "complex NaN", "float8 NaN", "NaN in safetensors", "bool of 2")  # judged on loading
    for case in cases:
        path = place / case.filename
        path.write_bytes(case.data)
        evidence = inspect_artifact(path)
        if case.name not in values:
            assert "artifacts.accepted" not in evidence, case.name
            assert evidence.findings[0].id != "artifacts.text", case.name
        if case.name.startswith("gadget"):
            innocent = case.name.split()[1].startswith(
                ("torch.nn.", "torch._utils._rebuild", "numpy.core", "numpy._core")
            )
            assert evidence["artifacts.unsafe"].severity == (Severity.HIGH if innocent else Severity.CRITICAL), (
                case.name
            )
            assert case.name.removeprefix("gadget ") in evidence["artifacts.unsafe"].setting["globals"]
    assert not (place / "marker").exists()


def test_the_payload_is_live(tmp_path):
    """The planted violation: unsafe loaders do run what the corpus holds."""
    marker = tmp_path / "marker"
    pickle.loads(HEAD + mkdir(str(marker)) + b".")
    assert marker.is_dir()
    marker.rmdir()
    path = tmp_path / "model.pt"
    path.write_bytes(checkpoint(state(mkdir(str(marker)))))
    torch.load(path, weights_only=False)
    assert marker.is_dir()


def test_the_writer_of_the_corpus_is_honest_when_it_does_not_lie(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(checkpoint(state(tensor((2, 2), (2, 1)))))
    assert torch.equal(safe_load(path)["weight"], torch.zeros(2, 2))
    assert torch.equal(torch.load(path, weights_only=True)["weight"], torch.zeros(2, 2))


def test_names_that_a_user_made_safe_for_torch_stay_refused(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(checkpoint(state(b"cfractions\nFraction\n)R")))
    from fractions import Fraction

    with torch.serialization.safe_globals([Fraction]):
        assert torch.load(path, weights_only=True)["weight"] == 0
        with pytest.raises(UnsafeArtifact, match=r"fractions\.Fraction"):
            safe_load(path)


def test_torch_alone_accepts_what_the_structural_limits_refuse(tmp_path):
    """Why weights_only=True is not the end: the giant loads, in a kilobyte."""
    path = tmp_path / "giant.pt"
    torch.save({"w": torch.zeros(1).expand(10**12)}, path)
    assert torch.load(path, weights_only=True)["w"].numel() == 10**12
    with pytest.raises(UnsafeArtifact, match="each element once"):
        safe_load(path)


def test_links_pipes_folders_devices_and_sockets_are_refused_without_hanging(tmp_path):
    good = tmp_path / "good.pt"
    torch.save({"w": torch.ones(1)}, good)
    (tmp_path / "link.pt").symlink_to(good)
    (tmp_path / "dangling.pt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        for name, words in {
            "link.pt": 'Limits.links="within"',
            "dangling.pt": "not a link",
            "loop.pt": "not a link",
            "pipe.pt": "pipe",
            "s": "opened|socket",
            ".": "regular file",
            "absent.pt": "No such file",
            "bad\0name": "opened",
        }.items():
            with pytest.raises(UnsafeArtifact, match=words):
                safe_load(f"{tmp_path}/{name}")
    with pytest.raises(UnsafeArtifact, match="device"):
        safe_load("/dev/zero")


def test_links_within_a_folder_load_and_those_that_leave_it_do_not(tmp_path):
    blobs, snapshot = tmp_path / "cache/blobs", tmp_path / "cache/snapshots/main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    torch.save({"w": torch.ones(1)}, blobs / "abc")
    torch.save({"w": torch.ones(1)}, tmp_path / "outside")
    (snapshot / "model.pt").symlink_to("../../blobs/abc")
    (snapshot / "escape.pt").symlink_to("../../../outside")
    within = Limits(links="within", root=tmp_path / "cache")
    assert torch.equal(safe_load(snapshot / "model.pt", limits=within)["w"], torch.ones(1))
    with pytest.raises(UnsafeArtifact, match="stays within"):
        safe_load(snapshot / "escape.pt", limits=within)
    with pytest.raises(UnsafeArtifact, match="stays within"):
        safe_load(snapshot / "model.pt", limits=Limits(links="within"))
    with pytest.raises(UnsafeArtifact, match="not a link"):
        safe_load(snapshot / "model.pt", limits=Limits(root=tmp_path))


def test_a_swap_between_resolving_and_opening_cannot_leave_the_root(tmp_path, monkeypatch):
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    torch.save({"w": torch.ones(1)}, root / "inner/model.pt")
    (root / "link.pt").symlink_to("inner/model.pt")
    resolve = Path.resolve

    def swap(self, strict=False):
        target = resolve(self, strict=strict)
        if self.name == "link.pt" and (root / "inner").is_dir() and not (root / "inner").is_symlink():
            (root / "inner").rename(tmp_path / "elsewhere")
            (root / "inner").symlink_to(tmp_path / "elsewhere")
        return target

    monkeypatch.setattr(Path, "resolve", swap)
    with pytest.raises(UnsafeArtifact, match="can be opened"):
        safe_load(root / "link.pt", limits=Limits(links="within"))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(max_file_bytes=100), "max_file_bytes"),
        (Limits(max_total_bytes=100), "max_total_bytes"),
        (Limits(max_header_bytes=10), "max_header_bytes"),
        (Limits(max_members=2), "max_members"),
        (Limits(max_items=1), "max_items"),
        (Limits(dtypes=frozenset({torch.float64})), "accepted number type"),
    ],
)
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_each_limit_is_kept(limits, words, name, tmp_path):
    weights = {"a": torch.ones(64), "b": torch.ones(64), "c": torch.ones(64)}
    if name == "model.pt":
        torch.save(weights, tmp_path / name)
    else:
        safetensors.torch.save_file(weights, tmp_path / name)
        words = words.replace("max_items", "max_members")  # a header has no items but its tensors
        limits = dataclasses.replace(limits, max_members=min(limits.max_members, max(limits.max_items, 2)))
    with pytest.raises(UnsafeArtifact, match=words):
        safe_load(tmp_path / name, limits=limits)


def test_many_views_of_one_storage_are_bounded(tmp_path):
    base = torch.arange(1000.0)
    torch.save({f"{n}": base[n:] for n in range(4)}, tmp_path / "few.pt")
    torch.save({f"{n}": base[n:] for n in range(40)}, tmp_path / "many.pt")
    torch.save({f"{n}": base for n in range(40)}, tmp_path / "tied.pt")
    assert len(safe_load(tmp_path / "few.pt")) == 4
    assert len(safe_load(tmp_path / "tied.pt")) == 40
    with pytest.raises(UnsafeArtifact, match="max_view_ratio"):
        safe_load(tmp_path / "many.pt")
    assert len(safe_load(tmp_path / "many.pt", limits=Limits(max_view_ratio=40))) == 40
