"""Every report form parses back, holds every finding, and cannot be broken by the text of a finding."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import fromstring

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidefend._core.errors import ConfigurationError, MissingExtra
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend.audit import AuditReport, Figure, Section, SummaryRow, render_page
from aidefend.audit.cleaning import markdown, visible
from aidefend.audit.mapping import references
from aidefend.audit.sarif import sarif_log


def parse(xml):
    return fromstring(xml)  # noqa: S314 - written by the library under test, a moment ago


PART = json.loads(Path(__file__).with_name("sarif_2_1_0_part.json").read_text())  # ours: stricter where we write
WHOLE = json.loads(Path(__file__).with_name("sarif-2.1.0-rtm.5.json").read_text())  # as published, unchanged
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
HOSTILE = (
    "</style></title><script>alert(1)</script>\"'><img src=x onerror=alert(1)>|]]>&lt;{{ 7 * 7 }}{% raw %}"
    "\x00\x08\x1b[31m\u202e\ufffe\ud800\r\n| a | b |\n# [x](javascript:alert(1)) `code` \\ javascript:alert(2)"
)
STATUSES = ("measured", "not shown", "not tested", "failed")


def example():
    return [
        Finding(
            "membership.auc",
            "AUC",
            Severity.HIGH,
            0.7,
            0.68,
            0.72,
            400,
            {"seed": 0},
            "queries",
            "a bound",
            references("membership.auc"),
        ),
        Finding("evasion.clean_accuracy", "Accuracy", value=0.9, low=0.88, high=0.92, n=100),
        Finding("guard", "Input guard: not tested", limits="Needs guard.", status="not tested"),
        Finding("inversion.evaluator_accuracy", "Seen by an evaluator", status="not shown", limits="flat"),
        Finding("extraction", "It broke", Severity.HIGH, setting={"error": "ValueError: x"}, status="failed"),
        Finding("storage.secret", "Secret", Severity.HIGH, setting={"path": "a b/config.yaml", "line": 3}),
    ]


def hostile_finding(text, status="measured"):
    setting = {"path": text, text: text, "error": text, "reason": text}
    return Finding(
        text, text, Severity.HIGH, text, 0.1, 0.2, 3, setting, text, text, {text: text, "atlas": text}, status
    )


REPORT = AuditReport(Evidence(example(), {"seed": 0, "plan": {"name": "quick"}, "run": {"seconds": 1}}))


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in ("meta", "img", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"<{self.open[-1:]}> closed by </{tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)


def check_page(html):
    page = Page(html)
    assert not page.open, "every element is closed"
    allowed = (
        "html head meta title style body div header main h1 h2 h3 p ul ol li nav section strong span a table thead"
    )
    allowed += " tbody tr th td code svg rect details summary dl dt dd footer figure img figcaption"
    assert set(page.tags) <= set(allowed.split())
    for tag, name, value in page.attributes:
        assert not name.startswith("on") and name != "style"
        if name == "src":
            assert value.startswith("data:image/png;base64,") and base64.b64decode(value[22:], validate=True)
        if name == "href":
            assert value.startswith(("#", "https://"))
        if tag == "img" and name == "alt":
            assert value
    assert page.tags.count("style") == 1
    return page


def test_the_page_holds_every_finding_and_only_inline_content():
    figure = Figure(PNG, "a curve")
    assert check_page(REPORT.to_html(figures={"membership": [figure]})).tags.count("img") == 1
    page = check_page(REPORT.to_html())
    text = " ".join(page.words)
    for finding in REPORT.findings:
        assert finding.title in text and finding.id in text
    assert "0.68 to 0.72" in text and "n = 400" in text and "AML.T0024.000" in text and REPORT.digest in text
    assert ("a", "href", "https://atlas.mitre.org/techniques/AML.T0024.000") in page.attributes


def test_the_policy_of_the_page_allows_its_own_style_and_nothing_else():
    html = REPORT.to_html()
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html).group(1)
    assert (
        policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert "unsafe" not in policy and "url(" not in style and "@import" not in style


def test_a_page_of_sections_as_the_demo_uses_it():
    section = Section(
        "Poisoning",
        "First paragraph.\n\nSecond <b>paragraph</b>.",
        header=("model", "accuracy"),
        rows=[("undefended", 0.98), ("screened", "97 %")],
        figures=[Figure(PNG, "trigger in the corner", "The trigger")],
        findings=example()[:1],
    )
    html = render_page(
        "Demo", [SummaryRow("poisoning", "patch", "99 %", "1 %", "one trigger")], [section, Section("Empty")],
        subtitle="Real data", metadata={"seed": 0}, notes=["A note"],
    )  # fmt: skip
    page = check_page(html)
    text = " ".join(page.words)
    assert "Second <b>paragraph</b>." in text and "b" not in page.tags
    for words in ("99 %", "one trigger", "undefended", "The trigger", "A note", "Real data", "Contents"):
        assert words in text
    assert page.tags.count("table") == 2 and page.tags.count("figure") == 1
    assert ("td", "data-label", "accuracy") in page.attributes


def test_bad_sections_are_refused():
    for call, match in [
        (lambda: Section("t", header=("a",), rows=[("x", "y")]), "rows of 1 cells"),
        (lambda: Figure(b"GIF89a", "alt"), "PNG bytes"),
        (lambda: Figure(PNG, " "), "cannot see"),
        (lambda: render_page("t", [("only", "three", "cells")]), "five cells"),
    ]:
        with pytest.raises(ConfigurationError, match=match):
            call()


def test_a_missing_template_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(MissingExtra, match=r"aidefend\[report\]"):
        REPORT.to_html()


def validate_sarif(log):
    jsonschema.Draft4Validator(WHOLE).validate(log)
    jsonschema.Draft7Validator(PART).validate(log)


def test_the_published_schema_refuses_what_it_should():
    log = json.loads(REPORT.to_sarif())
    for change in (
        lambda run: run.pop("tool"),
        lambda run: run["results"][0].pop("message"),
        lambda run: run["results"][0].update(level="high"),
        lambda run: run["tool"]["driver"].pop("name"),
    ):
        broken = json.loads(json.dumps(log))
        change(broken["runs"][0])
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft4Validator(WHOLE).validate(broken)


def check_sarif(report):
    log = json.loads(report.to_sarif())
    validate_sarif(log)
    run = log["runs"][0]
    rules = run["tool"]["driver"]["rules"]
    assert len(run["results"]) == len(report.findings), "nothing is dropped"
    assert len({rule["id"] for rule in rules}) == len(rules)
    taxa = {(c["name"], taxon["id"]) for c in run.get("taxonomies", ()) for taxon in c["taxa"]}
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
    for rule in rules:
        for relation in rule.get("relationships", ()):
            assert (relation["target"]["toolComponent"]["name"], relation["target"]["id"]) in taxa
    return run


def test_sarif_follows_the_standard_and_shows_what_was_not_measured():
    run = check_sarif(REPORT)
    kinds = {result["ruleId"]: (result["kind"], result["level"]) for result in run["results"]}
    assert kinds == {
        "membership.auc": ("fail", "error"),
        "evasion.clean_accuracy": ("informational", "none"),
        "guard": ("notApplicable", "none"),
        "inversion.evaluator_accuracy": ("open", "none"),
        "extraction": ("fail", "error"),
        "storage.secret": ("fail", "error"),
    }
    assert run["invocations"][0]["executionSuccessful"] is False
    assert "ValueError: x" in run["invocations"][0]["toolExecutionNotifications"][0]["message"]["text"]
    place = run["results"][5]["locations"][0]["physicalLocation"]
    assert place == {"artifactLocation": {"uri": "a%20b/config.yaml"}, "region": {"startLine": 3}}
    clean = sarif_log(Evidence(example()[:2]))["runs"][0]
    assert clean["invocations"][0]["executionSuccessful"] is True


def test_planted_a_malformed_log_is_refused_by_the_schema():
    """The schema can say no: for each kind of mistake."""
    for change in (
        lambda run: run["results"][0].update(level="fatal"),
        lambda run: run["results"][0].update(extra=1),
        lambda run: run["results"][0].pop("message"),
        lambda run: run["results"][1].update(level="error"),
        lambda run: run.pop("tool"),
        lambda run: run["results"][5]["locations"][0]["physicalLocation"]["artifactLocation"].update(uri="a b"),
    ):
        log = json.loads(REPORT.to_sarif())
        change(log["runs"][0])
        with pytest.raises(jsonschema.ValidationError):
            validate_sarif(log)


def test_fingerprints_stay_when_only_the_number_changes():
    first, second = (
        sarif_log(Evidence([Finding("membership.auc", "AUC", value=value)]))["runs"][0]["results"][0]
        for value in (0.5, 0.7)
    )
    assert first["partialFingerprints"] == second["partialFingerprints"]


def test_junit_counts_and_outcomes():
    suite = parse(REPORT.to_junit()).find("testsuite")
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "6", "failures": "2", "errors": "1", "skipped": "2",
    }  # fmt: skip
    policy = {"evasion.clean_accuracy": {"min": 0.95}, "privacy.epsilon_excess": {"max": 0}}
    suite = parse(REPORT.to_junit(policy=policy)).find("testsuite")
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    broken = [case.get("name") for case in suite if case.find("error") is not None]
    assert failed == ["clean_accuracy"] and broken == ["extraction", "epsilon_excess"]
    assert len(suite) == int(suite.get("tests")) == 7


def test_json_comes_back_and_a_changed_number_does_not():
    data = json.loads(REPORT.to_json())
    assert data["schema"] == "aidefend.audit/1" and data["parts"]["extraction"] == "failed"
    assert AuditReport.from_dict(data).digest == REPORT.digest
    data["evidence"]["findings"][0]["value"] = 0.5
    with pytest.raises(ConfigurationError, match="digest"):
        AuditReport.from_dict(data)


def test_markdown_has_one_line_for_each_finding():
    lines = REPORT.to_markdown().splitlines()
    table = [line for line in lines if line.startswith("| ")][1:]
    assert len(table) == len(REPORT.findings) and "failed" in table[0]


def test_files_are_written_whole_and_equal_the_text(tmp_path):
    for name in ("html", "json", "markdown", "sarif", "junit"):
        path = tmp_path / f"report.{name}"
        text = getattr(REPORT, f"to_{name}")(path)
        assert path.read_text(encoding="utf-8") == text and path.stat().st_size > 100
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("status", STATUSES)
def test_planted_hostile_text_breaks_no_format(status, tmp_path):
    report = AuditReport(Evidence([hostile_finding(HOSTILE, status), *example()], {HOSTILE: HOSTILE}))
    page = check_page(report.to_html(tmp_path / "r.html", title=HOSTILE))
    assert "script" not in page.tags and "49" not in " ".join(page.words).split()
    check_sarif(report)
    suite = parse(report.to_junit(tmp_path / "r.xml").encode()).find("testsuite")
    assert len(suite) == 7
    json.loads(report.to_json(tmp_path / "r.json"))
    lines = report.to_markdown(tmp_path / "r.md").splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + 7
    assert "<script" not in report.to_markdown() and "](javascript" not in report.to_markdown()
    hostile = Section(HOSTILE, HOSTILE, (HOSTILE,), [(HOSTILE,)], [Figure(PNG, HOSTILE, HOSTILE)])
    check_page(render_page(HOSTILE, [(HOSTILE,) * 5], [hostile] * 2, subtitle=HOSTILE, notes=[HOSTILE]))


@settings(max_examples=10)
@given(st.text(st.characters(), max_size=60), st.sampled_from(STATUSES))
def test_any_text_survives_all_formats(text, status):
    report = AuditReport(Evidence([hostile_finding(text, status)]))
    check_page(report.to_html())
    check_sarif(report)
    assert len(parse(report.to_junit().encode()).find("testsuite")) == 1
    json.loads(report.to_json().encode())
    report.to_markdown().encode()


@given(st.text(st.characters(), max_size=40))
def test_cleaned_text_is_valid_xml_and_one_markdown_cell(text):
    assert parse(f"<a>{visible(text).replace('&', '&amp;').replace('<', '&lt;')}</a>") is not None
    cell = markdown(text)
    assert "\n" not in cell and not re.search(r"(?<!\\)[|`<]", cell.replace("\\\\", ""))


def test_a_status_of_each_part_and_access_by_id():
    assert [REPORT.status(part) for part in ("extraction", "membership", "inversion", "guard", "absent")] == [
        "failed", "measured", "not shown", "not tested", "not tested",
    ]  # fmt: skip
    assert "membership.auc" in REPORT and REPORT["membership.auc"].n == 400 and REPORT.worst is Severity.HIGH
