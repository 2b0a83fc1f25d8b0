"""Defenses for AI systems that wrap the training loop, model and data pipeline you already have.

The names below load on first use, so that `import aidefend` costs milliseconds and imports neither torch nor a room.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aidefend import adversarial as adversarial
    from aidefend import artifacts as artifacts
    from aidefend import attacks as attacks
    from aidefend import audit as audit
    from aidefend import collaborate as collaborate
    from aidefend import datasets as datasets
    from aidefend import explain as explain
    from aidefend import monitor as monitor
    from aidefend import privacy as privacy
    from aidefend import sanitize as sanitize
    from aidefend import validate as validate
    from aidefend._core.errors import AidefendError as AidefendError
    from aidefend._core.errors import BudgetExceeded as BudgetExceeded
    from aidefend._core.errors import ConfigurationError as ConfigurationError
    from aidefend._core.errors import IncompatibleModel as IncompatibleModel
    from aidefend._core.errors import InputRejected as InputRejected
    from aidefend._core.errors import MissingExtra as MissingExtra
    from aidefend._core.errors import PrivacyError as PrivacyError
    from aidefend._core.errors import ThreatModelError as ThreatModelError
    from aidefend._core.errors import UnsafeArtifact as UnsafeArtifact
    from aidefend._core.evidence import Evidence as Evidence
    from aidefend._core.evidence import Finding as Finding
    from aidefend._core.evidence import Severity as Severity
    from aidefend._core.report import Report as Report
    from aidefend._core.threat import Threat as Threat

__version__ = "0.1.0"

_ROOMS = (
    "adversarial",
    "artifacts",
    "attacks",
    "audit",
    "collaborate",
    "datasets",
    "explain",
    "monitor",
    "privacy",
    "sanitize",
    "validate",
)
_HOMES = {
    "AidefendError": "errors",
    "BudgetExceeded": "errors",
    "ConfigurationError": "errors",
    "Evidence": "evidence",
    "Finding": "evidence",
    "IncompatibleModel": "errors",
    "InputRejected": "errors",
    "MissingExtra": "errors",
    "PrivacyError": "errors",
    "Report": "report",
    "Severity": "evidence",
    "Threat": "threat",
    "ThreatModelError": "errors",
    "UnsafeArtifact": "errors",
}

__all__ = [
    "AidefendError",
    "BudgetExceeded",
    "ConfigurationError",
    "Evidence",
    "Finding",
    "IncompatibleModel",
    "InputRejected",
    "MissingExtra",
    "PrivacyError",
    "Report",
    "Severity",
    "Threat",
    "ThreatModelError",
    "UnsafeArtifact",
    "__version__",
    "adversarial",
    "artifacts",
    "attacks",
    "audit",
    "collaborate",
    "datasets",
    "explain",
    "monitor",
    "privacy",
    "sanitize",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"aidefend.{name}")
    if name in _HOMES:
        return getattr(import_module(f"aidefend._core.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'aidefend' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
