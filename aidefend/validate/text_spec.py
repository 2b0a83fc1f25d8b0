"""Hard checks on texts: size, encoding, characters that nobody sees or takes for others, and number of tokens."""

import dataclasses
import os
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from aidefend._core.checks import check_callable, check_choice, check_int, check_number, refuse
from aidefend._core.text_traps import find_traps, strip_traps
from aidefend.validate.spec_file import read_spec, spec_fields, write_spec
from aidefend.validate.spec_header import MOST_ROWS
from aidefend.validate.spec_result import Reasons, SpecResult, refused_batch, remark

_SCHEMA = "aidefend.text-spec/2"
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_STRIPPED = ("bidi", "control", "homoglyph", "invisible")
_WORDS = {
    "bidi": "bidirectional control characters",
    "control": "control characters",
    "homoglyph": "letters of another script that look Latin",
    "invisible": "invisible characters",
    "damaged": "damaged characters",
    "not_normal": "not in normal form",
}
_LONGEST_RUN = 30  # marks on one letter, as Unicode's stream-safe format allows; normalising longer runs is quadratic
_MOST_PASSES = 4

Policy = Literal["accept", "clip", "reject", "quarantine"]
Tokenizer = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class TextSpec:
    r"""The rules that every text must satisfy before it is tokenised.

    Guarantee: `check` never raises. An accepted text is a str that encodes to at most `max_bytes` bytes of UTF-8 and
        satisfies every rule, also after what was clipped and normalised: checked again, it comes back unchanged. The
        cost is linear in the bytes that the caps let through. It says nothing about what a text means: an injected
        instruction in plain words satisfies every rule.
    Args:
        max_bytes: Largest size of one text in UTF-8. Longer ones are refused before they are decoded or read.
        min_bytes: Smallest size.
        max_tokens: Largest number of tokens; needs `tokenizer`.
        tokenizer: A callable from a text to its tokens (or to their number). Runs last, on texts that passed all else.
            If it raises, the text is refused. Not saved.
        form: Unicode normal form of accepted texts; None = as they come.
        not_normal: Policy for texts in another form. "clip" normalises, before the other rules are asked.
        bidi: Policy for embeddings, overrides and isolates, which show a text in another order than it is read in.
        control: For C0 and C1 controls but tab and line ends.
        invisible: For zero-width, tag and filler characters, runs of variation selectors, joiners that join nothing.
        homoglyph: For words that mix Latin with letters of one script that look Latin, and for styled letters
            (mathematical, of full width, encircled). "clip" makes them plain Latin.
        damaged: For U+FFFD and noncharacters, the traces of a broken decoding; cannot be clipped.
        max_rows: Largest number of texts in a batch.
        otherwise: "reject" or "quarantine", for texts that break any other rule: sizes, tokens, encoding.
    Policies: "accept" does not ask; "clip" takes the characters out (see above) and accepts; "reject" refuses;
        "quarantine" refuses with a reason that asks to keep the text aside. Whatever the policies, a text that is not
        str or bytes, whose bytes are not UTF-8, that holds a lone surrogate, or more than 30 marks on one letter is
        refused.
    Raises: ConfigurationError: a rule contradicts itself.
    Cost: One pass in C for plain ASCII, a few passes with Python calls by letter otherwise.
    Example:
        >>> spec = TextSpec(max_bytes=100)
        >>> result = spec.check(["p\u0430ypal\u200b login", b"caf\xc3\xa9", "\u202edrowssap", b"\xff"])
        >>> result.x, result.reasons[2:]
        (['paypal login', 'café'], (('input: bidirectional control characters',), ('input: not UTF-8',)))
    """

    max_bytes: int = 32_768
    min_bytes: int = 0
    max_tokens: int | None = None
    tokenizer: Tokenizer | None = dataclasses.field(default=None, compare=False, repr=False)
    form: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = "NFC"
    not_normal: Policy = "clip"
    bidi: Policy = "reject"
    control: Policy = "reject"
    invisible: Policy = "clip"
    homoglyph: Policy = "clip"
    damaged: Literal["accept", "reject", "quarantine"] = "reject"
    max_rows: int = 1024
    otherwise: Literal["reject", "quarantine"] = "reject"

    def __post_init__(self) -> None:
        check_int(self.max_bytes, "max_bytes")
        check_int(self.min_bytes, "min_bytes", 0, self.max_bytes)
        check_int(self.max_rows, "max_rows", 1, MOST_ROWS)
        check_choice(self.form, (*_FORMS, None), "form")
        for name in ("not_normal", *_STRIPPED):
            check_choice(getattr(self, name), ("accept", "clip", "reject", "quarantine"), name)
        check_choice(self.damaged, ("accept", "reject", "quarantine"), "damaged")
        check_choice(self.otherwise, ("reject", "quarantine"), "otherwise")
        if self.max_tokens is not None:
            check_int(self.max_tokens, "max_tokens")
            check_callable(self.tokenizer, "tokenizer", "Pass the tokenizer whose tokens max_tokens counts")
        if self.tokenizer is not None:
            check_callable(self.tokenizer, "tokenizer", "Pass a function from a text to its tokens")

    @classmethod
    def infer(
        cls,
        texts: Any,
        *,
        margin: float = 0.25,
        tokenizer: Tokenizer | None = None,
        form: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = "NFC",
        max_rows: int = 1024,
    ) -> "TextSpec":
        """The rules that trusted texts satisfy: sizes with room above, and "accept" where one of them has a trap.

        Args:
            texts: A list of texts, trusted, not empty.
            margin: Room above the largest number of bytes and of tokens, as a share, >= 0.
            tokenizer: As in `TextSpec`; with one, the tokens are capped too.
            form: As in `TextSpec`.
            max_rows: As in `TextSpec`.
        Raises: ConfigurationError: no list of texts, or one of them can never be accepted.
        """
        check_number(margin, "margin", 0.0)
        if type(texts) not in (list, tuple) or not texts:
            raise refuse("a list of at least one text", "texts", texts, "Pass trusted texts")
        loose = cls(max_bytes=2**40, form=form, max_rows=MOST_ROWS, **dict.fromkeys((*_STRIPPED, "damaged"), "accept"))  # type: ignore[arg-type]  # "accept" is a policy of each
        checked = loose.check(texts)
        if not bool(checked.accepted.all()):
            reason = checked.fault or next(reason for row in checked.reasons for reason in row)
            raise refuse("texts that can be accepted", "texts", reason, "Remove the texts that are broken")
        seen = frozenset().union(*map(_traps, checked.x))
        sizes = [len(text if isinstance(text, bytes) else text.encode()) for text in (*texts, *checked.x)]
        room: dict[str, Any] = {"max_bytes": int(max(sizes) * (1 + margin)) or 1}
        if tokenizer is not None:
            room["max_tokens"] = int(_most_tokens(tokenizer, checked.x) * (1 + margin)) or 1
        accepted: dict[str, Any] = dict.fromkeys(seen, "accept")
        return cls(tokenizer=tokenizer, form=form, max_rows=max_rows, **room, **accepted)

    def check(self, texts: Any) -> SpecResult:
        """Judge a list of str or bytes. Any object may be passed; nothing raises.

        Returns: Verdicts; `x` is the list of the accepted texts, clipped and normalised, as str.
        """
        if type(texts) not in (list, tuple):
            return refused_batch("input: not a list of texts")
        if len(texts) > self.max_rows:
            return refused_batch("input: too many rows", min(len(texts), MOST_ROWS))
        judged = [self._judge(text) for text in texts]
        accepted = torch.tensor([not reasons for _, reasons in judged], dtype=torch.bool)
        kept = [text for text, reasons in judged if not reasons]
        return SpecResult(None, accepted, tuple(reasons for _, reasons in judged), kept)

    def _judge(self, raw: object) -> tuple[str, Reasons]:
        try:
            text = self._decoded(raw)
            text = self._clipped(text) if self._is_clipping(text) else text
            reasons = self._broken(text)
            return text, reasons or self._counted(text)
        except _Refused as refusal:
            return "", (remark(self.otherwise, str(refusal)),)
        except Exception:
            return "", (remark(self.otherwise, "cannot be inspected"),)

    def _decoded(self, raw: object) -> str:
        if type(raw) is bytes:
            if len(raw) > self.max_bytes:
                raise _Refused("too many bytes")
            try:
                return _safe(raw.decode("utf-8"))
            except UnicodeDecodeError:
                raise _Refused("not UTF-8") from None
        if type(raw) is not str:  # a subclass may run its own code
            raise _Refused("not a text")
        if len(raw) > self.max_bytes:  # each character has at least one byte
            raise _Refused("too many bytes")
        return _safe(raw)

    def _is_clipping(self, text: str) -> bool:
        return not text.isascii() or (self.control == "clip" and bool(find_traps(text)))

    def _clipped(self, text: str) -> str:
        """What the rules clip is clipped until nothing changes: taking a character out may bring others together."""
        names = tuple(name for name in _STRIPPED if getattr(self, name) == "clip")
        for _ in range(_MOST_PASSES):
            before, text = text, strip_traps(text, names)
            if self.form is not None and self.not_normal == "clip":
                text = unicodedata.normalize(self.form, text)
            if len(text) > self.max_bytes:  # a compatibility form can be eighteen times as long
                raise _Refused("too many bytes")
            if _safe(text) == before:
                return text
        raise _Refused("characters that come back when clipped")

    def _broken(self, text: str) -> Reasons:
        size = len(text.encode())
        if size > self.max_bytes:
            raise _Refused("too many bytes")
        if size < self.min_bytes:
            raise _Refused("too few bytes")
        found = {name for name in _traps(text) if getattr(self, name) != "accept"}
        if self.form is not None and self.not_normal != "accept" and not unicodedata.is_normalized(self.form, text):
            found.add("not_normal")
        return tuple(remark(getattr(self, name), _WORDS[name]) for name in sorted(found))

    def _counted(self, text: str) -> Reasons:
        if self.max_tokens is None or self.tokenizer is None:
            return ()
        try:
            count = _count(self.tokenizer, text)
        except Exception:
            raise _Refused("the tokenizer failed") from None
        if count > self.max_tokens:
            raise _Refused("too many tokens")
        return ()

    def to_dict(self) -> dict[str, Any]:
        """The rules as JSON types; of the tokenizer only that there is one."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"schema": _SCHEMA, **fields, "tokenizer": self.tokenizer is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, tokenizer: Tokenizer | None = None) -> "TextSpec":
        """The rules back from `to_dict`, with the tokenizer that they had; a missing one is refused."""
        found = spec_fields(data, cls, _SCHEMA)
        if found["tokenizer"] is not False and tokenizer is None:
            raise refuse("the tokenizer that the rules were saved with", "tokenizer", None, "Pass tokenizer=")
        return cls(**{**found, "tokenizer": tokenizer})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rules as JSON, whole or not at all."""
        write_spec(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, tokenizer: Tokenizer | None = None) -> "TextSpec":
        """The rules back from `save`."""
        return cls.from_dict(read_spec(path, cls.__name__), tokenizer=tokenizer)

    def to_json_schema(self) -> dict[str, Any]:
        """A JSON Schema (draft 2020-12) of a batch. Coarser than `check`: what it refuses, `check` refuses too."""
        text = {"type": "string", "maxLength": self.max_bytes}
        if self.control in ("reject", "quarantine"):
            text["pattern"] = "^[^\\u0000-\\u0008\\u000b\\u000c\\u000e-\\u001f\\u007f-\\u009f]*$"
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "array",
            "maxItems": self.max_rows,
            "items": text,
        }


class _Refused(Exception):
    """Ends the look at one text; its message is the rule that it breaks."""


def _safe(text: str) -> str:
    """The text, if it can be encoded and normalised in linear time."""
    if text.isascii():
        return text
    run = 0
    for letter in text:
        run = run + 1 if unicodedata.combining(letter) else 0
        if run > _LONGEST_RUN:
            raise _Refused("too many marks on one letter")
        if "\ud800" <= letter <= "\udfff":
            raise _Refused("a lone surrogate")
    return text


def _traps(text: str) -> frozenset[str]:
    """The names of the rules that a text breaks, but for its normal form."""
    found = find_traps(text)
    return (found & frozenset(_STRIPPED)) | ({"damaged"} if "replacement" in found else frozenset())


def _count(tokenizer: Tokenizer, text: str) -> int:
    tokens = tokenizer(text)
    return tokens if isinstance(tokens, int) and not isinstance(tokens, bool) else len(tokens)


def _most_tokens(tokenizer: Tokenizer, texts: list[str]) -> int:
    check_callable(tokenizer, "tokenizer", "Pass a function from a text to its tokens")
    try:
        return max(_count(tokenizer, text) for text in texts)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise refuse(
            "a tokenizer that takes every text", "tokenizer", found, "Return the tokens or their number"
        ) from error
