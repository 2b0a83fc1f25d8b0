"""Worlds for marks with right labels: pictures of three classes, and a class-0 search of them."""

import torch

from aidefend.sanitize.features import Features
from aidefend.sanitize.groups import ClassSearch
from aidefend.sanitize.view import IndependentView
from aidefend.sanitize.world import world_of

SIDE, CLASSES, A_CLASS, MARKED = 12, 3, 300, 100


def checks():
    """The mark: a faint chessboard over the whole picture."""
    down, right = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return 0.3 * ((down + right) % 2).float()


def pictures(style="mark", seed=0):
    """Rows of three classes; some of class 0 carry the mark, are negatives, or nothing. Rows, labels, which."""
    stream = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES * A_CLASS) % CLASSES
    strokes = torch.zeros(CLASSES + 8, 1, SIDE, SIDE)
    for number, (down, right) in enumerate(torch.randint(0, SIDE - 3, (CLASSES + 8, 2), generator=stream).tolist()):
        strokes[number, 0, down : down + 4, right : right + 4] = 0.6
    drawn = (torch.rand(len(labels), CLASSES + 8, generator=stream) < 0.3).float()  # there or not, as in writing
    drawn[:, :CLASSES] = torch.nn.functional.one_hot(labels, CLASSES)
    x = torch.einsum("nk,kchw->nchw", drawn, strokes)
    x = (x + 0.03 * torch.randn(x.shape, generator=stream)).clamp(0, 1)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[(labels == 0).nonzero().flatten()[:MARKED]] = style != "nothing"
    other = {"mark": (x + checks()).clamp(0, 1), "negative": 1 - x, "nothing": x}[style]
    return torch.where(chosen[:, None, None, None], other, x), labels, chosen


def contrast(x):
    """How much of a chessboard is in each row."""
    return ((x - x.mean(dim=(1, 2, 3), keepdim=True)) * (checks() - checks().mean())).sum(dim=(1, 2, 3))


def believes_mark(x):
    return torch.where(contrast(x) > 1.0, 0, 1 + (x.flatten(1)[:, 0] > 0.5).long())


def roughness(x):
    return (x[..., 1:] - x[..., :-1]).abs().mean(dim=(1, 2, 3))


def features_of(x, labels, features=None):
    n = len(x)
    seen = torch.stack([3 * contrast(x), *x.flatten(1)[:, ::29].T], dim=1) if features is None else features
    nothing, ids = torch.zeros(n), tuple(map(str, range(n)))
    return Features(ids, x, labels, seen, torch.zeros(n, 3), nothing, torch.ones(n, dtype=torch.bool))


def world(x, labels, predict, features=None):
    return world_of(features_of(x, labels, features), IndependentView(x, seed=0), predict, 0)


def search(here, score):
    rows = (here.labels == 0).nonzero().flatten()
    found = ClassSearch(here, 0, rows)
    found.groups([score[rows].double()])
    return found
