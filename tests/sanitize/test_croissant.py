"""Croissant files: ours come back as they were, good ones of others are read, hostile ones end in one error."""

import copy
import json

import pytest

from aidefend import ConfigurationError, UnsafeArtifact
from aidefend.sanitize import Source, TrustedSources, verify_sources

DIGEST = "48a7c257f3c90b2a3e529ddd2cca8f4f1bd8e49ed244ef53927649504ac55354"
CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dct": "http://purl.org/dc/terms/",
    "recordSet": "cr:recordSet",
    "sc": "https://schema.org/",
}
PUBLIC = {
    "@context": CONTEXT,
    "@type": "sc:Dataset",
    "name": "passengers",
    "conformsTo": "http://mlcommons.org/croissant/1.0",
    "license": "https://creativecommons.org/licenses/by/4.0/",
    "url": "https://example.org/passengers",
    "distribution": [
        {
            "@type": "cr:FileObject",
            "@id": "passengers.csv",
            "name": "passengers.csv",
            "contentUrl": "data/passengers.csv",
            "encodingFormat": "text/csv",
            "sha256": DIGEST,
        },
        {
            "@type": "cr:FileObject",
            "@id": "images.zip",
            "contentUrl": "https://example.org/images.zip",
            "encodingFormat": "application/zip",
            "sha256": "0" * 64,
            "license": {"@id": "https://spdx.org/licenses/MIT"},
        },
        {"@type": "cr:FileObject", "@id": "1.jpg", "contentUrl": "1.jpg", "containedIn": {"@id": "images.zip"}},
        {"@type": "cr:FileSet", "@id": "rest", "includes": "*.jpg", "containedIn": [{"@id": "images.zip"}]},
    ],
    "recordSet": [{"@type": "cr:RecordSet", "@id": "rows", "field": [{"@type": "cr:Field", "dataType": "sc:Integer"}]}],
}


def read(tmp_path, body, **options):
    path = tmp_path / "croissant.json"
    path.write_text(body if isinstance(body, str) else json.dumps(body))
    return TrustedSources.from_croissant(path, **options)


def changed(*place, value):
    body = copy.deepcopy(PUBLIC)
    at = body
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return body


def test_the_files_of_a_public_description_become_sources(tmp_path):
    trusted = read(tmp_path, PUBLIC)
    assert [source.name for source in trusted.sources] == ["passengers.csv", "images.zip"]
    assert trusted["passengers.csv"].sha256 == DIGEST and trusted["passengers.csv"].url == "data/passengers.csv"
    assert trusted["passengers.csv"].licence == PUBLIC["license"]
    assert trusted["images.zip"].licence == "https://spdx.org/licenses/MIT"
    assert not verify_sources(trusted, {"images.zip": b"other", "rest": b""}).keep.any()


def test_other_spellings_of_the_same_are_read(tmp_path):
    node = {
        "@type": ["https://schema.org/FileObject"],
        "@id": "a",
        "sc:contentUrl": "a.csv",
        "https://schema.org/sha256": DIGEST,
    }
    body = {
        "@type": "https://schema.org/Dataset",
        "http://purl.org/dc/terms/conformsTo": {"@id": "http://mlcommons.org/croissant/1.1"},
        "sc:distribution": node,
    }
    for context in ({}, {"@context": "https://schema.org/"}, {"@context": ["https://schema.org", CONTEXT]}):
        assert read(tmp_path, {**context, **body})["a"].sha256 == DIGEST


def test_ours_come_back_as_they_were_with_records_and_signature(tmp_path):
    sources = [
        Source.of("captions", {"a": "a cat", "b": "a dog"}, licence="CC0-1.0", url="https://example.org/captions"),
        Source.of("train.csv", b"1,2\n", licence="MIT", url="data/train.csv"),
        Source.of("plain", b"", licence=""),
    ]
    signed = TrustedSources(sources).signed(lambda message: b"signature")
    path = tmp_path / "croissant.json"
    signed.to_croissant(path, name="mixture", description="Three sources")
    back = TrustedSources.from_croissant(path)
    assert back.digest == signed.digest and back.signature == b"signature"
    body = json.loads(path.read_text())
    assert body["conformsTo"] == "http://mlcommons.org/croissant/1.0" and body["@type"] == "sc:Dataset"
    kinds = {node["@id"]: node["@type"] for node in body["distribution"]}
    assert kinds == {"captions": "cr:FileSet", "train.csv": "cr:FileObject", "plain": "cr:FileObject"}
    assert "sha256" not in body["distribution"][0]  # a list of digests is no file that others could check


def test_every_file_has_an_address_as_the_format_asks(tmp_path):
    path = tmp_path / "croissant.json"
    TrustedSources([Source.of("../a b", b"")]).to_croissant(path, name="x")
    assert json.loads(path.read_text())["distribution"][0]["contentUrl"] == "..%2Fa%20b"
    assert TrustedSources.from_croissant(path)["../a b"].url == ""
    for wrong in ("file:///etc/passwd", "/etc/passwd", "../x"):
        with pytest.raises(ConfigurationError, match="address"):
            TrustedSources([Source.of("a", b"", url=wrong)]).to_croissant(tmp_path / "no.json", name="x")
    assert [place.name for place in tmp_path.iterdir()] == ["croissant.json"]


def test_files_without_a_digest_are_refused_or_left_out(tmp_path):
    for wrong in ("https://github.com/mlcommons/croissant/issues/80", DIGEST.upper(), DIGEST[:-1], 5, None, [DIGEST]):
        body = changed("distribution", 0, "sha256", value=wrong)
        with pytest.raises(UnsafeArtifact, match="sha256"):
            read(tmp_path, body)
        trusted = read(tmp_path, body, unverifiable="skip")
        assert "passengers.csv" not in trusted
        assert not verify_sources(trusted, {"passengers.csv": b""}).keep.any()
    body = changed("distribution", 2, "containedIn", value={"@id": "elsewhere"})
    with pytest.raises(UnsafeArtifact, match=r"1\.jpg"):
        read(tmp_path, body)
    bare = changed("distribution", value=[{"@type": "cr:FileSet", "@id": "x", "includes": "*"}])
    with pytest.raises(UnsafeArtifact, match="at least one file"):
        read(tmp_path, bare, unverifiable="skip")


def file(**fields):
    return changed("distribution", 0, value={**PUBLIC["distribution"][0], **fields})


HOSTILE = {
    "no object": [],
    "a list": [PUBLIC],
    "another type": changed("@type", value="sc:Recipe"),
    "no version": changed("conformsTo", value="http://example.org"),
    "no files": changed("distribution", value=[]),
    "files that are texts": changed("distribution", value=["a.csv"]),
    "a foreign context": changed("@context", value="https://evil.example/context.jsonld"),
    "a list of contexts, one foreign": changed("@context", value=[CONTEXT, "https://evil.example/"]),
    "sha256 renamed": changed("@context", "sha256", value="https://evil.example/notes"),
    "another term as sha256": changed("@context", "note", value="sc:sha256"),
    "another term as sha256, as an object": changed("@context", "note", value={"@id": "https://schema.org/sha256"}),
    "a prefix turned": changed("@context", "sc", value="https://evil.example/"),
    "a vocabulary turned": changed("@context", "@vocab", value="https://evil.example/"),
    "a context with an import": changed("@context", "@import", value="https://evil.example/"),
    "a scoped context": changed("@context", "distribution", value={"@id": "sc:distribution", "@context": {}}),
    "a context inside a file": file(**{"@context": {"sha256": "https://evil.example/"}}),
    "a graph": changed("@graph", value=[]),
    "a reverse property": file(**{"@reverse": {}}),
    "two digests": file(**{"sc:sha256": "0" * 64}),
    "an id twice": changed("distribution", 1, "@id", value="passengers.csv"),
    "an id with control characters": file(**{"@id": "a\u0000b"}),
    "an id that reads backwards": file(**{"@id": "a\u202ecsv"}),
    "no id": file(**{"@id": None}),
    "a path that leaves": file(contentUrl="../../etc/passwd"),
    "an absolute path": file(contentUrl="/etc/passwd"),
    "a path of another system": file(contentUrl="C:\\data"),
    "a local file": file(contentUrl="file:///etc/passwd"),
    "a script": file(contentUrl="javascript:alert(1)"),
    "data inside the address": file(contentUrl="data:text/csv;base64,AAAA"),
    "an address that is no text": file(contentUrl=["https://example.org"]),
    "a licence that is no text": changed("license", value=[5]),
    "records that are none": file(**{"aidefend:records": [1], "sha256": None, "aidefend:digest": DIGEST}),
    "a record without digest": file(**{"aidefend:records": {"a": "b"}, "sha256": None, "aidefend:digest": DIGEST}),
    "a signature that is no hex": changed("aidefend:signature", value="zz"),
    "a signature that is a number": changed("aidefend:signature", value=5),
    "NaN": json.dumps(PUBLIC).replace('"en"', "NaN"),
    "a field twice": json.dumps(PUBLIC).replace('"name": "passengers",', '"name": "a", "name": "b",'),
    "too deep": json.dumps(PUBLIC).replace('"en"', "[" * 50 + "]" * 50),
    "far too deep": "[" * 200_000,
    "no JSON": "<html>",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_descriptions_are_refused_with_the_reason(name, tmp_path):
    with pytest.raises(UnsafeArtifact, match=r"^Expected .+, got .+\. .+\.$") as raised:
        read(tmp_path, HOSTILE[name])
    assert len(str(raised.value)) < 1000


def test_the_description_that_the_hostile_ones_were_made_from_is_read(tmp_path):
    assert len(read(tmp_path, PUBLIC).sources) == 2


def every_change(value, place=()):
    for wrong in (None, 5, "text", [], {}, [[]], {"@id": []}):
        yield place, wrong
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(parts):
        yield from every_change(part, (*place, key))


def test_every_part_replaced_by_what_does_not_belong_there_is_read_or_refused(tmp_path):
    for place, wrong in every_change(PUBLIC):
        try:
            trusted = read(tmp_path, changed(*place, value=wrong) if place else json.dumps(wrong))
        except UnsafeArtifact:
            continue
        assert all(len(source.sha256) == 64 for source in trusted.sources)
