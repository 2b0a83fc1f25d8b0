"""Text that no report format can choke on: findings may carry file names and messages that an attacker chose."""

import re

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff\ufffe\uffff]"
)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~<>&])")


def visible(text: object) -> str:
    r"""The text with control characters, direction marks and lone surrogates written out as `\uXXXX`.

    What is left is valid in XML 1.0, HTML and UTF-8, and reads in the order in which it was written.

    Example:
        >>> visible("a\x00b\u202ec")
        'a\\u0000b\\u202ec'
    """
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", str(text)).replace("\r", "\\u000d")


def one_line(text: object) -> str:
    """The same on one line."""
    return " ".join(visible(text).split())


def markdown(text: object) -> str:
    """The same with every mark that Markdown or HTML reads escaped."""
    return _MARKDOWN.sub(r"\\\1", one_line(text)).replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\&", "&amp;")


def number(value: object) -> str:
    """A short form of a measured value: 4 digits for fractions, words as they are, an empty text for nothing."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else one_line(value)


def interval(low: float | None, high: float | None) -> str:
    """`low to high`, or an empty text where one end is missing."""
    return "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
