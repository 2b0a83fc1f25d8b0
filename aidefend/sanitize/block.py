"""The block: a slice of rows as every detector takes it, and the checks at that door."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aidefend._core.checks import check_items, check_labels, check_same_rows, check_tensor, refuse

LARGEST_CLASS = 32_767  # a class for each number up to the largest label has its place in memory


class Rows(NamedTuple):
    """A checked block: ids, features (N, d) float64, labels (N,) int64, and which rows hold finite features only."""

    ids: tuple[str, ...]
    features: Tensor
    labels: Tensor
    usable: Tensor

    def finite(self) -> tuple[list[str], Tensor, Tensor]:
        """Ids, features and labels of the usable rows."""
        ids = [row_id for row_id, usable in zip(self.ids, self.usable.tolist(), strict=True) if usable]
        return ids, self.features[self.usable], self.labels[self.usable]


def read_block(block: Mapping[str, Any], dimensions: int | None = None, key: str = "features") -> Rows:
    """Check a block {"ids": (N,), "features": (N, d), "labels": (N,), ...}; rows with NaN or infinity are marked.

    Args:
        block: The slice, ids being texts or whole numbers; other keys ("logits", "losses", "x", "view") are left to the
            detectors that use them.
        dimensions: Number of features seen before; None: any.
        key: Where the features are; "features" is taken where the block has no such key.
    Raises: ConfigurationError: a key is missing, lengths differ, another number of features.
    """
    needed: Any = block
    if not isinstance(needed, Mapping) or not {"ids", "features", "labels"} <= set(needed):
        found = sorted(map(str, needed)) if isinstance(needed, Mapping) else type(needed).__name__
        raise refuse("a block with the keys ids, features, labels", "block", found, "Pass a dict with these keys")
    source = key if key in block else "features"
    features = check_tensor(block[source], source, ndim=2, floating=True, finite=False).detach().cpu().double()
    labels = check_labels(block["labels"], len(features), name="labels").cpu()
    ids = _names(block["ids"])
    check_same_rows(("ids", "features"), len(ids), len(features))
    if dimensions is not None and features.shape[1] != dimensions:
        cure = "Pass blocks from one feature extractor"
        raise refuse(f"{dimensions} features, as in earlier blocks", source, features, cure)
    return Rows(ids, features, labels, _finite(features))


def _names(given: Any) -> tuple[str, ...]:
    """Ids as texts; whole numbers, such as those of rows, by their digits."""
    if isinstance(given, Tensor):
        given = check_tensor(given, "ids", ndim=1, finite=False).detach().cpu()
    listed = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
    numbers = isinstance(listed, list | tuple) and len(listed) > 0 and not isinstance(listed[0], str)
    cure = "Pass the content ids of the rows, or their numbers"
    return tuple(map(str, check_items(listed, int, "ids", cure))) if numbers else check_items(listed, str, "ids", cure)


def _finite(features: Tensor) -> Tensor:
    """(N,) bool: a sum that is finite has finite terms; where it is not, rows and then numbers are looked at."""
    if math.isfinite(float(features.sum())):
        return torch.ones(len(features), dtype=torch.bool)
    usable = torch.isfinite(features.sum(dim=1))
    odd = (~usable).nonzero().flatten()
    usable[odd] = torch.isfinite(features[odd]).all(dim=1)
    return usable


def score_by_class(rows: Rows, judges: Mapping[int, Callable[[Tensor], Tensor]]) -> Tensor:
    """(N,) float64: the usable rows of each class by the judge of the class; NaN where there is none."""
    scores = torch.full((len(rows.ids),), torch.nan, dtype=torch.float64)
    for label, judge in judges.items():
        mine = (rows.labels == label) & rows.usable
        if bool(mine.any()):
            scores[mine] = judge(rows.features[mine])
    return scores


def check_kin(detector: object, other: Any, settings: tuple[str, ...]) -> None:
    """Only detectors of one kind with equal settings merge."""
    kind = type(detector)
    mine = {name: getattr(detector, name) for name in settings}
    if type(other) is not kind or {name: getattr(other, name) for name in settings} != mine:
        found = type(other).__name__
        raise refuse(f"a {kind.__name__} with {mine}", "other", found, "Merge detectors of one kind and setting")
