import dataclasses
import json
import os
import sys

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aidefend import ConfigurationError, MissingExtra, UnsafeArtifact
from aidefend.artifacts import Limits, Manifest, safe_load

SECRET = bytes(range(32))


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "model"
    (place / "sub").mkdir(parents=True)
    torch.save({"w": torch.ones(2)}, place / "model.pt")
    (place / "config.json").write_text("{}")
    (place / "sub/notes.txt").write_text("hello")
    return place


@pytest.fixture(scope="module")
def key():
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def test_files_are_listed_sorted_with_size_and_digest(folder):
    manifest = Manifest.of(folder)
    assert [item.path for item in manifest.files] == ["config.json", "model.pt", "sub/notes.txt"]
    assert manifest.files[2].size == 5
    assert manifest.files[2].sha256 == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # of "hello"
    assert manifest.digest == Manifest.of(folder).digest and len(manifest.digest) == 64
    manifest.verify(folder)
    single = Manifest.of(folder / "model.pt")
    single.verify(folder / "model.pt")
    assert single.kind == "file" and single.digest != manifest.digest


def change(folder):
    (folder / "config.json").write_text("[]")


def remove(folder):
    (folder / "sub/notes.txt").unlink()


def add(folder):
    (folder / "sub/new.txt").write_text("x")


def swap(folder):
    one, two = folder / "config.json", folder / "sub/notes.txt"
    one_text = one.read_text()
    one.write_text(two.read_text())
    two.write_text(one_text)


def grow(folder):
    with (folder / "model.pt").open("ab") as file:
        file.write(b"\0")


def link(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("sub/notes.txt")


def escape(folder):
    (folder.parent / "outside").write_text("{}")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../outside")


def link_folder(folder):
    (folder / "more").symlink_to("sub")


def pipe(folder):
    os.mkfifo(folder / "pipe")


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (change, r"changed: config.json \(1\)"),
        (remove, r"missing: sub/notes.txt \(1\)"),
        (add, r"extra: sub/new.txt \(1\)"),
        (swap, r"changed: config.json, sub/notes.txt \(2\)"),
        (grow, r"changed: model.pt"),
        (link, r'config.json: a link; Limits\(links="within"\)'),
        (escape, "a link"),
        (link_folder, "more: a link"),
        (pipe, "not a regular file"),
    ],
)
def test_every_difference_is_refused(tamper, words, folder):
    manifest = Manifest.of(folder)
    tamper(folder)
    with pytest.raises(UnsafeArtifact, match=words):
        manifest.verify(folder)


def test_links_within_are_read_and_escaping_ones_refused(folder):
    within = Limits(links="within")
    link(folder)
    with pytest.raises(UnsafeArtifact, match="Limits"):
        Manifest.of(folder)
    manifest = Manifest.of(folder, limits=within)
    assert manifest.files[0].size == 5
    manifest.verify(folder, limits=within)
    (folder / "sub/notes.txt").write_text("HELLO")
    with pytest.raises(UnsafeArtifact, match=r"changed: config\.json, sub/notes\.txt"):
        manifest.verify(folder, limits=within)
    escape(folder)
    with pytest.raises(UnsafeArtifact, match="stays within"):
        Manifest.of(folder, limits=within)
    (folder / "config.json").unlink()
    link_folder(folder)
    with pytest.raises(UnsafeArtifact, match="a link to a folder"):
        Manifest.of(folder, limits=within)


def test_a_file_kind_and_a_folder_kind_do_not_stand_for_each_other(folder):
    with pytest.raises(UnsafeArtifact, match="a folder, as in the manifest"):
        Manifest.of(folder).verify(folder / "model.pt")
    with pytest.raises(UnsafeArtifact, match="a file, as in the manifest"):
        Manifest.of(folder / "model.pt").verify(folder)
    empty = folder / "empty"
    empty.mkdir()
    with pytest.raises(UnsafeArtifact, match="at least one file"):
        Manifest.of(empty)
    with pytest.raises(UnsafeArtifact, match="No such file"):
        Manifest.of(folder / "absent")


def test_the_manifest_may_live_in_its_folder_and_nothing_else_may(folder, key):
    signed = Manifest.of(folder).sign(key)
    signed.save(folder / "aidefend-manifest.json")
    loaded = Manifest.load(folder / "aidefend-manifest.json")
    assert loaded == signed and Manifest.of(folder).digest == signed.digest
    loaded.verify(folder, key.public_key())
    (folder / "sub/aidefend-manifest.json").write_text("{}")
    with pytest.raises(UnsafeArtifact, match=r"extra: sub/aidefend-manifest.json"):
        loaded.verify(folder, key.public_key())


def test_a_link_in_the_excluded_place_is_refused(folder):
    manifest = Manifest.of(folder)
    (folder / "aidefend-manifest.json").symlink_to("/etc/passwd")
    with pytest.raises(UnsafeArtifact, match="a link"):
        manifest.verify(folder)


def test_signatures_need_the_trusted_key(folder, key):
    plain, ed, mac = Manifest.of(folder), Manifest.of(folder).sign(key), Manifest.of(folder).sign(SECRET)
    ed.verify(folder, key.public_key())
    mac.verify(folder, SECRET)
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    refused = [
        (ed, None, "trusted key for a signed"),
        (mac, None, "trusted key for a signed"),
        (plain, key.public_key(), "a signed manifest"),
        (plain, SECRET, "a signed manifest"),
        (ed, other.public_key(), "by the trusted key"),
        (mac, bytes(range(1, 33)), "by the trusted key"),
        (ed, SECRET, "kind hmac-sha256"),
        (mac, key.public_key(), "kind ed25519"),
    ]
    for manifest, trusted, words in refused:
        with pytest.raises(UnsafeArtifact, match=words):
            manifest.verify(folder, trusted)


def test_a_public_key_cannot_serve_as_an_hmac_secret(folder, key):
    """The classic confusion: an attacker signs by HMAC with the public key that the verifier trusts."""
    public = key.public_key()
    raw = public.public_bytes_raw()
    forged = Manifest.of(folder).sign(raw)
    with pytest.raises(UnsafeArtifact, match="kind ed25519"):
        forged.verify(folder, public)
    encoding, form = serialization.Encoding, serialization.PublicFormat
    for encoded in (
        public.public_bytes(encoding.PEM, form.SubjectPublicKeyInfo),
        public.public_bytes(encoding.DER, form.SubjectPublicKeyInfo),
        public.public_bytes(encoding.OpenSSH, form.OpenSSH),
    ):
        with pytest.raises(ConfigurationError, match="not an encoded key"):
            forged.verify(folder, encoded)
        with pytest.raises(ConfigurationError, match="not an encoded key"):
            forged.sign(encoded)


def test_wrong_keys_are_named(folder, key):
    manifest = Manifest.of(folder)
    signed = manifest.sign(key)
    for call, words in [
        (lambda: manifest.sign(b"short"), "at least 16 random bytes"),
        (lambda: manifest.sign("password"), "Ed25519 private key or bytes"),
        (lambda: manifest.sign(key.public_key()), "private key to sign with"),
        (lambda: signed.verify(folder, key), "public key to verify with"),
        (lambda: signed.verify(folder, "password"), "Ed25519 public key or bytes"),
        (lambda: Manifest.of(folder, exclude=["../x"]), "exact relative paths"),
        (lambda: Manifest.of(3), "path to be a file name"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            call()


def test_without_cryptography_only_hmac_works(folder, key, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("cryptography.hazmat.primitives.asymmetric")]:
        monkeypatch.setitem(sys.modules, name, None)
    manifest = Manifest.of(folder)
    manifest.sign(SECRET).verify(folder, SECRET)
    with pytest.raises(MissingExtra, match=r"aidefend\[sign\]"):
        manifest.sign(key)


def test_a_forger_who_repairs_the_digest_still_lacks_the_signature(folder, key):
    signed = Manifest.of(folder).sign(key)
    change(folder)
    forged = dataclasses.replace(Manifest.of(folder), signature=signed.signature)
    assert forged.digest != signed.digest
    with pytest.raises(UnsafeArtifact, match="signature by the trusted key"):
        forged.verify(folder, key.public_key())
    for other in (dataclasses.replace(signed, excluded=("config.json",)), dataclasses.replace(signed, kind="file")):
        with pytest.raises(UnsafeArtifact, match="signature by the trusted key"):
            other.check_signature(key.public_key())


def test_a_signature_covers_paths_sizes_digests_kind_and_exclusions(folder, key, tmp_path):
    path = tmp_path / "manifest.json"
    Manifest.of(folder).sign(key).save(path)
    honest = json.loads(path.read_text())
    for edit in (
        lambda body: body["files"][0].update(path="confih.json"),
        lambda body: body["files"][0].update(size=3),
        lambda body: body["files"][0].update(sha256="0" * 64),
        lambda body: body["files"].pop(),
        lambda body: body.update(excluded=["zzz"]),
        lambda body: body.update(digest="0" * 64),
    ):
        body = json.loads(json.dumps(honest))
        edit(body)
        path.write_text(json.dumps(body))
        with pytest.raises(UnsafeArtifact, match="digest"):
            Manifest.load(path)
    for edit in (
        lambda signature: signature.update(value="0" * 128),
        lambda signature: signature.update(key_id="0" * 16),
    ):
        body = json.loads(json.dumps(honest))
        edit(body["signature"])
        path.write_text(json.dumps(body))
        with pytest.raises(UnsafeArtifact, match="signature by the trusted key"):
            Manifest.load(path).verify(folder, key.public_key())
    body = {**honest, "signature": None}
    path.write_text(json.dumps(body))
    with pytest.raises(UnsafeArtifact, match="a signed manifest"):
        Manifest.load(path).verify(folder, key.public_key())


DIGEST = "0" * 64
FILE = {"path": "a", "size": 1, "sha256": DIGEST}


def body(**changes):
    start = {"schema": "aidefend.manifest/1", "kind": "folder", "files": [FILE], "excluded": [], "signature": None}
    return {**start, "digest": DIGEST, **changes}


def paths(*names):
    return body(files=[{**FILE, "path": name} for name in names])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "JSON"),
        (b"\xff", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"schema":1,"schema":2}', "a field occurs twice"),
        (b'{"size": 1.5}', "no whole number"),
        (b'{"size": NaN}', "no whole number"),
        (b"[]", "schema"),
        ({**body(), "more": 1}, "exactly"),
        ({key: value for key, value in body().items() if key != "excluded"}, "exactly"),
        (body(schema="aidefend.manifest/2"), "schema"),
        (body(kind="both"), "a kind"),
        (body(digest="F" * 64), "a kind and a digest"),
        (body(files=[]), "a list of files"),
        (body(files={}), "a list of files"),
        (body(kind="file", files=[FILE, {**FILE, "path": "b"}]), "a list of files"),
        (body(kind="file", files=[{**FILE, "path": "a/b"}]), "sorted by path"),
        (body(files=[{**FILE, "mode": 1}]), "path, size and sha256"),
        (body(files=[{**FILE, "size": True}]), "a size"),
        (body(files=[{**FILE, "size": -1}]), "a size"),
        (body(files=[{**FILE, "sha256": "0" * 63}]), "a SHA-256"),
        (body(files=[{**FILE, "sha256": "G" * 64}]), "a SHA-256"),
        (paths("b", "a"), "sorted by path"),
        (paths("a", "a"), "differ in more than case"),
        (paths("A", "a"), "differ in more than case"),
        (paths("stra\u00dfe", "strasse"), "differ in more than case"),
        (paths("cafe\u0301"), "NFC"),
        (paths("../a"), "plain relative path"),
        (paths("/etc/passwd"), "plain relative path"),
        (paths("a//b"), "plain relative path"),
        (paths("a/./b"), "plain relative path"),
        (paths(""), "plain relative path"),
        (paths("a\\b"), "plain relative path"),
        (paths("C:a"), "plain relative path"),
        (paths("a\0b"), "plain relative path"),
        (paths("a\u202eb"), "plain relative path"),
        (paths("a", "a/b"), "either file or folder"),
        (body(excluded=["b", "a"]), "sorted list"),
        (body(excluded=["../a"]), "sorted list"),
        (body(kind="file", excluded=["b"]), "sorted list"),
        (body(signature="x"), "algorithm, key_id and value"),
        (body(signature={"algorithm": "none", "key_id": "", "value": ""}), "ed25519 or hmac"),
        (body(signature={"algorithm": [], "key_id": "", "value": ""}), "ed25519 or hmac"),
        (body(signature={"algorithm": "hmac-sha256", "key_id": "", "value": "0" * 63}), "lower-case hex"),
        (body(signature={"algorithm": "ed25519", "key_id": "", "value": "0" * 128}), "lower-case hex"),
        (body(), "digest"),
    ],
)
def test_malformed_manifests_are_refused(content, words, tmp_path):
    path = tmp_path / "manifest.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(UnsafeArtifact, match=words):
        Manifest.load(path)


def test_a_manifest_that_is_too_large_or_a_link_is_refused(folder, tmp_path):
    path = tmp_path / "manifest.json"
    Manifest.of(folder).save(path)
    with pytest.raises(UnsafeArtifact, match="max_header_bytes"):
        Manifest.load(path, limits=Limits(max_header_bytes=100))
    with pytest.raises(UnsafeArtifact, match="max_members"):
        Manifest.load(path, limits=Limits(max_members=2))
    with pytest.raises(UnsafeArtifact, match="max_members"):
        Manifest.of(folder, limits=Limits(max_members=2))
    (tmp_path / "link.json").symlink_to(path)
    with pytest.raises(UnsafeArtifact, match="not a link"):
        Manifest.load(tmp_path / "link.json")


def test_names_that_collide_or_do_not_travel_are_not_listed(tmp_path):
    for number, names in enumerate((["A", "a"], ["a\nb"], [b"\xff\xfe"], ["a\\b"], ["cafe\u0301"])):
        place = tmp_path / str(number)
        place.mkdir()
        for name in names:
            with open(os.fsencode(place) + b"/" + os.fsencode(name), "wb") as file:  # noqa: PTH123
                file.write(b"x")
        with pytest.raises(UnsafeArtifact, match=r"plain relative path|differ in more"):
            Manifest.of(place)


def test_safe_load_compares_the_bytes_that_it_parses(folder, key):
    manifest = Manifest.of(folder).sign(key)
    public = key.public_key()
    path = folder / "model.pt"
    assert safe_load(path, manifest=manifest, key=public)["w"].sum() == 2
    assert safe_load(os.path.relpath(path), manifest=manifest, key=public)["w"].sum() == 2
    with pytest.raises(UnsafeArtifact, match="trusted key"):
        safe_load(path, manifest=manifest)
    with pytest.raises(UnsafeArtifact, match="a signed manifest"):
        safe_load(path, manifest=Manifest.of(folder), key=public)
    torch.save({"w": torch.zeros(2)}, folder / "sub/other.pt")
    with pytest.raises(UnsafeArtifact, match="a file that the manifest lists"):
        safe_load(folder / "sub/other.pt", manifest=manifest, key=public)
    torch.save({"w": torch.zeros(2)}, path)
    with pytest.raises(UnsafeArtifact, match="SHA-256"):
        safe_load(path, manifest=manifest, key=public)


def test_one_listed_file_cannot_stand_for_another(folder):
    torch.save({"w": torch.zeros(2)}, folder / "sub/model.pt")
    manifest = Manifest.of(folder)
    assert safe_load(folder / "sub/model.pt", manifest=manifest)["w"].sum() == 0
    (folder / "sub/model.pt").write_bytes((folder / "model.pt").read_bytes())
    with pytest.raises(UnsafeArtifact, match="SHA-256"):
        safe_load(folder / "sub/model.pt", manifest=manifest)
