"""What leaves the house: valid STIX 2.1, the same bytes every time, no sample, and back unchanged."""

import copy
import json
import re

import pytest
import stix2
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aidefend import ConfigurationError, Evidence, Finding, Severity
from aidefend.collaborate import (
    Indicator,
    artifact_indicator,
    from_stix,
    marking,
    sample_indicators,
    to_stix,
    trigger_indicator,
)

KEY = b"a shared secret key"
# The library writes this one time without a fraction of zero.
WHOLE_SECONDS = {"indicator": {"valid_from": "2026-01-31T12:00:00Z"}}
LEVELS = ("clear", "green", "amber", "red")


def evidence():
    return Evidence(
        [
            Finding(
                "poisoning.attack_success_rate",
                "Attack success",
                Severity.HIGH,
                0.97,
                0.93,
                0.99,
                200,
                {"secret setting": "row 17", "x": [0.123456]},
                "a partner poisons the data",
                "one trigger only",
                {"atlas": "AML.T0018, AML.T0020", "mitigation": "AML.M0007", "cwe": "CWE-502"},
            ),
            Finding("validate.calibration", "Calibrated", mapping={"atlas": "AML.M0015"}),
            Finding("extraction.agreement", "Extraction", status="not tested"),
            Finding("x.nan", "Not a number", value=float("nan")),
            Finding("x.odd", "", value="a word", mapping={"atlas": "see the web page"}),
        ]
    )


def indicators():
    suspects = torch.rand(30, 1, 8, 8)
    suspects[..., 5:, 5:] = 0.7654321
    return [
        *sample_indicators(torch.rand(3, 1, 8, 8), KEY),
        trigger_indicator(suspects, torch.rand(40, 1, 8, 8), KEY),
        artifact_indicator("a" * 64, "pickle that runs a command"),
        artifact_indicator("b" * 64),
        Indicator("sample", "c" * 64, "artifact", shape=(5,)),
    ]


def of_type(bundle, kind):
    return [item for item in bundle["objects"] if item["type"] == kind]


@pytest.mark.parametrize("tlp", LEVELS)
def test_the_standard_library_of_stix_accepts_every_object(tlp):
    bundle = to_stix(evidence(), indicators(), tlp=tlp, producer="Müller & Søn", created="2026-01-31T12:00:00.000Z")
    parsed = stix2.parse(json.dumps(bundle), allow_custom=False, version="2.1")
    assert len(parsed.objects) == len(bundle["objects"])
    for item, ours in zip(parsed.objects, bundle["objects"], strict=True):
        assert stix2.parse(ours, allow_custom=False, version="2.1").id == item.id == ours["id"]
        assert json.loads(item.serialize()) == ours | WHOLE_SECONDS.get(ours["type"], {})
    own = {"clear": stix2.TLP_WHITE, "green": stix2.TLP_GREEN, "amber": stix2.TLP_AMBER, "red": stix2.TLP_RED}[tlp]
    assert json.loads(own.serialize()) == bundle["objects"][0]


def test_the_standard_library_refuses_what_it_should():
    bundle = to_stix(evidence(), indicators())
    bundle["objects"][-1]["pattern_type"] = "stix"
    with pytest.raises(stix2.exceptions.InvalidValueError):
        stix2.parse(json.dumps(bundle), allow_custom=False, version="2.1")


def test_equal_arguments_give_equal_bytes_and_other_arguments_other_ids():
    ours = indicators()
    first, again = (json.dumps(to_stix(evidence(), ours)) for _ in range(2))
    assert first == again
    base = to_stix(evidence(), ours)
    for other in (
        to_stix(evidence(), ours, tlp="red"),
        to_stix(evidence(), ours, producer="another"),
        to_stix(evidence(), ours, created="2026-01-31T12:00:00.000Z"),
        to_stix(evidence(), ours[1:]),
        to_stix(Evidence(), ours),
    ):
        assert other["id"] != base["id"]


def test_ids_are_unique_and_repeated_things_come_once():
    ours = indicators()
    bundle = to_stix(evidence() + evidence(), [*ours, *ours])
    ids = [item["id"] for item in bundle["objects"]]
    assert len(set(ids)) == len(ids) and ids == [item["id"] for item in to_stix(evidence(), ours)["objects"]]


def test_findings_refer_to_techniques_and_mitigations_of_atlas():
    bundle = to_stix(evidence(), indicators())
    names = {
        item["id"]: item["name"] for kind in ("attack-pattern", "course-of-action") for item in of_type(bundle, kind)
    }
    assert sorted(names.values()) == ["AML.M0007", "AML.M0015", "AML.T0018", "AML.T0020"]
    notes = {item["abstract"]: item for item in of_type(bundle, "note")}
    assert [names[ref] for ref in notes["Attack success"]["object_refs"]] == ["AML.T0018", "AML.T0020", "AML.M0007"]
    assert notes["Extraction"]["object_refs"] == [of_type(bundle, "identity")[0]["id"]]
    assert notes["Attack success"]["labels"] == ["severity:high", "status:measured"]
    assert notes["Extraction"]["labels"] == ["severity:info", "status:not-tested"]
    for item in [
        *of_type(bundle, "attack-pattern"),
        *of_type(bundle, "course-of-action"),
        *of_type(bundle, "indicator"),
    ]:
        (reference,) = item["external_references"]
        assert reference["source_name"] == "mitre-atlas"
        folder = "mitigations" if ".M" in reference["external_id"] else "techniques"
        assert reference["url"] == f"https://atlas.mitre.org/{folder}/{reference['external_id']}"
    signs = {item.get("name"): item["external_references"][0]["external_id"] for item in of_type(bundle, "indicator")}
    assert signs["poisoned sample"] == signs["trigger window"] == "AML.T0020" and signs[None] == "AML.T0011.000"


def test_every_object_carries_marking_producer_and_time():
    bundle = to_stix(evidence(), indicators(), tlp="red", created="2026-01-31T12:00:00.5Z")
    mark, maker = bundle["objects"][0]["id"], bundle["objects"][1]["id"]
    for item in bundle["objects"][1:]:
        assert item["object_marking_refs"] == [mark]
        assert item["created"] == item["modified"] == "2026-01-31T12:00:00.5Z"
        assert item["type"] == "identity" or item["created_by_ref"] == maker


def test_no_sample_setting_or_key_is_in_the_bundle():
    x = torch.tensor([[0.123456789, 0.987654321, 0.5]])
    text = json.dumps(to_stix(evidence(), sample_indicators(x, KEY)))
    leaks = ["0.1234", "0.9876", "secret", "row 17", *(str(round(float(v) * 255)) + ", " for v in x[0])]
    assert not [leak for leak in leaks if leak in text]
    assert set(json.loads(of_type(json.loads(text), "indicator")[0]["pattern"])) == {"kind", "digest", "shape"}


@pytest.mark.parametrize("tlp", LEVELS)
def test_round_trip_through_json_text_bytes_and_objects(tlp):
    ours = indicators()
    bundle = to_stix(evidence(), ours, tlp=tlp, producer="org")
    before = copy.deepcopy(bundle)
    for form in (
        bundle,
        json.dumps(bundle),
        json.dumps(bundle, indent=2).encode(),
        json.dumps(bundle).encode("utf-16"),
    ):
        shared = from_stix(form)
        assert (shared.indicators, shared.tlp, shared.producer) == (tuple(ours), tlp, "org")
    assert bundle == before


titles = st.text(st.characters(exclude_categories=("C", "Z")), max_size=200)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
sizes = st.lists(st.integers(1, 1 << 24), min_size=1, max_size=8).map(tuple)
files = st.builds(Indicator, st.just("artifact"), digests, titles)
samples = st.builds(Indicator, st.just("sample"), digests, titles, st.none(), sizes)
triggers = st.builds(
    lambda digest, title, shape: Indicator("trigger", digest, title, (0, shape[-1] - 1, 1, 1), shape),
    digests,
    titles,
    sizes,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(files | samples | triggers, max_size=5))
def test_any_indicators_come_back_as_they_were(ours):
    bundle = to_stix(Evidence(), ours)
    assert from_stix(json.dumps(bundle)).indicators == tuple(dict.fromkeys(ours))
    stix2.parse(json.dumps(bundle), allow_custom=False, version="2.1")


def test_a_partners_bundle_made_with_the_standard_library_is_read():
    maker = stix2.Identity(name="partner", identity_class="organization", object_marking_refs=[stix2.TLP_GREEN])
    common = {"created_by_ref": maker.id, "object_marking_refs": [stix2.TLP_GREEN], "pattern_type": "stix"}
    common |= {"valid_from": "2024-01-01T00:00:00Z", "confidence": 80, "lang": "en"}
    patterns = [f"[file:hashes.'SHA-256' = '{digit * 64}']" for digit in "cd"]
    made = [
        stix2.Indicator(name="seen", pattern=patterns[0], **common),
        stix2.Indicator(name="withdrawn", pattern=patterns[1], revoked=True, **common),
    ]
    shared = from_stix(stix2.Bundle(stix2.TLP_GREEN, maker, *made).serialize())
    assert shared.indicators == (artifact_indicator("c" * 64, "seen"),)
    assert (shared.tlp, shared.producer) == ("green", "partner")


def test_the_strictest_marking_counts_and_an_unmarked_indicator_is_red():
    loose, strict = (
        to_stix(Evidence(), [artifact_indicator(d * 64)], tlp=t) for d, t in (("0", "clear"), ("1", "amber"))
    )
    maker = loose["objects"][1]["id"]
    strict["objects"][2]["created_by_ref"] = maker
    joined = {**loose, "objects": loose["objects"] + strict["objects"][2:]}
    assert from_stix(joined).tlp == "amber"
    del joined["objects"][-1]["object_marking_refs"]
    assert from_stix(joined).tlp == "red"
    assert from_stix({**loose, "objects": []}) == type(from_stix(loose))((), "red", "")


def test_a_bundle_that_a_partner_would_refuse_is_not_made(monkeypatch):
    monkeypatch.setattr(marking, "LARGEST", 100_000)
    many = [Indicator("artifact", f"{i:064x}") for i in range(150)]
    with pytest.raises(ConfigurationError, match="Split the indicators over several bundles"):
        to_stix(Evidence(), many)
    assert len(from_stix(to_stix(Evidence(), many[:100])).indicators) == 100
    monkeypatch.setattr(marking, "MOST_OBJECTS", 50)
    with pytest.raises(ConfigurationError, match=r"and 50 objects, got bundle='[0-9]+ bytes, 52 objects'"):
        to_stix(Evidence(), many[:50])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"evidence": None}, "evidence, got evidence='NoneType'"),
        ({"evidence": {"findings": []}}, "evidence, got"),
        ({"indicators": artifact_indicator("0" * 64)}, "a collection of indicators"),
        ({"indicators": "0" * 64}, "a collection of indicators"),
        ({"indicators": ["0" * 64]}, "indicators, got indicators='str'"),
        ({"indicators": 7}, "a collection of indicators"),
        ({"tlp": "white"}, "tlp to be one of 'clear'"),
        ({"tlp": None}, "tlp to be one of"),
        ({"producer": ""}, "a printable name"),
        ({"producer": "two\nlines"}, "a printable name"),
        ({"producer": "x" * 257}, "a printable name"),
        ({"producer": None}, "a printable name"),
        ({"created": "yesterday"}, "a time such as"),
        ({"created": "2026-02-30T00:00:00Z"}, "a time such as"),
        ({"created": "2026-01-31T12:00:00+01:00"}, "a time such as"),
        ({"created": "２０26-01-31T12:00:00Z"}, "a time such as"),
        ({"created": None}, "a time such as"),
    ],
)
def test_malformed_calls_are_refused_by_name(arguments, message):
    call = {"evidence": Evidence(), "indicators": [], **arguments}
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        to_stix(call.pop("evidence"), call.pop("indicators"), **call)
