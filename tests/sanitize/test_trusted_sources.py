"""Manifests: only what was hashed is kept, each change is named by its record, and nothing passes unchecked."""

import copy
import hashlib
import hmac
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aidefend import AidefendError, ConfigurationError, UnsafeArtifact
from aidefend.sanitize import Source, TrustedSources, verify_sources
from aidefend.sanitize.sources.digests import record_digest

KEY = b"the key of whoever vouches"
RECORDS = {
    "http://a/1": b"cat",
    "http://a/2": "dog",
    "http://a/3": torch.arange(6.0).reshape(2, 3),
    "4": {"q": [1, "x"]},
}


def signer(message):
    return hmac.digest(KEY, message, "sha256")


def verifier(message, signature):
    return hmac.compare_digest(signer(message), signature)


def web(records=None, **fields):
    return TrustedSources([Source.of("web", RECORDS if records is None else records, licence="CC0-1.0", **fields)])


def test_what_was_hashed_verifies_and_its_order_does_not_matter():
    report = verify_sources(web(), {"web": list(RECORDS.items())[::-1]})
    assert report.keep.all() and report.ids[0] == "web/4" and report.reasons == ((),) * 4
    assert report.parameters["missing_count"] == 0 and "not signed" in report.limits


CHANGES = {
    "another content": ("http://a/1", b"cut", "changed"),
    "another type of the same look": ("http://a/1", np.frombuffer(b"cat", dtype=np.uint8), "changed"),
    "one element": ("http://a/3", torch.arange(6.0).reshape(2, 3) + torch.tensor([0, 0, 1e-6]), "changed"),
    "another shape": ("http://a/3", torch.arange(6.0).reshape(3, 2), "changed"),
    "another dtype": ("http://a/3", torch.arange(6.0).double().reshape(2, 3), "changed"),
    "a value deep inside": ("4", {"q": [1, "y"]}, "changed"),
    "a number that is a text": ("4", {"q": ["1", "x"]}, "changed"),
    "an unknown id": ("http://b/1", b"cat", "unknown"),
    "an object": ("http://a/1", object(), "not read"),
    "an object inside": ("4", {"q": object()}, "not read"),
    "an array of objects": ("http://a/3", np.array([object()]), "not read"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_named_by_its_record_and_the_others_stay(change):
    record_id, record, reason = CHANGES[change]
    report = verify_sources(web(), {"web": {**RECORDS, record_id: record}})
    refused = [report.ids[row] for row in report.quarantine_indices.tolist()]
    assert refused == [f"web/{record_id}"]
    assert report.reasons[report.ids.index(f"web/{record_id}")][0].startswith(reason)


def test_records_that_swap_their_content_both_fail():
    swapped = {**RECORDS, "http://a/1": "dog", "http://a/2": b"cat"}
    assert verify_sources(web(), {"web": swapped}).keep.tolist() == [False, False, True, True]


@given(st.binary(max_size=40), st.integers(0, 39), st.integers(0, 7))
def test_every_flipped_bit_is_seen(content, byte, bit):
    flipped = bytearray(content)
    if byte < len(flipped):
        flipped[byte] ^= 1 << bit
        report = verify_sources(web({"a": content}), {"web": {"a": bytes(flipped)}})
        assert not report.keep.any()


def test_bytes_written_like_an_array_do_not_pass_for_it():
    array = np.arange(3, dtype=np.int64)
    form = b"array <i8 (3,)\0" + array.tobytes()
    assert hashlib.sha3_256(form).hexdigest() == record_digest(array)
    assert record_digest(form) != record_digest(array)
    assert record_digest(b"cat") == hashlib.sha256(b"cat").hexdigest() == record_digest("cat")


def test_equal_content_has_one_digest_however_it_is_held():
    x = torch.arange(12).reshape(3, 4)
    assert (
        record_digest(x)
        == record_digest(x.numpy())
        == record_digest(x.T.contiguous().T)
        == record_digest(x[:, :].clone())
    )
    assert record_digest({"b": 1, "a": 2}) == record_digest({"a": 2, "b": 1})


def test_repeated_unknown_and_missing_records():
    pairs = [("http://a/1", b"cat"), ("http://a/1", b"cat"), ("http://a/1", b"dog")]
    report = verify_sources(web(), {"web": pairs, "elsewhere": {"x": b"y"}})
    assert report.ids == ("web/http://a/1", "web/http://a/1#1", "web/http://a/1#2", "elsewhere/x")
    assert report.keep.tolist() == [True, False, False, False]
    assert [row[0].split(":")[0] for row in report.reasons[1:]] == ["repeated", "repeated", "unknown"]
    assert report.parameters["missing"] == {"web": ["4", "http://a/2", "http://a/3"]}
    with pytest.raises(UnsafeArtifact, match="everything that the manifest lists"):
        verify_sources(web(), {"web": pairs}, complete=True)
    with pytest.raises(UnsafeArtifact, match="web"):
        verify_sources(web(), {}, complete=True)


def test_files_are_compared_as_a_whole(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(b"a,b\n1,2\n")
    trusted = TrustedSources([Source.of("train", path, licence="MIT")])
    assert verify_sources(trusted, {"train": path}).keep.all()
    assert verify_sources(trusted, {"train": b"a,b\n1,2\n"}).keep.all()
    assert trusted.read("train", path) == b"a,b\n1,2\n"
    assert not verify_sources(trusted, {"train": {"row": b"a,b\n1,2\n"}}).keep.any()  # no records are listed
    path.write_bytes(b"a,b\n1,3\n")
    report = verify_sources(trusted, {"train": path})
    assert not report.keep.any() and "changed" in report.reasons[0][0]
    with pytest.raises(UnsafeArtifact, match="SHA-256"):
        trusted.read("train", path)
    for wrong in (tmp_path, tmp_path / "none"):
        assert "not read" in verify_sources(trusted, {"train": wrong}).reasons[0][0]
        with pytest.raises(UnsafeArtifact):
            trusted.read("train", wrong)
    with pytest.raises(UnsafeArtifact, match="source of the manifest"):
        trusted.read("other", path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafeArtifact, match="regular file"):
        Source.of("pipe", tmp_path / "pipe")


def test_the_signature_decides_and_fails_closed():
    signed = web().signed(signer)
    assert verify_sources(signed, {"web": RECORDS}, verifier=verifier).keep.all()
    other = TrustedSources([Source.of("web", {**RECORDS, "http://a/1": b"poison"})], signed.signature)

    def breaks(message, signature):
        raise ValueError("invalid signature")

    cases = {
        "no verifier": (signed, None),
        "not signed": (web(), verifier),
        "another key": (web().signed(lambda message: hmac.digest(b"mine", message, "sha256")), verifier),
        "other content under the signature": (other, verifier),
        "a verifier that raises": (signed, breaks),
        "a verifier that returns nothing": (signed, lambda message, signature: None),
        "a verifier that returns something true": (signed, lambda message, signature: "yes"),
    }
    for trusted, check in cases.values():
        with pytest.raises(UnsafeArtifact):
            verify_sources(trusted, {"web": RECORDS}, verifier=check)
        with pytest.raises(UnsafeArtifact):
            trusted.read("web", "none", verifier=check)


def test_the_signature_covers_every_field():
    message = web(url="http://a").message
    for changed in (
        web(url="http://b"),
        TrustedSources([Source.of("web", RECORDS, licence="MIT", url="http://a")]),
        TrustedSources([Source.of("wob", RECORDS, licence="CC0-1.0", url="http://a")]),
        web({**RECORDS, "new": b""}, url="http://a"),
    ):
        assert changed.message != message
    assert web(url="http://a").message == message


def test_a_real_key_signs(tmp_path):
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    key = ed25519.Ed25519PrivateKey.generate()

    def check(message, signature):
        key.public_key().verify(signature, message)
        return True

    web().signed(key.sign).save(tmp_path / "sources.json")
    loaded = TrustedSources.load(tmp_path / "sources.json")
    assert verify_sources(loaded, {"web": RECORDS}, verifier=check).keep.all()


def test_licences_that_are_not_accepted_are_not_kept():
    assert verify_sources(web(), {"web": RECORDS}, licences=["CC0-1.0"]).keep.all()
    report = verify_sources(web(), {"web": RECORDS}, licences={"MIT"})
    assert not report.keep.any() and "licence CC0-1.0" in report.reasons[0][0]


def test_the_report_goes_into_the_house(tmp_path):
    report = verify_sources(web(), {"web": {**RECORDS, "http://a/1": b"cut"}})
    assert report.to_evidence()["verify_sources.rejected_share"].value == 0.25
    report.save(tmp_path / "report.safetensors")


def test_manifests_come_back_whole_and_pickle(tmp_path):
    signed = web(url="https://a/b").signed(signer)
    signed.save(tmp_path / "sources.json")
    loaded = TrustedSources.load(tmp_path / "sources.json")
    assert loaded.digest == signed.digest and loaded.signature == signed.signature and loaded["web"] == signed["web"]
    assert pickle.loads(pickle.dumps(signed)).digest == signed.digest == copy.deepcopy(signed).digest
    with pytest.raises(TypeError):
        signed["web"].records["new"] = "0" * 64


def test_an_altered_manifest_is_refused(tmp_path):
    path = tmp_path / "sources.json"
    web().save(path)
    good = path.read_text()
    body = json.loads(good)
    forged = [{**body, "schema": "other"}, {**body, "extra": 1}, {**body, "sources": [{}]}, {**body, "signature": "zz"}]
    forged += [{**body, "sources": 2 * body["sources"]}, {**body, "digest": "0" * 64}, [], 5, {**body, "signature": 5}]
    texts = [good.replace("CC0", "CC1"), good[:-9], "", "[" * 10**5, '{"a": 1, "a": 1}', '{"a": NaN}', '{"a": 1e999}']
    for text in [*map(json.dumps, forged), *texts]:
        path.write_text(text)
        with pytest.raises(UnsafeArtifact):
            TrustedSources.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UnsafeArtifact):
        TrustedSources.load(path)


def test_malformed_calls_raise():
    digest = "0" * 64
    for make in (
        lambda: Source("", "MIT", digest),
        lambda: Source("a\nb", "MIT", digest),
        lambda: Source("a\u202eb", "MIT", digest),
        lambda: Source("a", "MIT", "A" * 64),
        lambda: Source("a", "MIT", digest, {"x": "short"}),
        lambda: Source.of("a", 5),
        lambda: Source.of("a", [("x", b""), ("x", b"")]),
        lambda: Source.of("a", {"x": object()}),
        lambda: Source.of("a", [1, 2]),
        lambda: TrustedSources([Source("a", "", digest)] * 2),
        lambda: TrustedSources("text"),
        lambda: web().signed(lambda message: "text"),
        lambda: verify_sources("text", {}),
        lambda: verify_sources(web(), [("web", b"")]),
        lambda: verify_sources(web(), {"web": 5}),
        lambda: verify_sources(web(), {"web": [1]}),
        lambda: verify_sources(web(), {"web": (1 / 0 for _ in range(2))}),
        lambda: verify_sources(web(), {}, verifier="text"),
    ):
        with pytest.raises(AidefendError) as raised:
            make()
        assert isinstance(raised.value, ConfigurationError)
