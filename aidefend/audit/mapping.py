"""Which public catalogue entries a finding belongs to, and which direction of its value is good.

Sources, read in 2026: MITRE ATLAS 5.6 (atlas.mitre.org); NIST AI 100-2 E2025, taxonomy index (identifiers NISTAML.0xx);
OWASP Machine Learning Security Top 10, 2023 draft (owasp.org); CWE 4.x (cwe.mitre.org). A threat without an entry of
its own in a catalogue has none here.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Better = Literal["high", "low"]


class Reference(NamedTuple):
    """One row: catalogue entries of the findings whose ids start with a prefix."""

    atlas: tuple[str, ...]
    nist: tuple[str, ...]
    owasp: tuple[str, ...]
    cwe: tuple[str, ...]


NAMES: Mapping[str, str] = {
    "AML.T0010": "AI Supply Chain Compromise",
    "AML.T0011.000": "Unsafe AI Artifacts",
    "AML.T0015": "Evade AI Model",
    "AML.T0018": "Manipulate AI Model",
    "AML.T0020": "Poison Training Data",
    "AML.T0024.000": "Infer Training Data Membership",
    "AML.T0024.001": "Invert AI Model",
    "AML.T0024.002": "Extract AI Model",
    "AML.T0043": "Craft Adversarial Data",
    "NISTAML.022": "Evasion",
    "NISTAML.023": "Backdoor Poisoning",
    "NISTAML.03": "Privacy Compromises",
    "NISTAML.031": "Model Extraction",
    "NISTAML.032": "Reconstruction",
    "NISTAML.033": "Membership Inference",
    "NISTAML.05": "Supply Chain Attacks",
    "ML01:2023": "Input Manipulation Attack",
    "ML02:2023": "Data Poisoning Attack",
    "ML03:2023": "Model Inversion Attack",
    "ML04:2023": "Membership Inference Attack",
    "ML05:2023": "Model Theft",
    "ML06:2023": "AI Supply Chain Attacks",
    "ML10:2023": "Model Poisoning",
    "CWE-312": "Cleartext Storage of Sensitive Information",
    "CWE-353": "Missing Support for Integrity Check",
    "CWE-459": "Incomplete Cleanup",
    "CWE-502": "Deserialization of Untrusted Data",
    "CWE-732": "Incorrect Permission Assignment for Critical Resource",
    # The full name ends "... Detection or Handling of Adversarial Input Perturbations".
    "CWE-1039": "Automated Recognition Mechanism with Inadequate Detection of Adversarial Input Perturbations",
}

_TABLE: Mapping[str, Reference] = {
    "artifacts": Reference(("AML.T0010", "AML.T0011.000"), ("NISTAML.05",), ("ML06:2023", "ML10:2023"), ("CWE-502",)),
    "evasion": Reference(("AML.T0015", "AML.T0043"), ("NISTAML.022",), ("ML01:2023",), ("CWE-1039",)),
    "extraction": Reference(("AML.T0024.002",), ("NISTAML.031",), ("ML05:2023",), ()),
    "guard": Reference(("AML.T0015", "AML.T0043"), ("NISTAML.022",), ("ML01:2023",), ("CWE-1039",)),
    "inversion": Reference(("AML.T0024.001",), ("NISTAML.032",), ("ML03:2023",), ()),
    "membership": Reference(("AML.T0024.000",), ("NISTAML.033",), ("ML04:2023",), ()),
    "poisoning": Reference(("AML.T0018", "AML.T0020"), ("NISTAML.023",), ("ML02:2023", "ML10:2023"), ()),
    "privacy": Reference(("AML.T0024.000",), ("NISTAML.03",), ("ML04:2023",), ()),
    "storage": Reference((), (), ("ML06:2023",), ()),
    "storage.leftover": Reference((), (), (), ("CWE-459",)),
    "storage.permissions": Reference((), (), ("ML06:2023",), ("CWE-732",)),
    "storage.secret": Reference((), (), (), ("CWE-312",)),
    "storage.unsafe_checkpoint": Reference(("AML.T0011.000",), ("NISTAML.05",), ("ML06:2023",), ("CWE-502",)),
    "storage.unsigned_checkpoint": Reference(("AML.T0010",), ("NISTAML.05",), ("ML06:2023",), ("CWE-353",)),
}

_BETTER: Mapping[str, Better] = {
    "artifacts.problems": "low",
    "evasion.clean_accuracy": "high",
    "evasion.robust_accuracy": "high",
    "extraction.agreement": "low",
    "guard.false_positive_rate": "low",
    "guard.joint_attack_success": "low",
    "guard.naive_attack_success": "low",
    "inversion.evaluator_accuracy": "low",
    "inversion.nearest_distance_ratio": "high",
    "membership": "low",
    "poisoning.attack_success_rate": "low",
    "poisoning.clean_accuracy": "high",
    "poisoning.retrained_attack_success_rate": "low",
    "poisoning.retrained_clean_accuracy": "high",
    "privacy.epsilon_excess": "low",
    "privacy.epsilon_lower_bound": "low",
    "storage": "low",
}


def references(finding_id: str) -> dict[str, str]:
    """The `mapping` of a finding: catalogue to entries, by the longest prefix of its id; empty where none is known.

    Example:
        >>> references("membership.auc")["owasp"]
        'ML04:2023'
    """
    row = _longest(finding_id, _TABLE)
    if row is None:
        return {}
    return {name: ", ".join(entries) for name, entries in row._asdict().items() if entries}


def better(finding_id: str) -> Better | None:
    """Whether a higher or a lower value of this measure is the safer one; None where neither is."""
    direction: Better | None = _longest(finding_id, _BETTER)
    return direction


def link(entry: str) -> str:
    """The public page of a catalogue entry."""
    if entry.startswith("AML."):
        return f"https://atlas.mitre.org/techniques/{entry}"
    if entry.startswith("CWE-"):
        return f"https://cwe.mitre.org/data/definitions/{entry.removeprefix('CWE-')}.html"
    if entry.startswith("NISTAML"):
        return "https://doi.org/10.6028/NIST.AI.100-2e2025"
    return "https://owasp.org/www-project-machine-learning-security-top-10"


def _longest(finding_id: str, table: Mapping[str, Any]) -> Any:
    parts = finding_id.split(".")
    prefixes = (".".join(parts[:k]) for k in range(len(parts), 0, -1))
    return next((table[prefix] for prefix in prefixes if prefix in table), None)
