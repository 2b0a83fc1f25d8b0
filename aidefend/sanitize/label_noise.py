"""How wrong labels came about: from predictions for rows that the model never saw, and the labels they were given.

In numpy: the arrays are small and many, and threads cost more there than they save.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.floating[Any]]  # float64 all of them
Places = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_SHRINKAGE = 1.0  # of each counted confusion towards the mean of all: cells of a few rows say little
_LARGEST = 0.9  # of a confusion, over the share of right labels of its class
_FLOOR = 1e-3  # least chance of a class, where the inverse of the confusion gives less
_DOUBLES = 4  # so many steps to an exponent twice as large, whose powers are squares
_EXPONENTS = tuple(2 ** (step / _DOUBLES) for step in range(-4, 18))  # among which the likeliest is looked for
_AGREEING = 2048  # rows, over all classes, whose label is what was predicted: they are many and much alike
_COLUMNS = 32  # up to so many, the largest of a row is found faster column by column
_PART = 4096  # rows at a time: what a step makes is then still in the cache for the next one


class LabelNoise(NamedTuple):
    """A row's true class follows from its prediction, the label that it was given from its true class.

    The chance of a true class is in proportion to (q / usual) ** exponent, where q is what the prediction says of the
    true classes: the prediction itself or, where this explains the labels better, times the inverse of the confusion,
    as for a model that predicts the labels as they are given, with their errors.

    Args:
        classes: (S,) int64 ascending, those that were given as labels. No other one is taken for a true class.
        inverse: (S, S) float64, q = prediction @ inverse; of the confusion, or the identity.
        usual: (S,) float64, logarithm of the mean of q over the rows labelled so.
        exponent: Above 1 where a prediction is less sure than it may be, below 1 where it is too sure.
        confusion: (true class, given label) float64; each row sums to one.
        error_share: Expected share of wrong labels, in [0, 1].
        threshold: The score above which a label is called wrong, where it is not the prediction itself.
    """

    classes: Places
    inverse: Floats
    usual: Floats
    exponent: float
    confusion: Floats
    error_share: float = 0.0
    threshold: float = 1.0

    def scores(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(N,) probability that a label is wrong, NaN for a label that was never given; logits (N, K), labels (N,)."""
        found = np.empty(len(labels))
        for part, given, place in _parts(logits, labels):
            own = self._places(given)
            weights = self._weights(part, own)
            with np.errstate(invalid="ignore"):  # no class is possible: 0 / 0
                found[place] = np.where(own >= 0, 1 - _own(weights, own) / weights.sum(axis=0), np.nan)
        return torch.from_numpy(found)

    def likely(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(N,) int64: the most likely true class; of a label that was never given any."""
        found = np.empty(len(labels), dtype=np.int64)
        for part, given, place in _parts(logits, labels):
            found[place] = self.classes[self._weights(part, self._places(given)).argmax(axis=0)]
        return torch.from_numpy(found)

    def _places(self, labels: Places) -> Places:
        """(N,) places in `classes`, -1 for a label that was never given."""
        found = np.searchsorted(self.classes, labels).clip(max=len(self.classes) - 1)
        return np.where(self.classes[found] == labels, found, -1)

    def _weights(self, logits: Floats, places: Places) -> Floats:
        """(S, N), in proportion to the probability of each true class, given the prediction and the label."""
        chances = _among(_softmax(logits.T.copy()), self.classes)
        true = _sharpened(_relative(_unmixed(chances, self.inverse), self.usual), self.exponent)
        true *= _given(self.confusion, places)
        return true


def contests(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool: another label than the given one is predicted; logits (N, K) float64, labels (N,)."""
    return torch.from_numpy(_contests(logits.numpy(), labels.numpy()))


def _contests(logits: Floats, labels: Places) -> Flags:
    own: Floats = logits[np.arange(len(labels)), labels]
    return own < _highest(logits)


def _highest(logits: Floats) -> Floats:
    if logits.shape[1] > _COLUMNS:
        return np.asarray(logits.max(axis=1))
    highest = np.empty(len(logits))
    for start in range(0, len(logits), _PART):
        part, largest = logits[start : start + _PART], highest[start : start + _PART]
        largest[:] = part[:, 0]
        for column in range(1, part.shape[1]):
            np.maximum(largest, part[:, column], out=largest)
    return highest


def _parts(logits: Tensor, labels: Tensor) -> Iterator[tuple[Floats, Places, slice]]:
    """Some rows at a time, with their place."""
    for start in range(0, len(labels), _PART):
        place = slice(start, start + _PART)
        yield logits[place].numpy(), labels[place].numpy(), place


class _Sample(NamedTuple):
    """Rows of S classes (S,) that were given as labels, numbered from 0.

    Columns (S, n), labels (n,), how many rows each stands for (n,), whether another label is predicted (n,); `rows`
    (S,): how many rows all those of a label stand for.
    """

    classes: Places
    columns: Floats
    labels: Places
    standing: Floats
    contested: Flags
    rows: Floats


class _Fit(NamedTuple):
    """A model, the sample with logarithms of q / usual in place of predictions, and the likelihood of its labels."""

    noise: LabelNoise
    relative: _Sample
    likelihood: float = 0.0


def estimate(logits: Mapping[int, Tensor], counts: Mapping[int, float]) -> LabelNoise:
    """The model of the labels, from a sample of each.

    Args:
        logits: For each label that was given: finite logits (n, K) float64, n >= 1.
        counts: For each label, how many rows its sample stands for.

    The confusion is first counted, among rows that are predicted with more than the usual confidence of a class. Then
    the exponent becomes the one that makes the given labels likeliest, the confusion what is expected under it, and
    the exponent the likeliest again. The threshold is the one beyond which the expected F1 is highest. All rows count
    whose label is not what was predicted; of the others, the first of each label stand for the rest.
    Cost: about 30 passes over these rows.
    """
    sample = _sampled(logits, counts)
    counted = _counted(sample)
    plain = _sharper(_based(sample, np.eye(len(counted)), counted, 1.0), (4, 2, 1))
    unmixed = _sharper(_based(sample, np.linalg.pinv(counted), counted, 1.0), (4, 2, 1))
    better = max(plain, unmixed, key=lambda fit: fit.likelihood)
    confusion = _expected(better.relative, better.noise)
    inverse = better.noise.inverse if better is plain else np.linalg.pinv(confusion)
    return _decided(_sharper(_based(sample, inverse, confusion, better.noise.exponent), (1,)))


def _sampled(logits: Mapping[int, Tensor], counts: Mapping[int, float]) -> _Sample:
    rows, sizes = np.concatenate([part.numpy() for part in logits.values()]), np.array([*map(len, logits.values())])
    places = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.array(list(logits))[places]
    contested = _contests(rows, labels)
    agreeing = np.bincount(places[~contested], minlength=len(sizes))
    numbers = np.cumsum(~contested) - (np.cumsum(agreeing) - agreeing)[places]  # from 1, in each label
    most = max(1, _AGREEING // len(sizes))
    kept = np.flatnonzero(contested | (numbers <= most))
    places, contested = places[kept], contested[kept]
    each = np.array([counts[label] for label in logits]) / sizes
    standing = np.where(contested, each[places], (each * (agreeing / most).clip(min=1))[places])
    classes = np.sort(np.array(list(logits)))
    labels, columns = np.searchsorted(classes, labels[kept]), _among(_softmax(rows[kept].T.copy()), classes)
    masses = np.bincount(labels, standing, len(columns)).astype(np.float64)
    return _Sample(classes, columns, labels, standing, contested, masses)


def _based(sample: _Sample, inverse: Floats, confusion: Floats, exponent: float) -> _Fit:
    true = _unmixed(sample.columns, inverse)
    usual = np.log(_usual(sample, true))
    return _Fit(
        LabelNoise(sample.classes, inverse, usual, exponent, confusion), sample._replace(columns=_relative(true, usual))
    )


def _usual(sample: _Sample, columns: Floats) -> Floats:
    """(S,) mean of each class's column over the rows with its label."""
    sums = np.bincount(sample.labels, _own(columns, sample.labels) * sample.standing, len(columns))
    return sums / sample.rows


def _among(columns: Floats, classes: Places) -> Floats:
    """(S, n) of the columns (K, n), those of the classes."""
    return columns if len(classes) == len(columns) else columns[classes]


def _own(columns: Floats, labels: Places) -> Floats:
    """(n,) of the columns (S, n), the entry of each row's label."""
    found: Floats = columns[labels, np.arange(len(labels))]
    return found


def _given(confusion: Floats, labels: Places) -> Floats:
    """(S, n) of the confusion, the column of each row's label."""
    return confusion.take(labels, axis=1)


def _softmax(columns: Floats) -> Floats:
    """(K, n), written into `columns`."""
    columns -= columns.max(axis=0)
    np.exp(columns, out=columns)
    columns /= columns.sum(axis=0)
    return columns


def _unmixed(chances: Floats, inverse: Floats) -> Floats:
    true: Floats = (inverse.T @ chances).clip(min=_FLOOR)
    return true


def _relative(true: Floats, usual: Floats) -> Floats:
    """(S, n) logarithms, less the usual ones and so that the largest of each row is 0; written into `true`."""
    np.log(true, out=true)
    true -= usual[:, None]
    true -= true.max(axis=0)
    return true


def _sharpened(relative: Floats, exponent: float) -> Floats:
    true = relative * exponent
    np.exp(true, out=true)
    return true


def _counted(sample: _Sample) -> Floats:
    """P(given | true) among confident rows, as many for each given label as there are rows with it."""
    size = len(sample.columns)
    usual = _usual(sample, sample.columns)
    sure = np.where(sample.columns >= usual[:, None], sample.columns, -1.0)
    guesses, highest = sure.argmax(axis=0), sure.max(axis=0)
    joint = np.bincount(sample.labels * size + guesses, sample.standing * (highest >= 0), minlength=size * size)
    joint = joint.reshape(size, size)  # (given, true)
    joint[np.diag_indices(size)] += joint.sum(axis=1) == 0
    joint *= (sample.rows / joint.sum(axis=1).clip(min=1e-300))[:, None]
    return _confusion(joint / joint.sum())


def _confusion(joint: Floats) -> Floats:
    """P(given | true) from the joint of (given, true)."""
    right = np.diag(joint.diagonal())
    wrong = joint - right
    mean = wrong.sum() / max(1, len(joint) * (len(joint) - 1))
    wrong = (wrong + _SHRINKAGE * mean) / (1 + _SHRINKAGE)
    np.fill_diagonal(wrong, 0.0)
    return _mostly_right((wrong + right).T)


def _mostly_right(masses: Floats) -> Floats:
    """Masses (true, given) as shares of each true class, the errors at most `_LARGEST` of the right labels.

    With scale t and errors e: t max(e) <= _LARGEST (1 - t sum(e)). A confusion beyond that is singular near by, and its
    inverse would call the right labels wrong. A class without any mass has no errors.
    """
    wrong: Floats = masses / masses.sum(axis=1, keepdims=True).clip(min=1e-300)
    np.fill_diagonal(wrong, 0.0)
    scale = (_LARGEST / (wrong.max(axis=1) + _LARGEST * wrong.sum(axis=1)).clip(min=1e-12)).clip(max=1)
    wrong *= scale[:, None]
    wrong += np.diag(1 - wrong.sum(axis=1))
    return wrong


def _sharper(fit: _Fit, steps: tuple[int, ...]) -> _Fit:
    """With the exponent of the highest likelihood, from the present one by steps up or down."""
    columns, standing = fit.relative.columns, fit.relative.standing
    given = _given(fit.noise.confusion, fit.relative.labels)
    known: dict[int, float] = {}
    last, true = -1, columns

    def likelihood(place: int) -> float:
        nonlocal last, true
        if place not in known:
            true = np.square(true) if last == place - _DOUBLES else _sharpened(columns, _EXPONENTS[place])
            shares = np.einsum("kn,kn->n", true, given) / true.sum(axis=0)
            known[place], last = float(np.log(shares) @ standing), place
        return known[place]

    best = _EXPONENTS.index(fit.noise.exponent)
    for step in steps:
        place = -1
        while best != place:
            place = best
            best = max((max(0, place - step), place, min(len(_EXPONENTS) - 1, place + step)), key=likelihood)
    return _Fit(fit.noise._replace(exponent=_EXPONENTS[best]), fit.relative, known[best])


def _posterior(sample: _Sample, noise: LabelNoise) -> Floats:
    """(S, n) probability of each true class."""
    weights = _sharpened(sample.columns, noise.exponent)
    weights *= _given(noise.confusion, sample.labels)
    weights /= weights.sum(axis=0)
    return weights


def _expected(sample: _Sample, noise: LabelNoise) -> Floats:
    """The confusion that is expected under the present one; one row more for each true class, of all labels alike."""
    weights = _posterior(sample, noise) * sample.standing
    size = len(weights)
    masses = np.stack([np.bincount(sample.labels, row, size) for row in weights])
    return _mostly_right(masses + 1 / size)


def _decided(fit: _Fit) -> LabelNoise:
    """With the share of errors, and the threshold that gives the highest expected F1."""
    sample = fit.relative
    scores = 1 - _own(_posterior(sample, fit.noise), sample.labels)
    errors = float(scores @ sample.standing)
    threshold = _threshold(scores[sample.contested], sample.standing[sample.contested], errors)
    return fit.noise._replace(error_share=errors / float(sample.standing.sum()), threshold=threshold)


def _threshold(scores: Floats, standing: Floats, errors: float) -> float:
    """Halfway between the last score that is in and the first that is not, of the choice with the highest expected F1.

    F1 = 2 right / (chosen + errors); a row with score s adds `standing` to chosen and s times that to right.
    """
    if not len(scores):
        return 1.0
    places = np.argsort(-scores, kind="stable")
    ordered, chosen = scores[places], standing[places].cumsum()
    right = (ordered * standing[places]).cumsum()
    last = int((right / (chosen + errors)).argmax())
    return float((ordered[last] + ordered[last + 1]) / 2) if last + 1 < len(ordered) else -1.0
