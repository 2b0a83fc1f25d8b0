"""Manifests of the sources of data, verified where the data are read."""

from aidefend.sanitize.sources.source import Source
from aidefend.sanitize.sources.trusted_sources import TrustedSources
from aidefend.sanitize.sources.verification import verify_sources

__all__ = ["Source", "TrustedSources", "verify_sources"]
