"""Expectation over transformation: a randomised model as the mean of its passes, so that attacks see what stays."""

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aidefend._core.checks import check_callable, check_int, check_number, check_tensor, refuse
from aidefend._core.modules import Model, preserve
from aidefend._core.random import derive_seed, make_generator
from aidefend.attacks.evasion.losses import IsSuccess, misclassified
from aidefend.attacks.evasion.result import AttackResult


class EOT(nn.Module):
    """A randomised model with the mean of its outputs over several passes; differentiable where the model is.

    Guarantee: the torch, numpy and random streams of the user are as before after every call; each pass has numbers of
        its own, keyed by the generator and the number of the call, so that an attack cannot fit to one draw. A model
        that draws from a generator of its own is averaged too, but not keyed.
    Args:
        model: Callable on x whose outputs are random, in the mode in which it is given.
        samples: Passes a call, >= 1.
        generator: Read once, for the key; None = a fresh one.
    Cost: `samples` forward passes, and as many backward passes where a gradient is asked for. `AttackResult` counts
        calls of this module: multiply by `samples`.
    Source: Athalye et al. 2018 (ICML, "Obfuscated gradients"), section 4.2; the logits are averaged.
    Example:
        >>> noisy = EOT(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)), samples=64)
        >>> noisy(torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(self, model: Model, samples: int = 16, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.model = check_callable(model, "model", "Pass a module or a function of x")
        self.samples = check_int(samples, "samples")
        stream = make_generator(generator)
        self._key = int(torch.randint(2**62, (), generator=stream, device=stream.device))
        self._calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """The mean of the outputs, (N, K)."""
        total: Any = None
        for outputs in self._passes(x, self.samples):
            total = outputs if total is None else total + outputs
        mean: Tensor = total / self.samples
        return mean

    def confirm(
        self,
        result: AttackResult,
        y: Tensor,
        *,
        passes: int = 100,
        share: float = 0.5,
        is_success: IsSuccess | None = None,
    ) -> AttackResult:
        """The result with the successes only that repeat: in more than `share` of fresh passes at x_adv.

        Args:
            result: What an attack on this module found.
            y: (N,) what the attack was given.
            passes: Fresh passes through the model, >= 1.
            share: In [0, 1).
            is_success: (outputs, y) -> (N,) bool for one pass; None = misclassified.
        Cost: `passes` forward passes, not counted in the result, whose forwards count calls of this module.
        """
        check_int(passes, "passes")
        check_number(share, "share", 0.0, 1.0, open_high=True)
        if not isinstance(result, AttackResult):
            raise refuse("an AttackResult", "result", result, "Pass attack.run(...)")
        check_tensor(y, "y", rows=len(result.x_adv))
        judge = is_success or misclassified
        wrong = torch.zeros(len(y), dtype=torch.int64, device=result.x_adv.device)
        with torch.no_grad(), preserve(self):
            for outputs in self._passes(result.x_adv, passes):
                wrong += judge(outputs, y)
        return dataclasses.replace(result, success=result.success & (wrong > share * passes))

    def _passes(self, x: Tensor, count: int) -> Iterator[Tensor]:
        self._calls += 1
        for number in range(count):
            with _streams_from(derive_seed(self._key, self._calls, number), x.device):
                outputs = self.model(x)
            yield outputs


@contextmanager
def _streams_from(seed: int, device: torch.device) -> Iterator[None]:
    """The global streams, which the model draws from, start at `seed` inside and are as before outside."""
    kept, numpy_kept, python_kept = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    cuda_kept = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        np.random.set_state(np.random.RandomState(seed % 2**32).get_state())  # noqa: NPY002
        random.setstate(random.Random(seed).getstate())  # noqa: S311
        if cuda_kept is not None:
            torch.cuda.set_rng_state(torch.Generator(device).manual_seed(seed).get_state(), device)
        yield
    finally:
        torch.set_rng_state(kept)
        np.random.set_state(numpy_kept)  # noqa: NPY002
        random.setstate(python_kept)
        if cuda_kept is not None:
            torch.cuda.set_rng_state(cuda_kept, device)
