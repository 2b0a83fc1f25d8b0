"""Randomness: seeded streams of our own, never the user's global ones, and secure bits of the operating system."""

import contextlib
import hashlib
import math
import secrets
import ssl
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from aidefend._core.checks import check_int, check_kind
from aidefend._core.projection import project_l0

_NOISE_BLOCK = 1 << 17  # numbers at a time: they stay in the processor's cache


def make_generator(generator: torch.Generator | None = None, seed: int | None = None) -> torch.Generator:
    """The caller's generator, or one from `seed`, or a fresh unpredictable one. Always a CPU stream unless given."""
    if generator is not None:
        return check_kind(generator, torch.Generator, "generator", "Pass torch.Generator().manual_seed(0) or None")
    chosen = secrets.randbits(63) if seed is None else check_int(seed, "seed", 0, 2**63 - 1)
    return torch.Generator().manual_seed(chosen)


def derive_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for a named part of the work, independent of the other parts' seeds.

    Example:
        >>> derive_seed(0, "start", 1) == derive_seed(0, "start", 1) != derive_seed(0, "start", 2)
        True
    """
    text = "\x1f".join([str(check_int(seed, "seed", 0)), *(str(name) for name in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextlib.contextmanager
def own_stream(seed: int) -> Iterator[None]:
    """What draws from the global stream (first weights, dropout) draws from this seed; the stream itself is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed % 2**63)
        yield


def row_generator(seed: int, row_id: str) -> np.random.Generator:
    """A stream that belongs to one row: its numbers do not depend on batching, order or workers."""
    return np.random.Generator(np.random.Philox(key=derive_seed(seed, "row", row_id)))


def uniform(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """U[0, 1) with the dtype and device of `like`, drawn on the generator's own device."""
    wide = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    return torch.rand(shape, generator=generator, dtype=wide, device=generator.device).to(like)


def normal(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """N(0, 1) with the dtype and device of `like`, drawn on the generator's own device."""
    wide = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    return torch.randn(shape, generator=generator, dtype=wide, device=generator.device).to(like)


def ball_step(x: Tensor, change: Tensor, order: float, generator: torch.Generator) -> Tensor:
    """Steps in the shape of x, uniform in the unit ball of l1 (order 1) or l2 over the features of `change`."""
    features = change.flatten(1).sum(dim=1).clamp(min=1).reshape(-1, *[1] * (x.ndim - 1))
    direction = torch.where(change, normal(tuple(x.shape), generator, x), 0)
    share = uniform((len(x), *[1] * (x.ndim - 1)), generator, x) ** (1 / features)
    if order == 1:  # exponential sizes with random signs, divided by their sum, are uniform on the surface
        share_below_one = uniform(tuple(x.shape), generator, x).clamp(max=1 - torch.finfo(x.dtype).eps / 2)
        sizes = -torch.log1p(-share_below_one)
        direction = torch.where(change, direction.sign() * sizes, 0)
    length = torch.linalg.vector_norm(direction.flatten(1), ord=order, dim=1).clamp(min=torch.finfo(x.dtype).tiny)
    step: Tensor = direction / length.reshape(share.shape) * share
    return step.to(x)


def few_step(x: Tensor, low: Tensor, high: Tensor, change: Tensor, count: Tensor, generator: torch.Generator) -> Tensor:
    """Steps to uniform values within the bounds (normal ones where these are infinite) in `count` features of a row."""
    step = low + (high - low) * uniform(tuple(x.shape), generator, x) - x
    step = torch.where(step.isfinite(), step, normal(tuple(x.shape), generator, x))
    rank = torch.where(change, 1 + uniform(tuple(x.shape), generator, x), 0)
    return step * project_l0(rank.flatten(1), count).reshape(x.shape)


def secure_bytes(count: int) -> bytes:
    """`count` bytes of a cryptographic stream that the operating system keys. Cannot be seeded or replayed.

    OpenSSL's deterministic generator (AES-256 in counter mode, NIST SP 800-90A): it takes its key from the operating
    system, takes a new one in a forked process, and costs a tenth of a system call's time for each byte.
    """
    return ssl.RAND_bytes(count)


def secure_uniform(count: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """`count` uniforms in (0, 1), float64, 53 bits each, from `secure_bytes`."""
    bits = np.frombuffer(secure_bytes(8 * count), dtype=np.uint64) >> np.uint64(11)
    values: np.ndarray[tuple[int], np.dtype[np.float64]] = (bits.astype(np.float64) + 0.5) * 2.0**-53
    return values


def secure_normal(
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    deviation: float = 1.0,
) -> Tensor:
    """Normal noise of this standard deviation from `secure_bytes`, drawn on the processor.

    At least 96 bits go into each pair of numbers.

    Source: Box, Muller 1958. The radius comes from 63 bits in float64 and so reaches 9.4 standard deviations.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.empty(math.prod(shape), dtype=wide)
    for part in values.split(_NOISE_BLOCK) if len(values) else ():
        _fill_with_normal(part, deviation)
    return values.reshape(shape).to(device=device, dtype=dtype)


def _fill_with_normal(part: Tensor, deviation: float) -> None:
    pairs, width = (len(part) + 1) // 2, part.element_size()
    bits = secure_bytes((8 + width) * pairs)
    halves = (np.frombuffer(bits, dtype=np.uint64, count=pairs) >> np.uint64(1)).view(np.int64)
    turns = np.frombuffer(bits, dtype=np.int64 if width == 8 else np.int32, offset=8 * pairs)
    uniforms = torch.from_numpy(halves).double().add_(0.5).mul_(2.0**-63)
    radius = uniforms.log_().mul_(-2).to(part.dtype).sqrt_().mul_(deviation)
    angle = torch.from_numpy(turns.astype(np.float64 if width == 8 else np.float32)).mul_(
        math.pi / 2 ** (8 * width - 1)
    )
    torch.mul(radius, angle.cos(), out=part[:pairs])
    rest = len(part) - pairs
    torch.mul(radius[:rest], angle[:rest].sin_(), out=part[pairs:])
