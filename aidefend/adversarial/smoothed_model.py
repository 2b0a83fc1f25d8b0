"""Randomised smoothing: a classifier by majority vote under Gaussian noise, with certified l2 radii."""

import math
from collections.abc import Callable

import torch
from scipy import stats as scipy_stats
from torch import Tensor, nn

from aidefend._core.checks import (
    check_callable,
    check_flag,
    check_int,
    check_logits,
    check_number,
    check_probability,
    check_tensor,
    expected,
    refuse,
)
from aidefend._core.errors import IncompatibleModel
from aidefend._core.modules import naming_the_model, preserve, training_layers
from aidefend._core.random import make_generator
from aidefend.adversarial.smoothing_certificate import (
    Ledger,
    Look,
    SmoothingCertificate,
    certified_radius,
    needed_probability,
    plan_looks,
)

_BLOCK = 100  # draws of one call to the generator, whatever batch_size is: results then do not depend on it


class SmoothedModel(nn.Module):
    """The class that a model answers most often when Gaussian noise is added to the input, with a certified radius.

    Guarantee: for each row, with probability >= 1 - alpha over the noise, the smoothed classifier (not the wrapped
        model) answers `prediction` everywhere in the open l2 ball of `radius`. Early looks are fixed in advance and
        their shares of alpha sum to alpha, so by the union bound no bound that could be reported exceeds the true
        probability, except with probability alpha. A row that stops by abstaining claims nothing, so this costs no
        budget (it can cost power: a certifiable row abstains early with probability <= alpha at each early look).
        Rows of a call share their noise: the guarantee is for each row, and errors of rows are not independent. Void
        for other norms, for noise that is not in the units of x, for noise an attacker can predict before choosing x
        (a known seed), and for a model whose answer to a row depends on batch mates or on chance.
    Args:
        model: Callable from (N, ...) to logits (N, K), in eval mode, compiled or not. Any normalisation belongs inside
            it: noise is added to x in its own units and never clamped. Rows of logits with NaN vote for no class.
        sigma: Standard deviation of the noise in units of x, > 0.
        num_classes: K >= 2.
        samples: Draws for each row of a plain call `smoothed(x)`.
        batch_size: Noisy rows in one forward pass; changes speed and memory only.
    Raises: IncompatibleModel: layers in train mode; ConfigurationError: bad arguments or logits of another shape.
    Cost: certify: n0 + n forward rows for each row, less for rows that stop early; one draw of noise serves all rows.
    Source: Cohen, Rosenfeld, Kolter 2019 (certify, predict; here batched over rows and with early looks); Hung,
        Fithian 2019 (the test of `predict`).

    Example:
        >>> smoothed = SmoothedModel(
        ...     lambda x: torch.stack([x[:, 0], -x[:, 0]], dim=1), sigma=0.5, num_classes=2
        ... )
        >>> stream = torch.Generator().manual_seed(0)
        >>> certificate = smoothed.certify(torch.tensor([[1.0], [-1.0]]), n=1000, generator=stream)
        >>> certificate.prediction.tolist(), bool((certificate.radius < 1.0).all())
        ([0, 1], True)
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        sigma: float,
        num_classes: int,
        *,
        samples: int = 1000,
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        self.model = check_callable(model, "model", "Pass a module or a function from x to logits")
        self.sigma = check_number(sigma, "sigma", 0.0, open_low=True)
        self.num_classes = check_int(num_classes, "num_classes", 2)
        self.samples = check_int(samples, "samples")
        self.batch_size = check_int(batch_size, "batch_size")

    def certify(
        self,
        x: Tensor,
        n0: int = 100,
        n: int = 10_000,
        alpha: float = 0.001,
        *,
        generator: torch.Generator | None = None,
        early_stop: bool = True,
        target_radius: float | None = None,
    ) -> SmoothingCertificate:
        """Predict and prove an l2 radius for each row of x (N, ...).

        Args: n0: draws that select the class, used for nothing else; n: draws that estimate its probability; alpha:
            error probability of each row; early_stop: looks at n/100 and n/10 let hopeless rows abstain;
            target_radius: > 0, a row also stops once an early look proves this radius, with a tenth of alpha each.
        """
        looks = self._plan(check_int(n, "n"), check_probability(alpha, "alpha"), early_stop, target_radius)
        check_int(n0, "n0")
        self._check(x)
        needed = None if target_radius is None else needed_probability(target_radius, self.sigma)
        ledger = Ledger(len(x), looks, alpha, needed)
        with preserve(self), torch.no_grad():
            noise = _Noise(x, generator)
            chosen = self._count(x, n0, noise).argmax(dim=1)
            votes, drawn = torch.zeros(len(x), dtype=torch.int64), 0
            for look in looks:
                rows = ledger.active
                if len(rows):
                    counts = self._count(x[rows.to(x.device)], look.samples - drawn, noise)
                    votes[rows] += counts.gather(1, chosen[rows, None]).squeeze(1)
                    ledger.record(look, votes)
                drawn = look.samples
        radius = certified_radius(ledger.p_lower, self.sigma)
        return SmoothingCertificate(
            prediction=torch.where(radius > 0, chosen, -1).to(x.device),
            radius=radius.to(x.device),
            p_lower=ledger.p_lower.to(x.device),
            samples=ledger.samples.to(x.device),
            sigma=self.sigma,
            alpha=alpha,
            n0=n0,
            n=n,
        )

    def predict(
        self, x: Tensor, n: int = 1000, alpha: float = 0.001, generator: torch.Generator | None = None
    ) -> Tensor:
        """(N,) int64: the smoothed class of each row, wrong with probability <= alpha; -1 where two are too close."""
        check_probability(alpha, "alpha")
        if 2 * 0.5 ** check_int(n, "n") > alpha:
            enough = math.ceil(1 - math.log2(alpha))
            raise refuse(f"n >= {enough} (fewer always abstain)", "n", n, f"Pass n={enough} or more, or a larger alpha")
        counts = self._votes(x, n, generator)
        top = counts.topk(2, dim=1)
        first, second = top.values.unbind(dim=1)
        tail = scipy_stats.binom.sf(first.numpy() - 1, (first + second).numpy(), 0.5)  # one half of the two-sided test
        sure = torch.from_numpy(2 * tail <= alpha)
        return torch.where(sure, top.indices[:, 0], -1).to(x.device)

    def forward(self, x: Tensor) -> Tensor:
        """(N, K) logs of the vote shares under fresh noise, each count raised by 1/2 so that they stay finite."""
        counts = self._votes(x, self.samples, None)
        shares = (counts + 0.5) / (counts.sum(dim=1, keepdim=True) + 0.5 * self.num_classes)
        return shares.log().to(x)

    def attackable(self, samples: int = 16, seed: int | None = None) -> "nn.Module":
        """A differentiable module from x to the log of the mean softmax over `samples` fresh draws of noise."""
        return _Expectation(self, check_int(samples, "samples"), seed)

    def _plan(self, n: int, alpha: float, early_stop: bool, target: float | None) -> tuple[Look, ...]:
        check_flag(early_stop, "early_stop")
        if target is not None:
            check_number(target, "target_radius", 0.0, open_low=True)
        return plan_looks(n, alpha, early_stop, target)

    def _check(self, x: Tensor) -> None:
        check_tensor(x, "x", floating=True)
        if offenders := training_layers(self):
            raise IncompatibleModel("Expected a model in eval mode.", offenders)

    def _votes(self, x: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
        self._check(x)
        with preserve(self), torch.no_grad():
            return self._count(x, n, _Noise(x, generator))

    def _count(self, x: Tensor, draws: int, noise: "_Noise") -> Tensor:
        """(N, K) votes on the CPU among `draws` fresh draws that all rows share."""
        counts = torch.zeros(len(x) * self.num_classes, dtype=torch.int64, device=x.device)
        left = draws if len(x) else 0
        while left > 0:
            blocks = max(1, self.batch_size // (_BLOCK * len(x)))
            size = min(left, blocks * _BLOCK)
            eps = noise.take(size) * self.sigma
            for pieces in eps.split(self.batch_size):
                self._pass(x, pieces, counts)
            left -= size
        return counts.reshape(len(x), self.num_classes).cpu()

    def _pass(self, x: Tensor, eps: Tensor, counts: Tensor) -> None:
        """Add the votes of every row under every draw of `eps`, many rows in one forward pass."""
        images = max(1, self.batch_size // len(eps))
        for start in range(0, len(x), images):
            some = x[start : start + images]
            noisy = (some.to(eps.dtype).unsqueeze(1) + eps).flatten(0, 1).to(x.dtype)
            logits = self._logits(noisy)
            row = torch.arange(start, start + len(some), device=x.device).repeat_interleave(len(eps))
            valid = ~logits.isnan().any(dim=1)
            flat = row * self.num_classes + logits.argmax(dim=1)
            counts += torch.bincount(flat[valid], minlength=len(counts))

    def _logits(self, noisy: Tensor) -> Tensor:
        with naming_the_model(noisy):
            logits = check_logits(self.model(noisy), len(noisy))
        if logits.shape[1] != self.num_classes:
            cure = f"Pass num_classes={logits.shape[1]}"
            raise IncompatibleModel(expected(f"logits of {self.num_classes} classes", "model(x)", logits, cure))
        return logits


class _Noise:
    """Standard normal draws in the shape of a row, from a stream of their own, in blocks of one size."""

    def __init__(self, x: Tensor, generator: torch.Generator | None) -> None:
        parent = make_generator(generator)
        seed = torch.randint(2**62, (), generator=parent, device=parent.device)
        self.stream = torch.Generator(x.device).manual_seed(int(seed))
        self.shape, self.device = tuple(x.shape[1:]), x.device
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32

    def take(self, count: int) -> Tensor:
        """(count, ...) draws, none of which was returned before; what is left of the last block is thrown away."""
        shape = (_BLOCK, *self.shape)
        blocks = [
            torch.randn(shape, generator=self.stream, dtype=self.dtype, device=self.device)
            for _ in range(math.ceil(count / _BLOCK))
        ]
        return torch.cat(blocks)[:count]


class _Expectation(nn.Module):
    """The log of the mean softmax under noise."""

    def __init__(self, smoothed: SmoothedModel, samples: int, seed: int | None) -> None:
        super().__init__()
        self.smoothed, self.samples = smoothed, samples
        self._stream = make_generator(None, seed)

    def forward(self, x: Tensor) -> Tensor:
        check_tensor(x, "x", floating=True)
        eps = _Noise(x, self._stream).take(self.samples) * self.smoothed.sigma
        noisy = (x.to(eps.dtype).unsqueeze(1) + eps).flatten(0, 1).to(x.dtype)
        parts = self.smoothed._logits(noisy).log_softmax(dim=1).reshape(len(x), self.samples, self.smoothed.num_classes)
        return parts.logsumexp(dim=1) - math.log(self.samples)
