"""What the reference data of a schema themselves hold, for whoever decides whether to trust them."""

from collections.abc import Iterator

from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend.sanitize.schema.facts import is_class_like
from aidefend.sanitize.schema.profile import Profile
from aidefend.sanitize.schema.wording import THREAT, finding

_FEW = 10  # rows of a class below which it is named as rare


def describe_profile(profile: Profile, digest: str) -> Evidence:
    """Findings on the reference data; severities as in a check, missing values and repeated rows as information."""
    metadata = {"method": "DatasetSchema", "schema": digest, "rows": profile.rows, "columns": sorted(profile.columns)}
    return Evidence([*_entries(profile), *_rows(profile), *_labels(profile)], metadata)


def _entries(profile: Profile) -> Iterator[Finding]:
    for (measure, column), count in sorted(profile.occurrences.items()):
        severity = Severity.INFO if measure == "missing_values" else None
        yield finding(measure, column, count, profile.rows, {"count": count}, severity=severity)
    for name, known in sorted(profile.columns.items()):
        kinds = {kind: count for kind, count in sorted(known.kinds.items()) if count and kind != "missing"}
        if len(set(kinds) - {"whole", "real"}) + bool({"whole", "real"} & set(kinds)) > 1:
            fewest = sum(kinds.values()) - max(kinds.values())
            yield finding("type", name, fewest, known.rows, {"types": kinds}, severity=Severity.MEDIUM)
    if profile.unreadable:
        yield finding("unreadable", "", profile.unreadable, profile.rows + profile.unreadable, {})


def _rows(profile: Profile) -> Iterator[Finding]:
    hashes = profile.hashes
    coverage = {"row_coverage": hashes.coverage}
    if repeated := hashes.rows - hashes.singles:
        yield finding("duplicates", "", repeated, hashes.rows, coverage, severity=Severity.INFO)
    if conflicting := hashes.conflicting:
        yield finding("conflicting_labels", "", conflicting, hashes.rows, coverage)


def _labels(profile: Profile) -> Iterator[Finding]:
    known = profile.columns.get(profile.label or "")
    if known is None or not is_class_like(known) or not known.values.counts:
        return
    counts = known.values.counts
    smallest, total = min(counts.values()), sum(counts.values())
    rare = sorted(name for name, count in counts.items() if count < _FEW)
    setting = {"column": profile.label, "classes": len(counts), "rare": rare[:20], "largest": max(counts.values())}
    yield Finding(
        "schema.smallest_class",
        "Share of the smallest class",
        Severity.LOW if rare else Severity.INFO,
        smallest / total,
        n=total,
        setting=setting,
        threat=THREAT,
    )
