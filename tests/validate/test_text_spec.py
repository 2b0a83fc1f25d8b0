"""`TextSpec`: what is accepted is bounded, normal and visible; what is not is refused with its rule; nothing raises."""

import dataclasses
import time
import unicodedata

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aidefend import ConfigurationError
from aidefend.validate import TextSpec

NASTY = "аеорсραο\u200b\u200d\u202e\u2066\ufe0f\U000e0041\U000e007f\U0001f3f4\u0301\u0344ﷺe\ud800\x00\n\ufffd\ufdd0Kſa"


class Liar(str):
    """A text that would lie about its length."""

    def __len__(self):
        raise AssertionError("code of the input ran")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (7, "input: not a text"),
        (None, "input: not a text"),
        (bytearray(b"a"), "input: not a text"),
        (b"\xff", "input: not UTF-8"),
        (b"\xc0\xaf", "input: not UTF-8"),  # an overlong form
        (b"\xed\xa0\x80", "input: not UTF-8"),  # a surrogate in UTF-8
        ("\ud800", "input: a lone surrogate"),
        ("a" * 41, "input: too many bytes"),
        ("é" * 21, "input: too many bytes"),
        (b"a" * 41, "input: too many bytes"),
        ("a", "input: too few bytes"),
        ("ab\x00", "input: control characters"),
        ("ab\x1b[2J", "input: control characters"),
        ("ab\u202ecd", "input: bidirectional control characters"),
        ("ab\u2067cd", "input: bidirectional control characters"),
        ("ab\ufffd", "input: damaged characters"),
    ],
)
def test_a_broken_rule_refuses_that_text_alone(text, rule):
    result = TextSpec(max_bytes=40, min_bytes=2).check(["good", text, "fine"])
    assert result.accepted.tolist() == [True, False, True] and result.x == ["good", "fine"]
    assert result.reasons == ((), (rule,), ())


def test_a_text_of_another_class_never_runs_its_code():
    assert TextSpec().check([Liar("a")]).reasons == (("input: not a text",),)


@pytest.mark.parametrize("texts", ["abc", b"abc", None, {"a"}, iter(["a"]), 3, ["a"] * 9])
def test_what_is_no_short_list_is_one_fault(texts):
    result = TextSpec(max_rows=8).check(texts)
    assert result.fault is not None and result.x is None and not result.accepted.any()


@pytest.mark.parametrize(
    ("rule", "text", "clipped"),
    [
        ("bidi", "ab\u202ecd\u2069", "abcd"),
        ("control", "ab\x00\x7fcd\n", "abcd\n"),
        ("invisible", "p\u200ba\u00ady\u2060", "pay"),
        ("invisible", "hi" + "".join(chr(0xE0000 + ord(letter)) for letter in "obey"), "hi"),
        ("homoglyph", "pаyрal", "paypal"),
        ("homoglyph", "Ηοme", "Home"),
        ("homoglyph", "pа\u0301ypal", "páypal"),
        ("homoglyph", "𝐩𝐚𝐲𝐩𝐚𝐥 ｐａｙｐａｌ ⓟⓐⓨ", "paypal paypal pay"),
        ("homoglyph", "🅿🅰🆈 🄿🄰🅈 ⅼogin", "PAY PAY login"),
        ("homoglyph", "𝐩аypal", "paypal"),
        ("not_normal", "cafe\u0301", "café"),
    ],
)
def test_every_policy_of_every_rule(rule, text, clipped):
    for policy, wanted in (("clip", [clipped]), ("reject", []), ("quarantine", []), ("accept", [text])):
        result = TextSpec(**{rule: policy}).check([text])
        assert result.x == wanted, policy
        assert result.quarantined.tolist() == [policy == "quarantine"]


@pytest.mark.parametrize(
    "text",
    [
        "naïve café",
        "北京 東京 서울",
        "שלום עולם",
        "مرحبا بالعالم",
        "Привет, мир",
        "Καλημέρα κόσμε",
        "👩\u200d🔬 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
        "हिन्दी क्\u200dष",
        "می\u200cخواهم",
        "10 µs ± 5 %",
        "x\ty\r\n",
    ],
)
def test_honest_texts_of_the_world_come_back_in_normal_form(text):
    result = TextSpec().check([text])
    assert result.x == [unicodedata.normalize("NFC", text)], result.reasons


def test_a_compatibility_form_is_capped_after_it_grew():
    text = "\ufdfa" * 10  # 30 bytes become 330
    assert TextSpec(max_bytes=100, form="NFKC").check([text]).reasons == (("input: too many bytes",),)
    assert TextSpec(form="NFKC").check(["ｐａｙ①"]).x == ["pay1"]


def test_stacks_of_marks_are_refused_before_they_are_sorted():
    text = "a" + "\u0301\u0323" * 100_000  # sorting them takes minutes
    started = time.perf_counter()
    result = TextSpec(max_bytes=10**6).check([text])
    assert result.reasons == (("input: too many marks on one letter",),) and time.perf_counter() - started < 5
    assert TextSpec().check(["Z" + "\u0301\u0323" * 15]).accepted.all()


def test_tokens_are_capped_by_the_users_tokenizer_after_all_else():
    seen = []

    def tokenizer(text):
        seen.append(text)
        if text == "broken":
            raise RuntimeError("secret")
        return text.split()

    spec = TextSpec(max_tokens=3, max_bytes=20, tokenizer=tokenizer)
    result = spec.check(["a b c", "a b c d", "broken", "x" * 21, "a\u202eb"])
    assert result.reasons[:3] == ((), ("input: too many tokens",), ("input: the tokenizer failed",))
    assert seen == ["a b c", "a b c d", "broken"]
    assert TextSpec(max_tokens=3, tokenizer=len).check(["abc", "abcd"]).accepted.tolist() == [True, False]


@given(st.lists(st.text(st.one_of(st.sampled_from(NASTY), st.characters()), max_size=30), max_size=4), st.data())
def test_what_is_accepted_is_accepted_again_and_unchanged(texts, data):
    rules = {
        name: data.draw(st.sampled_from(["accept", "clip", "reject"]))
        for name in ("bidi", "control", "invisible", "homoglyph", "not_normal")
    }
    spec = TextSpec(max_bytes=64, form=data.draw(st.sampled_from(["NFC", "NFD", "NFKC", "NFKD", None])), **rules)
    result = spec.check(texts)
    assert len(result.accepted) == len(texts) and result.accepted.sum() == len(result.x)
    again = spec.check(result.x)
    assert again.x == result.x and bool(again.accepted.all())
    assert all(len(text.encode()) <= 64 for text in result.x)


@given(st.binary(max_size=40))
def test_bytes_are_judged_as_their_text(raw):
    result = TextSpec().check([raw])
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        assert result.reasons == (("input: not UTF-8",),)
    else:
        assert result.reasons == TextSpec().check([text]).reasons


def test_infer_accepts_what_it_saw_and_caps_sizes():
    trusted = ["hello world", "pаypal", "a\u200bb longer text here"]
    spec = TextSpec.infer(trusted, tokenizer=str.split)
    assert spec.check(trusted).x == trusted
    assert (spec.homoglyph, spec.invisible, spec.bidi, spec.control) == ("accept", "accept", "reject", "reject")
    assert spec.max_bytes == int(22 * 1.25) and spec.max_tokens == 5
    long = "e\u0301" * 10  # shorter in normal form
    assert TextSpec.infer([long], margin=0.0).check([long]).accepted.all()
    for bad in ([], "text", ["\ud800"], [3], None):
        with pytest.raises(ConfigurationError):
            TextSpec.infer(bad)


def test_rules_survive_a_file_and_miss_their_tokenizer(tmp_path):
    spec = TextSpec(100, 3, 7, len, "NFKC", "reject", "clip", "quarantine", "accept", "reject", "quarantine", 9)
    spec.save(tmp_path / "spec.json")
    assert TextSpec.load(tmp_path / "spec.json", tokenizer=len) == spec
    with pytest.raises(ConfigurationError, match="tokenizer"):
        TextSpec.load(tmp_path / "spec.json")
    for change in ({"extra": 1}, {"schema": "x"}, {"bidi": 3}, {"tokenizer": 5}, {"form": "nfc"}):
        with pytest.raises(ConfigurationError):
            TextSpec.from_dict({**spec.to_dict(), **change})


def test_contradictory_rules_are_refused():
    for arguments in (
        {"max_bytes": 0},
        {"min_bytes": 9, "max_bytes": 8},
        {"max_tokens": 5},
        {"tokenizer": 3},
        {"damaged": "clip"},
        {"bidi": "drop"},
        {"form": "nfc"},
    ):
        with pytest.raises(ConfigurationError):
            TextSpec(**arguments)


def test_rules_without_a_policy_of_their_own_have_one_together():
    texts = ["a" * 20, b"\xff", 3, "", "\ud800", "x" + "\u0301" * 31, "four words are many", "a\x00", "fine"]
    found = {}
    for otherwise in ("reject", "quarantine"):
        spec = TextSpec(max_bytes=40, min_bytes=1, max_tokens=3, tokenizer=str.split, otherwise=otherwise)
        found[otherwise] = dataclasses.replace(spec, max_bytes=19).check(texts)
    rejected, kept = found["reject"], found["quarantine"]
    assert not rejected.quarantined.any() and kept.quarantined.tolist() == [True] * 7 + [False] * 2
    assert torch.equal(kept.accepted, rejected.accepted) and kept.reasons[7] == rejected.reasons[7]
    for one, other in zip(rejected.reasons[:7], kept.reasons[:7], strict=True):
        assert [reason.replace("input:", "quarantine:") for reason in one] == list(other)
    with pytest.raises(ConfigurationError, match="otherwise"):
        TextSpec(otherwise="accept")


def test_what_the_json_schema_refuses_the_check_refuses():
    spec = TextSpec(max_bytes=5, max_rows=2)
    judge = jsonschema.Draft202012Validator(spec.to_json_schema())
    judge.check_schema(judge.schema)
    assert judge.is_valid(["abc", "a\n"]) and spec.check(["abc", "a\n"]).accepted.all()
    for bad in (["abcdef"], ["a\x00"], ["a"] * 3, [1], "a"):
        result = spec.check(bad)
        assert not judge.is_valid(bad) and not bool(result.accepted.all())
