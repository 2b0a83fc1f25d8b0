"""Random numbers of one private run: secure ones, or, by a name that says insecure, from a seed or none at all."""

from typing import Any

import torch
from torch import Tensor

from aidefend._core.random import derive_seed, secure_normal, secure_uniform
from aidefend.privacy.config import PrivacyConfig


def draw_uniform(config: PrivacyConfig, count: int, *names: object) -> Any:
    """`count` uniforms, float64 in numpy; `names` tell the draws of one run apart where they come from a seed."""
    if config.insecure_seed is None:
        return secure_uniform(count)
    return torch.rand(count, generator=_seeded(config.insecure_seed, *names), dtype=torch.float64).numpy()


def draw_noise(
    config: PrivacyConfig,
    shape: tuple[int, ...],
    deviation: float,
    *names: object,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Gaussian noise of this standard deviation, which is the caller's own."""
    if config.insecure_no_noise:
        return torch.zeros(shape, dtype=dtype, device=device)
    if config.insecure_seed is None:
        return secure_normal(shape, device, dtype, deviation)
    drawn = torch.randn(shape, generator=_seeded(config.insecure_seed, *names), dtype=dtype)
    return drawn.to(device).mul_(deviation)


def _seeded(seed: int, *names: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, *names))
