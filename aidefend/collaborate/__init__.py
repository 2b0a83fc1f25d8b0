"""Defending together: indicators that organisations share, and client updates joined in spite of hostile ones."""

from aidefend.collaborate.aggregation import Aggregation, aggregate
from aidefend.collaborate.avid import to_avid
from aidefend.collaborate.detector import IndicatorDetector, apply_indicators
from aidefend.collaborate.indicators import (
    Indicator,
    artifact_indicator,
    sample_indicators,
    trigger_indicator,
)
from aidefend.collaborate.stix import to_stix
from aidefend.collaborate.stix_reading import Shared, from_stix

__all__ = [
    "Aggregation",
    "Indicator",
    "IndicatorDetector",
    "Shared",
    "aggregate",
    "apply_indicators",
    "artifact_indicator",
    "from_stix",
    "sample_indicators",
    "to_avid",
    "to_stix",
    "trigger_indicator",
]
