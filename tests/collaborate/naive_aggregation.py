"""The aggregation methods once more, written as the papers state them: loops over vectors, nothing clever."""

import numpy as np

ROBUST = ("median", "trimmed-mean", "geometric-median", "krum", "multi-krum", "bulyan", "centered-clipping")
FEWEST = {
    "mean": lambda f: 1,
    "median": lambda f: 2 * f + 1,
    "trimmed-mean": lambda f: 2 * f + 1,
    "geometric-median": lambda f: 2 * f + 1,
    "krum": lambda f: 2 * f + 3,
    "multi-krum": lambda f: 2 * f + 3,
    "bulyan": lambda f: 4 * f + 3,
    "centered-clipping": lambda f: 2 * f + 1,
}


def naive(method, rows, f):
    """rows (n, d) float64."""
    return {
        "mean": lambda: rows.mean(axis=0),
        "median": lambda: np.median(rows, axis=0),
        "trimmed-mean": lambda: np.array([trimmed(column, f) for column in rows.T]),
        "geometric-median": lambda: weiszfeld(rows),
        "krum": lambda: rows[krum_order(rows, f)[0]],
        "multi-krum": lambda: rows[krum_order(rows, f)[: len(rows) - f - 2]].mean(axis=0),
        "bulyan": lambda: bulyan(rows, f),
        "centered-clipping": lambda: clipping(rows),
    }[method]()


def trimmed(column, f):
    kept = sorted(column)[f : len(column) - f]
    return sum(kept) / len(kept)


def weiszfeld(rows, rounds=1000):
    point = np.median(rows, axis=0)
    usual = sorted(np.linalg.norm(row - point) for row in rows)[(len(rows) - 1) // 2]
    for _ in range(rounds):
        nearness = [1 / max(np.linalg.norm(row - point), 1e-6 * usual, 1e-100) for row in rows]
        following = sum(share * row for share, row in zip(nearness, rows, strict=True)) / sum(nearness)
        if np.allclose(following, point, rtol=1e-13, atol=1e-300):
            break
        point = following
    return point


def krum_order(rows, f):
    n = len(rows)
    keys = []
    for i in range(n):
        others = sorted(((rows[i] - rows[j]) ** 2).sum() for j in range(n) if j != i)
        keys.append((sum(others[: min(n - 1, max(1, n - f - 2))]), sum(others), i))
    return [i for _, _, i in sorted(keys)]


def bulyan(rows, f):
    left, chosen = list(range(len(rows))), []
    while len(chosen) < len(rows) - 2 * f:
        best = left[krum_order(rows[left], f)[0]]
        chosen.append(best)
        left.remove(best)
    columns = rows[chosen].T
    return np.array([nearest_to_median(column, len(chosen) - 2 * f) for column in columns])


def nearest_to_median(column, count):
    middle = np.median(column)
    return np.mean(sorted(sorted(column), key=lambda value: abs(value - middle))[:count])


def clipping(rows):
    point = np.median(rows, axis=0)
    radius = sorted(np.linalg.norm(row - point) for row in rows)[(len(rows) - 1) // 2]
    for _ in range(5):
        steps = [(row - point) * min(1.0, radius / max(np.linalg.norm(row - point), 1e-300)) for row in rows]
        point = point + sum(steps) / len(rows)
    return point


def stated_bound(method, honest, n, f):
    """Largest distance from the honest mean that the docstring of `aggregate` allows."""
    diameter = max(np.linalg.norm(a - b) for a in honest for b in honest)
    widths = honest.max(axis=0) - honest.min(axis=0)
    box = np.linalg.norm(widths)
    if method in ("krum", "multi-krum"):
        return diameter * (1 + np.sqrt((n - f - 2) / (n - 2 * f - 1)))
    if method == "geometric-median":
        return diameter * (1 - f / n) / np.sqrt(1 - 2 * f / n)
    return {"median": 1, "trimmed-mean": 1, "bulyan": 2, "centered-clipping": 6}[method] * box
