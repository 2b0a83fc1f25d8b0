"""Each trap is found, and honest text of many scripts holds none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidefend._core.text_traps import TRAPS, find_traps, trap_masks

HONEST = {
    "control": "tabs\tand\r\nnew lines",
    "accents": "Crème brûlée, Ångström, Straße, naïveté, İstanbul, Đà Nẵng, Łódź",
    "decomposed accents": "Cafe\u0301 nai\u0308ve",
    "Russian": "Съешь же ещё этих мягких французских булок",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "Hebrew with marks": "שלום \u200fabc\u200e עולם",
    "Arabic": "نص حكيم له سر قاطع",
    "Persian with joiner": "می\u200cخواهم",
    "Hindi with joiner": "क्\u200dष",
    "Japanese": "日本語のテキスト、カタカナとひらがな",
    "Chinese with variants": "葛\U000e0100城市",
    "Korean": "다람쥐 헌 쳇바퀴에 타고파",
    "emoji": "👩\u200d🔬 👨\u200d👩\u200d👧 ❤\ufe0f 1\ufe0f\u20e3",
    "flag of England": "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "units and formulas": "μm Δx αβ-test 5 µΩ ρV naïve",
    "two languages": "Москва is Moscow, Αθήνα is Athens",
    "byte order mark": "\ufeffname",
    "quotes": "“smart” ‘quotes’ — dashes… €5 ™",
    "spaces": "a\u00a0b\u2009c",
    "Russian with an accent": "со\u0301н, ра\u0301сход",
    "formulas": "ℝ ∋ 𝑥 = 𝑎𝑏, Ⅻ, ①②③, ａ, 1ˢᵗ, Mᵐᵉ, ﬁle, ſo",
    "phonetic letters": "ʃɪp, bɪɡ",
    "flags": "🇩🇪🇫🇷🇯🇵",
}
TRAPPED = {
    "bidi": ["abc\u202eexe.txt", "a\u2066b\u2069", "\u202bx"],
    "control": ["a\x00b", "\x1b[31m", "a\x85b", "\x7f"],
    "homoglyph": [
        *("p\u0430ypal", "\u0410dmin", "g\u03bf\u03bfgle", "micr\u043esoft account", "p\u0430\u0301ypal"),
        *("𝐩𝐚𝐲𝐩𝐚𝐥", "p𝐚ypal", "ｐａｙｐａｌ", "ⓟⓐⓨ", "🅟🅐🅨", "🅿🅰🆈", "🄿🄰🅈", "ⅼogin", "𝕡𝕒𝕪ж", "𝐩\u0430y"),
    ],
    "invisible": [
        "pass\u200bword",
        "in\u00advoice",
        "a\u200db",
        "a\u200cb",
        "x\u2060y",
        "mid\ufeffdle",
        "hi\U000e0068\U000e0069",
        "a\U000e0101",
        "x\ufe01\ufe02\ufe03",
        "\u3164name",
    ],
    "mojibake": ["cafÃ©", "donâ€™t", "naÃ¯ve text", "â‚¬5", "ÐŸÑ€Ð¸Ð²ÐµÑ‚"],
    "replacement": ["caf\ufffd", "a\uffff"],
    "surrogate": ["a\ud800b", "\udfff"],
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_text_holds_no_trap(name):
    assert find_traps(HONEST[name]) == frozenset()


@pytest.mark.parametrize(("trap", "text"), [(trap, text) for trap, texts in TRAPPED.items() for text in texts])
def test_each_trap_is_found_by_its_name(trap, text):
    assert find_traps(text) == {trap}


def test_every_trap_is_tested():
    assert set(TRAPPED) == set(TRAPS)


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126)))
def test_plain_text_holds_no_trap(text):
    assert find_traps(text) == frozenset()


@given(st.text(alphabet=st.characters()))
def test_no_text_raises_and_a_trap_stays_one_in_a_longer_text(text):
    found = find_traps(text)
    assert found <= set(TRAPS)
    assert {"bidi", "invisible"} <= find_traps("pass\u200bword \u202e " + text)


@given(st.text(alphabet=st.characters(min_codepoint=0xC0, max_codepoint=0x24F), min_size=1).filter(str.isalpha))
def test_every_accented_word_that_is_read_in_a_wrong_encoding_is_found(word):
    broken = word.encode("utf-8").decode("latin-1")
    assert "mojibake" in find_traps(broken) or broken.split() != [broken]


def test_masks_name_the_rows():
    assert trap_masks(["fine", None, "a\x00", "b\u200b"]) == {
        "control": [False, False, True, False],
        "invisible": [False, False, False, True],
    }
