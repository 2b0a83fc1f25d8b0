"""Characters in text that a reader does not see or takes for others, and marks of broken encodings."""

import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache

TRAPS = ("bidi", "control", "homoglyph", "invisible", "mojibake", "replacement", "surrogate")

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")  # the plain marks (LRM, RLM, ALM) belong to right-to-left prose
_REPLACEMENT = re.compile("[\ufffd\ufffe\uffff\ufdd0-\ufdef]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ALWAYS_INVISIBLE = re.compile("[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b\u2060-\u2064\u3164\ufeff\uffa0]")
_JOINER = re.compile("[\u200c\u200d]")
_TAG = re.compile("[\U000e0000-\U000e007f]")
_FLAG_OF_TAGS = re.compile("\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f")  # the flags of England, Scotland, Wales
_SELECTORS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]{2,}")  # runs of them carry hidden bytes
_HIDDEN_SELECTOR = re.compile("[\x00-\u2000][\U000e0100-\U000e01ef]")  # ideographs alone have variants of that kind
_LETTER = "[^\\W\\d_]|[\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]"  # or in a circle
_WORD = re.compile(f"(?:{_LETTER})(?:{_LETTER}|[\u0300-\u036f])*")  # an accent does not end a word
_PLAIN = re.compile(r"[\t\n\r\x20-\x7e]*")

# Letters that look like a Latin one in common typefaces, and that letter (a selection of Unicode TR39 confusables).
_LOOK_LATIN = {
    "CYRILLIC": dict(
        zip("аеорсухіјѕԁԛԝһӏьгпАВЕКМНОРСТУХІЈЅԚԜҺӀЗ", "aeopcyxijsdqwhlbrnABEKMHOPCTYXIJSQWHI3", strict=True)
    ),
    "GREEK": dict(zip("ανορυικχΑΒΕΖΗΙΚΜΝΟΡΤΥΧ", "avopuikxABEZHIKMNOPTYX", strict=True)),
    "ARMENIAN": dict(zip("ոսօհցքԼՕՍ", "nuohgqLOU", strict=True)),
    "CHEROKEE": dict(zip("ᎠᎡᎢᎪᎬᎳᎷᎻᎾᏀᏃᏚᏞᏟᏢᏦᏴ", "DRTAEWMHOGZSLCPKB", strict=True)),
}
_LATIN = str.maketrans({letter: latin for script in _LOOK_LATIN.values() for letter, latin in script.items()})
_STYLES = frozenset(["<font>", "<wide>", "<circle>", "<square>"])
_WHITE_ON_BLACK = (0x1F150, 0x1F170)  # A to Z in circles and squares, which Unicode does not decompose
_SHORTEST_WORD = 3  # of two letters are formulas and units


def find_traps(text: str) -> frozenset[str]:
    """Which of TRAPS a text holds.

    Of the kind "homoglyph" are words of three letters or more that mix Latin ones with such of one script that look
    Latin, and words with styled ones (mathematical, of full width, encircled, Roman numerals).
    Not found: words written in look-alikes of one foreign script throughout, and look-alikes inside one script ("rn"
    for "m", "l" for "I", phonetic letters): no rule tells them from honest words.

    Example:
        >>> sorted(find_traps("p\u0430ypal\u200b")), sorted(find_traps("naïve café 北京 שלום 👩\u200d🔬"))
        (['homoglyph', 'invisible'], [])
    """
    if _PLAIN.fullmatch(text):
        return frozenset()
    return frozenset(name for name, test in _TESTS.items() if test(text))


def trap_masks(texts: Sequence[str | None]) -> dict[str, list[bool]]:
    """For each trap that occurs, which of the texts hold it."""
    found = [frozenset() if text is None else find_traps(text) for text in texts]
    occurring: frozenset[str] = frozenset().union(*found)
    return {name: [name in row for row in found] for name in sorted(occurring)}


def strip_traps(text: str, names: Collection[str]) -> str:
    """The text without what the named traps mark: hidden characters go, look-alikes in mixed words become Latin.

    Takes "bidi", "control", "homoglyph" and "invisible". One pass: taking something out can bring a trap about, as
    when a word becomes mixed, so ask `find_traps` again.
    Example:
        >>> strip_traps("p\u0430ypal\u200b", ("homoglyph", "invisible"))
        'paypal'
    """
    if "bidi" in names:
        text = _BIDI.sub("", text)
    if "control" in names:
        text = _CONTROL.sub("", text)
    if "invisible" in names:
        text = _without_invisible(text)
    if "homoglyph" in names:
        text = _WORD.sub(lambda word: _latin(word.group()), text)
    return text


def poses_as_latin(word: str) -> bool:
    """Whether a word is not of the plain alphabet, and would be if its look-alikes were Latin.

    Short honest words of other scripts do, too (the Russian "a" and "o"): ask only in texts that are Latin otherwise.
    Example:
        >>> poses_as_latin("p\u0430ypal"), poses_as_latin("caf\u00e9"), poses_as_latin("\u0441\u043e\u043d")
        (True, False, False)
    """
    return not word.isascii() and word.translate(_LATIN).isascii()


def _latin(word: str) -> str:
    if _is_styled(word):
        word = "".join(_unstyled(letter) or letter for letter in word)
    return word.translate(_LATIN) if _is_mixed(word) else word


def _without_invisible(text: str) -> str:
    text = _ALWAYS_INVISIBLE.sub("", text)
    flags = {place for flag in _FLAG_OF_TAGS.finditer(text) for place in range(*flag.span())}
    text = "".join(letter for i, letter in enumerate(text) if i in flags or not _TAG.match(letter))
    text = _SELECTORS.sub(lambda run: run.group()[0], text)
    text = _HIDDEN_SELECTOR.sub(lambda pair: pair.group()[0], text)
    joins = {match.start() for match in _JOINER.finditer(text) if _joins_nothing(text, match.start())}
    return "".join(letter for i, letter in enumerate(text) if i not in joins) if joins else text


def _invisible(text: str) -> bool:
    text = _FLAG_OF_TAGS.sub("", text.removeprefix("\ufeff"))  # a byte order mark at the start is an encoding's own
    if any(pattern.search(text) for pattern in (_ALWAYS_INVISIBLE, _TAG, _SELECTORS, _HIDDEN_SELECTOR)):
        return True
    return any(_joins_nothing(text, match.start()) for match in _JOINER.finditer(text))


def _joins_nothing(text: str, place: int) -> bool:
    """Whether a joiner stands where no script uses one: Arabic and Indic scripts and emoji do, Latin does not."""
    before, after = text[max(0, place - 1) : place], text[place + 1 : place + 2]
    return (
        not before
        or not after
        or any(_script(letter) in ("", "LATIN", "CYRILLIC", "GREEK") for letter in (before, after))
    )


def _homoglyph(text: str) -> bool:
    return any(_is_styled(word) or _is_mixed(word) for word in _WORD.findall(text))


def _is_styled(word: str) -> bool:
    return not word.isascii() and len(_letters(word)) >= _SHORTEST_WORD and any(map(_unstyled, word))


def _is_mixed(word: str) -> bool:
    """Latin letters and, in the same word, only such others as look Latin."""
    if word.isascii():
        return False
    letters = _letters(word)
    scripts = [(letter, _script(letter)) for letter in letters]
    others = [
        (letter, script) for letter, script in scripts if script != "LATIN" and unicodedata.category(letter)[0] == "L"
    ]
    return (
        len(letters) >= _SHORTEST_WORD
        and 0 < len(others) < len(letters)
        and all(letter in _LOOK_LATIN.get(script, ()) for letter, script in others)
    )


def _letters(word: str) -> list[str]:
    return [letter for letter in word if not unicodedata.combining(letter)]


@lru_cache(maxsize=4096)
def _unstyled(letter: str) -> str:
    """The plain Latin letter of which this one is a mere form; "" if it is none."""
    for start in _WHITE_ON_BLACK:
        if start <= ord(letter) < start + 26:
            return chr(ord("A") + ord(letter) - start)
    style, _, code = unicodedata.decomposition(letter).partition(" ")
    if style not in _STYLES and not (style == "<compat>" and "ROMAN NUMERAL" in unicodedata.name(letter, "")):
        return ""
    plain = "" if " " in code else chr(int(code, 16))
    return plain if plain.isascii() and plain.isalpha() else ""


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    """The first word of a letter's Unicode name, which is its script; "" for what is ASCII and no letter."""
    if letter.isascii() and not letter.isalpha():
        return ""
    return unicodedata.name(letter, "UNKNOWN").split(" ")[0]


def _mojibake(text: str) -> bool:
    """Whether the text, or a word of it, is UTF-8 that was read in a Western code page: written back, it decodes."""
    return any(_decodes_again(word) for word in text.split() if not word.isascii())


def _decodes_again(word: str) -> bool:
    if all(letter < "\u0100" for letter in word) and not any("\u0080" <= letter < "\u00c0" for letter in word):
        return False  # continuation bytes lie there; accents alone are honest Latin-1
    for code_page in ("cp1252", "latin-1"):
        try:
            word.encode(code_page).decode("utf-8")
        except UnicodeError:
            continue
        return True
    return False


_TESTS: dict[str, Callable[[str], object]] = {
    "bidi": _BIDI.search,
    "control": _CONTROL.search,
    "homoglyph": _homoglyph,
    "invisible": _invisible,
    "mojibake": _mojibake,
    "replacement": _REPLACEMENT.search,
    "surrogate": _SURROGATE.search,
}
