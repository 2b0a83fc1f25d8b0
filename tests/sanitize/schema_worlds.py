"""Sources with known laws, for tests of schemas."""

import numpy as np

from aidefend.sanitize import DatasetSchema


def people(stream, n):
    """Numbers of several laws, holes, texts, flags, labels: clean, and the same for every call with a new stream."""
    income = stream.lognormal(size=n)
    income[stream.random(n) < 0.1] = np.nan
    return {
        "age": stream.integers(18, 91, n),
        "height": stream.normal(170, 10, n),
        "income": income,
        "visits": stream.poisson(3, n),
        "city": stream.choice(["Bonn", "Lyon", "Turin", "Graz"], n, p=[0.4, 0.3, 0.2, 0.1]).astype(object),
        "member": stream.random(n) < 0.3,
        "note": ["word " * int(k) + f"{stream.integers(2**40):012x}" for k in stream.integers(1, 40, n)],
        "y": stream.choice(3, n, p=[0.5, 0.3, 0.2]),
    }


def low_cardinality(stream, n):
    """Few different rows: every row has many equals, with both labels."""
    values = {f"c{i}": stream.choice(["u", "v", "w"], n, p=[0.6, 0.3, 0.1]) for i in range(4)}
    return values | {"y": stream.integers(0, 2, n)}


def learned(make=people, n=2000, seed=0, **options):
    """A schema of n rows in batches of 500."""
    stream = np.random.default_rng(seed)
    return DatasetSchema.infer((make(stream, 500) for _ in range(n // 500)), **options)


def ids(evidence):
    """{measure: columns} of the findings."""
    found = {}
    for finding in evidence.findings:
        found.setdefault(finding.id.removeprefix("schema."), set()).add(finding.setting.get("column"))
    return found
