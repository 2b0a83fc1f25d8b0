"""Texts with known classes: each class speaks of its own things, in words that all classes share."""

import numpy as np
import torch
from torch import Tensor

_SHARED = [f"common{i}" for i in range(150)]


def corpus(n: int, classes: int = 2, length: int = 20, seed: int = 0) -> tuple[list[str], Tensor]:
    """n texts and labels: a third of the words of a text are of its class, the others of all; Zipf within each."""
    stream, labels = np.random.default_rng(seed), torch.arange(n) % classes
    own = [[f"topic{label}word{i}" for i in range(60)] for label in range(classes)]
    texts = []
    for label in labels.tolist():
        words = [
            (own[label] if stream.random() < 1 / 3 else _SHARED)[int(stream.zipf(1.4)) % 60] for _ in range(length)
        ]
        texts.append(" ".join(words))
    return texts, labels
