"""Defending together: indicators that organisations share, and updates of many clients joined in spite of hostile ones."""

from aidefend.collaborate.aggregation import Aggregation, aggregate
from aidefend.collaborate.avid import to_avid
from aidefend.collaborate.indicators import (
    Indicator,
    IndicatorDetector,
    apply_indicators,
    artifact_indicator,
    sample_indicators,
    trigger_indicator,
)
from aidefend.collaborate.stix import Shared, from_stix, to_stix

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
