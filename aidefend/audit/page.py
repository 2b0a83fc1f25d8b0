"""One self-contained HTML page: a summary, and sections with text, tables, figures and findings."""

import base64
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aidefend._core.checks import check_items, check_kind, refuse
from aidefend._core.errors import MissingExtra
from aidefend._core.evidence import Finding, Severity
from aidefend.audit.cleaning import interval, number, one_line, visible
from aidefend.audit.mapping import NAMES, link

_TEMPLATES = Path(__file__).with_name("templates")
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture in the page: PNG bytes, what it shows for those who cannot see it, and a line below it."""

    png: bytes
    alt: str
    caption: str = ""

    def __post_init__(self) -> None:
        given: object = self.png
        if not isinstance(given, bytes) or not given.startswith(_PNG):
            raise refuse("PNG bytes", "png", type(given).__name__, "Save the figure as PNG into io.BytesIO first")
        check_kind(self.caption, str, "caption", "Pass words")
        if not check_kind(self.alt, str, "alt", "Say what the figure shows").strip():
            raise refuse("a text for readers who cannot see the figure", "alt", self.alt, "Say what it shows")


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of the page. Everything but the title may be empty.

    Args:
        title: Heading.
        text: Paragraphs, separated by blank lines; plain text, never markup.
        header: Column titles of the table.
        rows: Rows of the table, as many cells as the header has.
        figures: Pictures, in order.
        findings: Shown with severity, value, interval, limits and catalogue entries.
    """

    title: str
    text: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    figures: Sequence[Figure] = ()
    findings: Sequence[Finding] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                cure = "Give every row one cell for each column title"
                raise refuse(f"rows of {len(self.header)} cells", "rows", list(row), cure)


class SummaryRow(NamedTuple):
    """One line of the table on top: what threatens, how it was tried, without and with defense, what stays open."""

    threat: str
    attack: str
    undefended: str
    defended: str
    limits: str


def render_page(
    title: str,
    summary_rows: Sequence[SummaryRow | Sequence[str]] = (),
    sections: Sequence[Section] = (),
    *,
    subtitle: str = "",
    metadata: Mapping[str, object] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The page as one text: no script, no network, every picture inline, dark and light, 400 pixels and up.

    Guarantee: no text of a finding, section or row can become markup: everything is escaped, control characters are
        written out, and a content security policy in the page allows nothing but its own style sheet and inline images.
    Args:
        title: Of the page.
        summary_rows: (threat, attack, undefended, defended, limits) each.
        sections: In order.
        subtitle: A line below the title.
        metadata: Name to value, in a list at the end.
        notes: Lines below the summary.
    Returns: HTML.
    Raises: MissingExtra: jinja2 is not installed. ConfigurationError: a summary row without five cells.

    Example:
        >>> page = render_page("Audit of <b>", [SummaryRow("evasion", "PGD", "3 %", "91 %", "linf only")])
        >>> "Audit of &lt;b&gt;" in page, "<script" in page
        (True, False)
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra("jinja2", "report") from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = (_TEMPLATES / "page.css").read_text(encoding="utf-8")
    template = environment.from_string((_TEMPLATES / "page.html").read_text(encoding="utf-8"))
    sections = check_items(sections, Section, "sections", "Pass a list of Section")
    summary_rows = check_items(summary_rows, (SummaryRow, tuple, list), "summary_rows", "Pass a list of SummaryRow")
    notes = check_items(notes, str, "notes", "Pass a list of texts")
    about = {} if metadata is None else check_kind(metadata, Mapping, "metadata", "Pass a dict")
    findings = [finding for section in sections for finding in section.findings]
    page: str = template.render(
        title=visible(title),
        subtitle=visible(subtitle),
        style=style,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        summary=[_summary_row(row) for row in summary_rows],
        notes=[visible(note) for note in notes],
        counts=_counts(findings),
        sections=[_section(section, number) for number, section in enumerate(sections, start=1)],
        metadata=[(visible(name), visible(value)) for name, value in about.items()],
    )
    return page


def _summary_row(row: Sequence[str]) -> list[str]:
    if len(row) != len(SummaryRow._fields):
        cure = "Pass (threat, attack, undefended, defended, limits)"
        raise refuse("summary rows of five cells", "summary_rows", list(row), cure)
    return [visible(cell) for cell in row]


def _section(section: Section, index: int) -> dict[str, Any]:
    worst = max((finding.severity for finding in section.findings), default=None)
    failed = any(finding.status == "failed" for finding in section.findings)
    untested = bool(section.findings) and all(item.status in ("not tested", "not shown") for item in section.findings)
    shown = _in_full(section.findings)
    return {
        "anchor": f"part-{index}",
        "title": visible(section.title),
        "badge": None if worst is None else "failed" if failed else "untested" if untested else worst.name.lower(),
        "paragraphs": [visible(part) for part in section.text.split("\n\n") if part.strip()],
        "header": [visible(cell) for cell in section.header],
        "rows": [[visible(cell) for cell in row] for row in section.rows],
        "figures": [
            {
                "data": base64.b64encode(figure.png).decode(),
                "alt": one_line(figure.alt),
                "caption": visible(figure.caption),
            }
            for figure in section.figures
        ],
        "findings": [_finding(finding) for finding in shown],
        "checks": [_finding(finding) for finding in section.findings if finding not in shown],
        "references": _references(section.findings),
    }


def _in_full(findings: Sequence[Finding]) -> list[Finding]:
    """All but INFO findings without an interval, which fill one line each; these too where there is nothing else."""
    telling = [item for item in findings if item.severity or item.low is not None or item.status != "measured"]
    return telling or list(findings)


def _finding(finding: Finding) -> dict[str, Any]:
    measured = finding.status == "measured"
    setting = {key: value for key, value in finding.setting.items() if value not in (None, "", [], {})}
    return {
        "id": visible(finding.id),
        "title": visible(finding.title),
        "badge": finding.severity.name.lower() if measured else finding.status.replace(" ", "-"),
        "label": finding.severity.name if measured else finding.status,
        "value": number(finding.value),
        "interval": interval(finding.low, finding.high),
        "bar": _bar(finding),
        "n": finding.n,
        "threat": visible(finding.threat),
        "limits": visible(finding.limits),
        "setting": [(visible(key), visible(_plain(value))) for key, value in setting.items()],
    }


def _bar(finding: Finding) -> dict[str, float] | None:
    """Where the value and its interval lie between 0 and 1, in hundredths; None for other values."""
    ends = (finding.low, finding.value, finding.high)
    if any(isinstance(end, bool) or not isinstance(end, int | float) or not 0 <= end <= 1 for end in ends):
        return None
    low, value, high = (100 * float(end) for end in ends if isinstance(end, int | float))
    return {"low": round(low, 2), "value": round(value, 2), "width": round(max(0.6, high - low), 2)}


def _references(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """Catalogue entries, each once, with their public pages; only entries that our own table holds become links."""
    texts = (str(text) for finding in findings for text in finding.mapping.values())
    entries = dict.fromkeys(entry for text in texts for entry in (part.strip() for part in text.split(",")) if entry)
    return [{"entry": visible(entry), "name": NAMES.get(entry, ""), "url": _link(entry)} for entry in entries]


def _link(entry: str) -> str:
    return link(entry) if entry in NAMES else ""


def _plain(value: object) -> str:
    text = ", ".join(f"{key}: {item}" for key, item in value.items()) if isinstance(value, Mapping) else str(value)
    return text if len(text) <= 600 else text[:597] + "..."


def _counts(findings: Sequence[Finding]) -> list[tuple[str, str, int]]:
    """(class, label, number) of findings for each severity that occurs, then of what was not measured."""
    measured = [finding for finding in findings if finding.status == "measured"]
    counts = [
        (severity.name.lower(), severity.name, sum(finding.severity == severity for finding in measured))
        for severity in sorted(Severity, reverse=True)
    ]
    others = ("failed", "not shown", "not tested")
    counts += [(status.replace(" ", "-"), status, sum(item.status == status for item in findings)) for status in others]
    return [count for count in counts if count[2]]
