"""Privacy loss distributions of the Poisson-sampled Gaussian mechanism, rounded up and composed by FFT."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import fft
from scipy.optimize import minimize_scalar
from scipy.signal import lfilter
from scipy.special import ndtr, ndtri

Array = npt.NDArray[np.float64]
Direction = Literal["remove", "add", "replace", "exchange"]
Sampler = Literal["poisson", "fixed_size"]
LARGEST_GRID = 1 << 21
_TAIL_SHARE = 2.5e-4  # share of delta that pays for each truncation
_ROUNDING = 2.0**-50  # of one transform, for each composition
_ROUNDING_SHARE = 0.05  # share of delta that the rounding may cost before the result is not worth having


class Mechanism(NamedTuple):
    """`steps` runs: each row joins with probability `sample_rate`; the noise is `noise_multiplier` times its bound.

    "poisson": rows join independently; "fixed_size": the batch is a uniformly random subset of one size.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    sampler: Sampler = "poisson"


class Masses(NamedTuple):
    """Probabilities of the privacy losses (first + i) * spacing, and of an infinite loss."""

    first: int
    values: Array
    infinite: float


def composed_epsilon(mechanisms: Sequence[Mechanism], direction: Direction, delta: float) -> float | None:
    """An upper bound of epsilon at `delta` for the whole sequence, in one direction of the neighbouring relation.

    "replace" takes steps of both samplers. Every rounding is upwards: losses move to grid points by connect-the-dots,
    which dominates the true pair; truncated mass counts as an infinite loss. None where the grid would be too large or
    delta too small for the arithmetic.

    Source: Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022 (connect-the-dots); Koskela, Jälkö, Honkela 2020 (FFT).
    """
    views = [_view(mechanism, direction) for mechanism in mechanisms]
    steps = sum(mechanism.steps for mechanism in mechanisms)
    spacing = _spacing(views)
    tail = delta * _TAIL_SHARE
    if any(_points(*view, tail / steps, spacing) > LARGEST_GRID for view in views):
        return None
    single = [_discretise(*view, tail / steps, spacing) for view in views]
    repeats = [mechanism.steps for mechanism in mechanisms]
    low, high = _window(single, repeats, spacing, tail)
    size = fft.next_fast_len(high - low + 1, real=True)
    rounding = _ROUNDING * steps * math.log2(size + 2)
    if size > LARGEST_GRID or rounding > delta * _ROUNDING_SHARE:
        return None
    values = _convolve(single, repeats, low, size)
    infinite = -math.expm1(sum(n * math.log1p(-masses.infinite) for n, masses in zip(repeats, single, strict=True)))
    return _invert(values, low, spacing, infinite + 2 * tail + rounding, delta)


def _view(mechanism: Mechanism, direction: Direction) -> tuple[Mechanism, Direction]:
    """A mechanism and its direction, as the functions below take them.

    A row of a fixed-size batch is exchanged within it: the sum moves by twice the bound, or not at all. The privacy
    curve is that of the mixture against the sum without the row where the loss is positive, and its mirror image below
    zero (Zhu, Dong, Wang 2022, theorem 11, sampling without replacement).
    """
    if mechanism.sampler == "poisson":
        return mechanism, direction
    return mechanism._replace(noise_multiplier=mechanism.noise_multiplier / 2), "exchange"


def _thresholds(mechanism: Mechanism, direction: Direction, losses: Array) -> Array:
    """The x at which the privacy loss, a growing function of x, reaches each of `losses`."""
    sigma, q = mechanism.noise_multiplier, mechanism.sample_rate
    if direction == "replace":
        odds = (1 - q) / q * math.exp(0.5 / sigma**2)
        return sigma**2 * (losses / 2 + np.arcsinh(odds * np.sinh(losses / 2)))
    sign = 1.0 if direction == "remove" else -1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = np.log((np.exp(sign * losses) - (1 - q)) / q)
    x = sign * (sigma**2 * inner + 0.5)
    return np.where(np.exp(sign * losses) > 1 - q, x, -sign * np.inf)


def _loss(mechanism: Mechanism, direction: Direction, x: float) -> float:
    """The privacy loss at x."""
    sigma, q = mechanism.noise_multiplier, mechanism.sample_rate

    def against_nothing(shift: float) -> float:
        stay = math.log1p(-q) if q < 1 else -math.inf
        return float(np.logaddexp(stay, math.log(q) + shift * (2 * x - shift) / (2 * sigma**2)))

    if direction == "replace":
        return against_nothing(1.0) - against_nothing(-1.0)
    return against_nothing(1.0) if direction == "remove" else -against_nothing(-1.0)


def _pair(mechanism: Mechanism, direction: Direction) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """The dominating pair as two Gaussian mixtures: (weight, mean) each, in units of the clipping bound."""
    q = mechanism.sample_rate
    nothing, mixed = [(1.0, 0.0)], [(1 - q, 0.0), (q, 1.0)]
    mirrored = [(1 - q, 0.0), (q, -1.0)]
    if direction == "remove":
        return mixed, nothing
    return (nothing, mirrored) if direction == "add" else (mixed, mirrored)


def _range(mechanism: Mechanism, direction: Direction, tail: float) -> tuple[float, float]:
    """Losses outside of which less than about `tail` of the probability lies, on either side."""
    if direction == "exchange":
        high = _range(mechanism, "remove", tail)[1]
        return -high, high
    reach = -float(ndtri(tail)) * mechanism.noise_multiplier + 1
    return _loss(mechanism, direction, -reach), _loss(mechanism, direction, reach)


def _points(mechanism: Mechanism, direction: Direction, tail: float, spacing: float) -> float:
    low, high = _range(mechanism, direction, tail)
    return (high - low) / spacing + 3


def _spacing(views: Sequence[tuple[Mechanism, Direction]]) -> float:
    """A grid so fine that rounding up adds about one thousandth to epsilon."""
    steps = sum(mechanism.steps for mechanism, _ in views)
    variance = sum(mechanism.steps * _loss_variance(mechanism, direction) for mechanism, direction in views)
    return float(np.clip(math.sqrt(1e-3 * math.sqrt(variance) / steps), 1e-7, 0.01))


def _loss_variance(mechanism: Mechanism, direction: Direction) -> float:
    if direction == "exchange":
        return _loss_variance(mechanism, "remove")
    x = mechanism.noise_multiplier * np.linspace(-6, 6, 241)
    weights = np.exp(-(np.linspace(-6, 6, 241) ** 2) / 2)
    losses = np.array([_loss(mechanism, direction, float(value)) for value in x])
    mean = np.average(losses, weights=weights)
    return max(float(np.average((losses - mean) ** 2, weights=weights)), 1e-18)


def _interval_masses(mixture: list[tuple[float, float]], sigma: float, x: Array) -> Array:
    """Probability between consecutive thresholds, from whichever tail keeps its digits."""
    total = np.zeros(len(x) - 1)
    for weight, mean in mixture:
        z = (x - mean) / sigma
        upper = z[:-1] > 0
        total += weight * np.where(upper, ndtr(-z[:-1]) - ndtr(-z[1:]), ndtr(z[1:]) - ndtr(z[:-1]))
    return total


def _discretise(mechanism: Mechanism, direction: Direction, tail: float, spacing: float) -> Masses:
    """Each interval's mass goes to its two ends so that every hockey-stick divergence at a grid point is exact."""
    if direction == "exchange":
        return _mirrored(_discretise(mechanism, "remove", tail, spacing), spacing)
    low, high = _range(mechanism, direction, tail)
    first, last = math.floor(low / spacing), math.ceil(high / spacing)
    losses: Array = spacing * np.arange(first, last + 1, dtype=np.float64)
    x = _thresholds(mechanism, direction, losses)
    upper_pair, lower_pair = _pair(mechanism, direction)
    sigma = mechanism.noise_multiplier
    p = _interval_masses(upper_pair, sigma, x)
    q = _interval_masses(lower_pair, sigma, x)
    up = np.clip((p - np.exp(losses[:-1]) * q) / -math.expm1(-spacing), 0, p)
    values = np.zeros(len(losses))
    values[1:] += up
    values[:-1] += p - up
    values[0] += sum(weight * float(ndtr((x[0] - mean) / sigma)) for weight, mean in upper_pair)
    infinite = sum(weight * float(ndtr((mean - x[-1]) / sigma)) for weight, mean in upper_pair)
    return Masses(first, values, infinite)


def _mirrored(masses: Masses, spacing: float) -> Masses:
    """The positive losses of a pair, their mirror image below zero, and the rest at zero.

    A loss of -l has exp(-l) times the mass of l: the curve is then the same whichever of the two rows is there.
    """
    positive = masses.values[max(0, 1 - masses.first) :]
    below = positive * np.exp(-spacing * np.arange(1, len(positive) + 1))
    rest = max(0.0, 1.0 - float(positive.sum()) - float(below.sum()) - masses.infinite)
    return Masses(-len(positive), np.concatenate([below[::-1], [rest], positive]), masses.infinite)


def _window(single: Sequence[Masses], repeats: Sequence[int], spacing: float, tail: float) -> tuple[int, int]:
    """Grid positions of the composed loss beyond which at most `tail` lies, on either side."""
    firsts, lasts = zip(*((m.first, m.first + len(m.values) - 1) for m in single), strict=True)
    low, high = (sum(n * end for n, end in zip(repeats, ends, strict=True)) for ends in (firsts, lasts))
    above = _chernoff(single, repeats, spacing, tail, 1.0)
    below = -_chernoff(single, repeats, spacing, tail, -1.0)
    return max(low, math.floor(below / spacing)), min(high, math.ceil(above / spacing))


def _chernoff(single: Sequence[Masses], repeats: Sequence[int], spacing: float, tail: float, sign: float) -> float:
    """A value that sign * (composed loss) exceeds with probability at most `tail`; every rate gives a valid one."""

    def bound(log_rate: float) -> float:
        rate = math.exp(log_rate)
        growth = sum(n * _log_moment(masses, sign * rate, spacing) for n, masses in zip(repeats, single, strict=True))
        return float((growth - math.log(tail)) / rate)

    return float(minimize_scalar(bound, bounds=(-7.0, 9.0), method="bounded", options={"xatol": 0.05}).fun)


def _log_moment(masses: Masses, rate: float, spacing: float) -> float:
    exponents = rate * spacing * (masses.first + np.arange(len(masses.values)))
    top = float(exponents.max())
    return top + math.log(float(masses.values @ np.exp(exponents - top)))


def _convolve(single: Sequence[Masses], repeats: Sequence[int], low: int, size: int) -> Array:
    """Masses of the sum of all losses on the window; what lies outside wraps around, at most the two tails."""
    product = np.ones(size // 2 + 1, dtype=np.complex128)
    for steps, masses in zip(repeats, single, strict=True):
        wrapped = np.zeros(size)
        positions = (np.arange(len(masses.values)) + masses.first) % size
        np.add.at(wrapped, positions, masses.values)
        product *= fft.rfft(wrapped) ** steps
    composed: Array = fft.irfft(product, n=size)
    return np.maximum(np.roll(composed, -(low % size)), 0.0)


def _invert(values: Array, low: int, spacing: float, infinite: float, delta: float) -> float:
    """The smallest epsilon >= 0 with a hockey-stick divergence of at most delta; values[0] lies at low * spacing."""
    if infinite >= delta:
        return math.inf
    start = max(low - 1, 0)
    beyond = values[start + 1 - low :][::-1]
    decay = math.exp(-spacing)
    above = np.append(0.0, np.cumsum(beyond))[::-1]
    discounted = np.append(0.0, lfilter([decay], [1.0, -decay], beyond))[::-1]
    divergence = above + infinite - discounted
    reached = int(np.argmax(divergence <= delta))
    if reached == 0:
        return spacing * start
    last = reached - 1
    inside = math.log((above[last] + infinite - delta) / discounted[last])
    return spacing * (start + last) + float(np.clip(inside, 0.0, spacing))
