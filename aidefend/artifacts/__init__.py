"""Model files that may be tampered with or malicious: manifests, signatures, safe loading, inspection, conversion."""

from aidefend.artifacts.conversion import convert
from aidefend.artifacts.inspection import inspect_artifact
from aidefend.artifacts.limits import Limits
from aidefend.artifacts.loading import safe_load
from aidefend.artifacts.manifest import Manifest

__all__ = ["Limits", "Manifest", "convert", "inspect_artifact", "safe_load"]
