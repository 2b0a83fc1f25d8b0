"""Attacks that copy a model through its answers."""

from aidefend.attacks.extraction.clone import Extraction, ExtractionResult, StudentFn

__all__ = ["Extraction", "ExtractionResult", "StudentFn"]
