"""Schemas of data: types, ranges, values, repeated rows, text traps and drift, inferred from a stream of batches."""

from aidefend.sanitize.schema.schema import DatasetSchema

__all__ = ["DatasetSchema"]
