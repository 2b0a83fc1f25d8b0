"""Evidence and indicators as a STIX 2.1 bundle."""

import json
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from aidefend._core.checks import check_choice, refuse
from aidefend._core.evidence import Evidence, Finding
from aidefend._core.storage import canonical_json
from aidefend.collaborate import marking
from aidefend.collaborate.indicators import Indicator
from aidefend.collaborate.marking import Tlp

_SPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://aidefend.example/stix")
_SIGN_OF = {"artifact": "AML.T0011.000", "sample": "AML.T0020", "trigger": "AML.T0020"}


def to_stix(
    evidence: Evidence,
    indicators: Iterable[Indicator] = (),
    *,
    tlp: Tlp = "amber",
    producer: str = "an aidefend user",
    created: str = "1970-01-01T00:00:00.000Z",
) -> dict[str, Any]:
    """A STIX 2.1 bundle: who says it, the findings as notes on ATLAS techniques and mitigations, the indicators.

    Guarantee: equal arguments give an identical bundle, ids included. Samples, labels and settings of findings are not
        in it, only id, title, severity, status, value, interval, n, threat and limits. The bundle is not signed: sign
        the file in which it travels.
    Args:
        evidence: Findings; those with a mapping to techniques or mitigations of ATLAS refer to them.
        indicators: Signs of attacks to share.
        tlp: How far the receiver may pass it on (Traffic Light Protocol).
        producer: Your organisation's name, one printable line of at most 256 characters.
        created: Time stamp of all objects, RFC 3339 in UTC.
    Returns: The bundle as JSON types.
    Raises: ConfigurationError: unknown tlp, malformed producer or time, a bundle of more than 4 MiB.
    Source: OASIS STIX 2.1 (2021). Own pattern type "aidefend" for samples and triggers, which STIX patterns cannot say.
    Example:
        >>> bundle = to_stix(Evidence(), [Indicator("artifact", "0" * 64)])
        >>> [item["type"] for item in bundle["objects"]]
        ['marking-definition', 'identity', 'indicator']
    """
    if not isinstance(evidence, Evidence):
        cure = "Use to_evidence() of a report, or Evidence()"
        raise refuse("evidence", "evidence", type(evidence).__name__, cure)
    check_choice(tlp, tuple(marking.TLP), "tlp")
    if not marking.is_time(created):
        raise refuse("a time such as 2026-01-31T12:00:00.000Z", "created", created, "Use RFC 3339 in UTC")
    if not marking.is_name(producer):
        raise refuse("a printable name of 1 to 256 characters", "producer", producer, "Pass your organisation's name")
    maker = _Maker(tlp, producer, created)
    objects = [maker.marking, maker.identity]
    for finding in evidence.findings:
        objects += maker.finding(finding)
    objects += [maker.indicator(one) for one in dict.fromkeys(_checked(indicators))]
    unique = {item["id"]: item for item in objects}
    bundle = {"type": "bundle", "id": _identifier("bundle", list(unique)), "objects": list(unique.values())}
    return _checked_size(bundle)


class _Maker:
    """Makes objects that share producer, marking and time."""

    def __init__(self, tlp: str, producer: str, created: str) -> None:
        level = marking.older_name(tlp)
        self.marking: dict[str, Any] = {
            "type": "marking-definition",
            "spec_version": "2.1",
            "id": marking.TLP[tlp],
            "created": "2017-01-20T00:00:00.000Z",
            "definition_type": "tlp",
            "name": f"TLP:{level.upper()}",
            "definition": {"tlp": level},
        }
        self._common: dict[str, Any] = {"spec_version": "2.1", "created": created, "modified": created}
        self._common |= {"object_marking_refs": [marking.TLP[tlp]]}
        self.identity = self._object("identity", name=producer, identity_class="organization")
        self._common |= {"created_by_ref": self.identity["id"]}

    def finding(self, finding: Finding) -> list[dict[str, Any]]:
        """The entries of ATLAS that a finding names, and a note on them, or on the producer where it names none."""
        about = [self._entry("attack-pattern", entry) for entry in marking.techniques(finding.mapping)]
        about += [self._entry("course-of-action", entry) for entry in marking.mitigations(finding.mapping)]
        return [*about, self._note(finding, [item["id"] for item in about] or [self.identity["id"]])]

    def indicator(self, indicator: Indicator) -> dict[str, Any]:
        """An indicator; a file digest as a STIX pattern, samples and triggers in a form of our own."""
        if indicator.kind == "artifact":
            pattern, kind = (
                marking.FILE_PATTERN.format(indicator.digest),
                {"pattern_type": "stix", "pattern_version": "2.1"},
            )
        else:
            fields = {name: value for name, value in indicator.to_dict().items() if name != "title"}
            pattern, kind = canonical_json(fields), {"pattern_type": marking.PATTERN_TYPE}
        title = {"name": indicator.title} if indicator.title else {}
        return self._object(
            "indicator",
            **title,
            indicator_types=["malicious-activity"],
            pattern=pattern,
            **kind,
            valid_from=self._common["created"],
            external_references=[_reference(_SIGN_OF[indicator.kind])],
        )

    def _entry(self, kind: str, entry: str) -> dict[str, Any]:
        return self._object(kind, name=entry, external_references=[_reference(entry)])

    def _note(self, finding: Finding, about: list[str]) -> dict[str, Any]:
        interval = "" if finding.low is None else f" ({finding.low} to {finding.high})"
        text = f"{finding.id}: {finding.value}{interval}, n = {finding.n}, {finding.status}. {finding.threat}"
        content = f"{text.strip()} {finding.limits}".strip()
        labels = [f"severity:{finding.severity.name.lower()}", f"status:{finding.status.replace(' ', '-')}"]
        return self._object("note", abstract=finding.title, content=content, labels=labels, object_refs=about)

    def _object(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "id": _identifier(kind, [self._common, fields]), **self._common, **fields}


def _reference(entry: str) -> dict[str, str]:
    return {"source_name": "mitre-atlas", "external_id": entry, "url": marking.atlas_page(entry)}


def _identifier(kind: str, content: Any) -> str:
    return f"{kind}--{uuid.uuid5(_SPACE, canonical_json([kind, content]))}"


def _checked(indicators: Any) -> list[Indicator]:
    if isinstance(indicators, Indicator | str | bytes | Mapping | Tensor) or not isinstance(indicators, Iterable):
        raise refuse("a collection of indicators", "indicators", type(indicators).__name__, "Pass a list of Indicator")
    found = list(indicators)
    if strange := [type(one).__name__ for one in found if not isinstance(one, Indicator)]:
        raise refuse("indicators", "indicators", strange[0], "Make them with sample_indicators and its like")
    return found


def _checked_size(bundle: dict[str, Any]) -> dict[str, Any]:
    """What `from_stix` of a partner would refuse is refused here."""
    size, count = len(json.dumps(bundle)), len(bundle["objects"])
    if size > marking.LARGEST or count > marking.MOST_OBJECTS:
        rule = f"at most {marking.LARGEST} bytes and {marking.MOST_OBJECTS} objects"
        raise refuse(rule, "bundle", f"{size} bytes, {count} objects", "Split the indicators over several bundles")
    return bundle
