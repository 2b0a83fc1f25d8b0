"""A partner who wants to do harm: every malformed bundle is refused as a whole, with one kind of error."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidefend import Evidence, Finding, UnsafeArtifact
from aidefend.collaborate import Indicator, Shared, from_stix, to_stix

NUMBER = "00000000-0000-4000-8000-000000000000"


def good():
    ours = [
        Indicator("artifact", "a" * 64, "file"),
        Indicator("sample", "b" * 64, "sample", shape=(1, 8, 8)),
        Indicator("trigger", "c" * 64, "window", (5, 5, 3, 3), (1, 8, 8)),
    ]
    findings = [Finding("a.b", "Title", value=0.5, mapping={"atlas": "AML.T0020", "mitigation": "AML.M0007"})]
    return to_stix(Evidence(findings), ours, producer="partner")


MARKING, IDENTITY, ATTACK, ACTION, NOTE, FILE, SAMPLE, TRIGGER = range(8)


def changed(place, **fields):
    bundle = good()
    bundle["objects"][place] |= fields
    return bundle


def without(place, name):
    bundle = good()
    del bundle["objects"][place][name]
    return bundle


def with_objects(*objects):
    return {**good(), "objects": [*good()["objects"], *objects]}


def pattern(item=TRIGGER, **fields):
    return changed(item, pattern=json.dumps({**json.loads(good()["objects"][item]["pattern"]), **fields}))


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def endless():
    bundle = good()
    bundle["objects"][0]["definition"] = bundle
    return bundle


def text(old, new):
    found = json.dumps(good())
    assert old in found
    return found.replace(old, new, 1)


def text_of(objects):
    return f'{{"type":"bundle","id":"bundle--{NUMBER}","objects":{objects}}}'


def repeated_id():
    bundle = good()
    bundle["objects"][SAMPLE]["id"] = bundle["objects"][FILE]["id"]
    return bundle


def two_producers():
    other = {**good()["objects"][IDENTITY], "id": f"identity--{NUMBER}"}
    bundle = with_objects(other)
    bundle["objects"][FILE]["created_by_ref"] = other["id"]
    return bundle


SQL = "[file:hashes.'SHA-256' = '" + "a" * 64 + "'"
HOSTILE = {
    "nothing": None,
    "number": 7,
    "true": True,
    "empty text": "",
    "list": [],
    "text that is no json": "{'type': 'bundle'}",
    "python code": "__import__('os').system('id')",
    "bytes that are no text": b"\xff\xfe\x00\x00\xff",
    "object of a class": object(),
    "set": {"bundle"},
    "empty dict": {},
    "no objects": {"type": "bundle", "id": f"bundle--{NUMBER}"},
    "objects a dict": {**good(), "objects": {"0": good()["objects"][0]}},
    "objects null": {**good(), "objects": None},
    "wrong bundle type": {**good(), "type": "Bundle"},
    "wrong bundle id": {**good(), "id": "bundle--1"},
    "unknown bundle property": {**good(), "callback": "https://evil.example"},
    "5 MiB": json.dumps({**good(), "objects": [{"type": "note", "content": "x" * (5 << 20)}]}),
    "5 MiB of spaces": json.dumps(good()) + " " * (5 << 20),
    "a million objects": text_of("[" + ",".join(["{}"] * 10**6) + "]"),
    "a million dicts": {**good(), "objects": [{}] * 10**6},
    "20,001 objects": {**good(), "objects": [{}] * 20_001},
    "deep text": "[" * 100_000,
    "deep objects text": text_of("[" * 50_000 + "]" * 50_000),
    "deep lists": {**good(), "objects": nested(400)},
    "very deep lists": {**good(), "objects": nested(50_000)},
    "deep inside an object": changed(NOTE, object_refs=nested(9)),
    "endless": endless(),
    "repeated key": text('"type": "indicator"', '"type": "note", "type": "indicator"'),
    "repeated key in the bundle": json.dumps(good())[:-1] + ', "objects": []}',
    "repeated key in a pattern": changed(SAMPLE, pattern='{"kind":"sample","kind":"sample","digest":"x","shape":[1]}'),
    "repeated id": repeated_id(),
    "nan": text('"Title"', "NaN"),
    "infinity": text('"Title"', "-Infinity"),
    "infinity by size": text('"Title"', "1e999"),
    "nan object": changed(NOTE, abstract=float("nan")),
    "huge integer": text('"Title"', "9" * 5000),
    "unknown type": changed(FILE, type="malware-analysis"),
    "type a list": changed(FILE, type=["indicator"]),
    "type a number": changed(FILE, type=1),
    "object null": with_objects(None),
    "object a text": with_objects("indicator"),
    "unknown property": changed(FILE, x_run="import os"),
    "unknown property of a note": changed(NOTE, extensions={}),
    "valid_until": changed(FILE, valid_until="2020-01-01T00:00:00Z"),
    "granular marking": changed(FILE, granular_markings=[{"marking_ref": "x", "selectors": ["name"]}]),
    "other spec version": changed(FILE, spec_version="2.0"),
    "no spec version": without(FILE, "spec_version"),
    "no id": without(FILE, "id"),
    "no pattern": without(FILE, "pattern"),
    "no valid_from": without(FILE, "valid_from"),
    "no created": without(NOTE, "created"),
    "identity without a name": without(IDENTITY, "name"),
    "id of another type": changed(FILE, id=f"note--{NUMBER}"),
    "id in capitals": changed(FILE, id=f"indicator--{NUMBER.replace('0', 'A')}"),
    "id with a path": changed(FILE, id="indicator--../../../etc/passwd"),
    "id with a newline": changed(FILE, id=f"indicator--{NUMBER}\n"),
    "id too long": changed(FILE, id="a" * 10_000 + "--" + NUMBER),
    "id a number": changed(FILE, id=7),
    "id null": changed(FILE, id=None),
    "producer reference of another type": changed(FILE, created_by_ref=f"note--{NUMBER}"),
    "two producers": two_producers(),
    "confidence true": changed(FILE, confidence=True),
    "confidence 101": changed(FILE, confidence=101),
    "revoked 1": changed(FILE, revoked=1),
    "revoked text": changed(FILE, revoked="false"),
    "name a list": changed(FILE, name=["x"]),
    "name with a newline": changed(FILE, name="fine\nverdict: clean"),
    "name with an escape": changed(FILE, name="\x1b[2Jclean"),
    "name turning right to left": changed(FILE, name="abc\u202efdp.exe"),
    "name with a zero width space": changed(FILE, name="a\u200bb"),
    "name a lone surrogate": changed(FILE, name="\ud800"),
    "name of 10,000": changed(FILE, name="x" * 10_000),
    "producer with a newline": changed(IDENTITY, name="me\nyou"),
    "time without zone": changed(FILE, valid_from="2026-01-01T00:00:00"),
    "time that does not exist": changed(FILE, valid_from="2026-13-01T00:00:00Z"),
    "time in full-width digits": changed(FILE, valid_from="２０２６-01-01T00:00:00Z"),
    "time a number": changed(FILE, created=0),
    "unknown marking": changed(FILE, object_marking_refs=[f"marking-definition--{NUMBER}"]),
    "marking a text": changed(FILE, object_marking_refs=good()["objects"][MARKING]["id"]),
    "marking nested": changed(FILE, object_marking_refs=[[good()["objects"][MARKING]["id"]]]),
    "marking redefined": changed(MARKING, definition={"tlp": "white"}),
    "marking of our own": changed(MARKING, id=f"marking-definition--{NUMBER}"),
    "marking of another kind": changed(MARKING, definition_type="statement", definition={"statement": "mine"}),
    "reference with code": changed(ATTACK, external_references=[{"source_name": "x", "run": "y"}]),
    "reference a text": changed(ATTACK, external_references=["https://evil.example"]),
    "101 labels": changed(FILE, labels=["x"] * 101),
    "labels of numbers": changed(FILE, labels=[1]),
    "pattern type sigma": changed(FILE, pattern_type="sigma"),
    "pattern type yara": changed(FILE, pattern_type="yara", pattern="rule a { condition: true }"),
    "pattern a number": changed(FILE, pattern=7),
    "pattern a list": changed(FILE, pattern=["x"]),
    "pattern on processes": changed(FILE, pattern="[process:command_line = 'rm -rf /']"),
    "pattern with or": changed(FILE, pattern=SQL + " OR file:size > 0]"),
    "two patterns": changed(FILE, pattern=SQL + "] AND " + SQL + "]"),
    "pattern with a newline": changed(FILE, pattern=SQL + "]\n"),
    "pattern with a short digest": changed(FILE, pattern="[file:hashes.'SHA-256' = 'abc']"),
    "pattern with a path": changed(FILE, pattern="[file:name = '../../etc/passwd']"),
    "pattern by md5": changed(FILE, pattern="[file:hashes.MD5 = '" + "a" * 32 + "']"),
    "pattern for an expensive expression": changed(FILE, pattern="[file:name MATCHES '(a+)+$']"),
    "pattern of 19,000": changed(SAMPLE, pattern="[" * 19_000),
    "our pattern a list": changed(SAMPLE, pattern='["kind", "digest", "shape"]'),
    "our pattern a number": changed(SAMPLE, pattern="7"),
    "our pattern deep": changed(SAMPLE, pattern="[" * 999),
    "our pattern with nan": changed(SAMPLE, pattern='{"kind":"sample","digest":"x","shape":[NaN]}'),
    "our pattern with 1e999": changed(SAMPLE, pattern='{"kind":"sample","digest":"x","shape":[1e999]}'),
    "our pattern with code": pattern(SAMPLE, run="import os"),
    "our pattern for a file": changed(SAMPLE, pattern=json.dumps({"kind": "artifact", "digest": "a" * 64})),
    "our pattern of unknown kind": pattern(kind="backdoor"),
    "our pattern with a list as kind": pattern(kind=["sample"]),
    "digest too short": pattern(digest="abc"),
    "digest a number": pattern(digest=7),
    "shape true": pattern(shape=[True, 8, 8]),
    "shape of floats": pattern(shape=[1.0, 8.0, 8.0]),
    "shape negative": pattern(shape=[-1, 8, 8]),
    "shape astronomic": pattern(shape=[10**30, 8, 8]),
    "shape of 9 dimensions": pattern(shape=[1] * 9),
    "shape empty": pattern(shape=[]),
    "shape a text": pattern(shape="188"),
    "shape a dict": pattern(shape={"1": 8}),
    "shape null": pattern(shape=None),
    "place outside": pattern(place=[6, 6, 3, 3]),
    "place negative": pattern(place=[-1, 0, 3, 3]),
    "place of floats": pattern(place=[5.0, 5.0, 3.0, 3.0]),
    "place of bools": pattern(place=[True, True, True, True]),
    "place null": pattern(place=None),
    "place empty": pattern(place=[]),
    "place zero": pattern(place=0),
    "place on a sample": pattern(SAMPLE, place=[0, 0, 1, 1]),
    "null place on a sample": pattern(SAMPLE, place=None),
}


@pytest.mark.parametrize("bundle", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_bundle_is_refused(bundle):
    with pytest.raises(UnsafeArtifact, match=r"Expected .* got .*The whole bundle was refused") as caught:
        from_stix(bundle)
    assert len(str(caught.value)) < 600


REASONS = {
    "5 MiB": "at most 4194304 bytes",
    "20,001 objects": "at most 20000 objects",
    "deep inside an object": "at most 6 levels",
    "deep lists": "at most 6 levels",
    "repeated key": "each key once",
    "repeated key in a pattern": "each key once",
    "repeated id": "each id once",
    "nan": "finite numbers",
    "infinity by size": "finite numbers",
    "our pattern with 1e999": "finite numbers",
    "unknown type": "types among",
    "unknown property": "known properties of indicator",
    "unknown property of a note": "known properties of note",
    "no valid_from": "indicator with valid_from",
    "id with a path": "a well-formed id",
    "id of another type": "id of the form indicator--uuid",
    "two producers": "one producer",
    "name turning right to left": "a well-formed name",
    "time in full-width digits": "a well-formed valid_from",
    "unknown marking": "a well-formed object_marking_refs",
    "marking redefined": "a marking of the Traffic Light Protocol",
    "pattern with or": "a SHA-256 file pattern",
    "pattern of 19,000": "at most 1000 characters",
    "our pattern with code": "kind, digest, shape",
    "shape true": "shape to be an integer",
    "place outside": "place inside the sample",
}


@pytest.mark.parametrize(("name", "reason"), REASONS.items(), ids=REASONS)
def test_it_is_refused_for_what_is_wrong_with_it(name, reason):
    with pytest.raises(UnsafeArtifact, match=reason):
        from_stix(HOSTILE[name])


def test_the_base_of_all_these_is_accepted():
    assert len(from_stix(good()).indicators) == 3
    assert len(from_stix(with_objects({**good()["objects"][NOTE], "id": f"note--{NUMBER}"})).indicators) == 3
    assert len(from_stix(pattern()).indicators) == len(from_stix(changed(FILE, confidence=100)).indicators) == 3


def test_nothing_changes_when_a_bundle_is_refused():
    bundle = changed(TRIGGER, pattern="{}")
    before = copy.deepcopy(bundle)
    with pytest.raises(UnsafeArtifact):
        from_stix(bundle)
    assert bundle == before


@pytest.mark.parametrize("cut", range(1, 4000, 97))
def test_a_bundle_that_was_cut_off_is_refused(cut):
    with pytest.raises(UnsafeArtifact):
        from_stix(json.dumps(good())[:-cut])


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["indicator", "2.1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def paths(value, path=()):
    """The place of every value in a bundle."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, (*path, key))


def only_refused_or_sound(bundle):
    try:
        shared = from_stix(bundle)
    except UnsafeArtifact:
        return
    assert isinstance(shared, Shared) and all(isinstance(one, Indicator) for one in shared.indicators)


@settings(max_examples=80, deadline=None)
@given(path=st.sampled_from([path for path in paths(good()) if path]), value=json_values)
def test_any_value_anywhere_is_refused_or_sound(path, value):
    bundle = place = good()
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    only_refused_or_sound(bundle)
    only_refused_or_sound(json.dumps(bundle))


@settings(max_examples=60, deadline=None)
@given(value=json_values | st.text() | st.binary())
def test_any_value_at_all_is_refused(value):
    with pytest.raises(UnsafeArtifact):
        from_stix(value)


@settings(max_examples=60, deadline=None)
@given(place=st.sampled_from([FILE, SAMPLE, TRIGGER]), text=st.text(max_size=40) | json_values.map(repr))
def test_any_pattern_is_refused(place, text):
    with pytest.raises(UnsafeArtifact):
        from_stix(changed(place, pattern=text))


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 4000), byte=st.integers(0, 255))
def test_one_changed_byte_is_refused_or_sound(place, byte):
    data = bytearray(json.dumps(good()).encode())
    data[place % len(data)] = byte
    only_refused_or_sound(bytes(data))
