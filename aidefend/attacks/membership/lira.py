"""Membership by likelihood ratio: compare a sample's score with its scores under models that did and did not see it."""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from aidefend._core.checks import check_choice, check_int, check_labels, check_not_empty, check_tensor, refuse
from aidefend._core.modules import Model
from aidefend._core.random import derive_seed
from aidefend.attacks.membership.outputs import ask, scaled_logit
from aidefend.attacks.membership.training import TrainFn, train_isolated

Variance = Literal["fixed", "per_example"]
Mode = Literal["online", "offline"]
_SMALLEST = 1e-6


@dataclasses.dataclass(frozen=True)
class LiRA:
    """Likelihood-ratio attack with a few shadow models.

    Guarantee: none. A lower bound on what an adversary with the training procedure and samples like the training data
        can infer; more shadow models find more.
    Args:
        shadows: Number of shadow models, even, >= 4. Every sample is inside exactly half of them.
        mode: "online" compares members' and non-members' scores; "offline" asks only how unusual the score is for a
            non-member, as an adversary must who trained the shadow models before the samples were known.
        variance: "fixed" pools one variance over all samples: right below about 64 shadow models. "per_example" needs
            many shadow models.
        batch_size: Rows a forward pass.
    Raises: ConfigurationError: an odd or too small number of shadow models, fewer than 4 samples.
    Cost: `shadows` trainings on half of the samples, shadows + 1 forward passes.

    Source: Carlini, Chien, Nasr, Song, Terzis, Tramer 2022, Algorithm 1 and section VI-A (fixed variance). Differs: one
        query a sample, no augmentations; half-splits come in complementary pairs, which balances inside and outside.

    Example:
        >>> def train_fn(dataset, seed):
        ...     means = torch.stack([dataset[i][0] for i in range(len(dataset))]).mean(dim=0)
        ...     return lambda x: torch.stack([-(x - means).abs().sum(1), torch.zeros(len(x))], dim=1)
        >>> x, y = torch.arange(8.0).reshape(8, 1), torch.zeros(8, dtype=torch.int64)
        >>> LiRA(shadows=4)(train_fn([(x[0], y[0])], 0), x, y, train_fn=train_fn).shape
        torch.Size([8])
    """

    shadows: int = 8
    mode: Mode = "online"
    variance: Variance = "fixed"
    batch_size: int = 512

    def __post_init__(self) -> None:
        check_int(self.shadows, "shadows", 4)
        check_choice(self.mode, ("online", "offline"), "mode")
        check_choice(self.variance, ("fixed", "per_example"), "variance")
        check_int(self.batch_size, "batch_size")
        if self.shadows % 2:
            raise refuse("an even number of shadow models", "shadows", self.shadows, "Halves come in pairs")

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, train_fn: TrainFn, seed: int = 0) -> Tensor:
        """Scores (N,) float64, higher = rather a member.

        Args:
            model: The model under attack.
            x: (N, ...) the samples in question, members and non-members mixed; shadow models train on halves of them.
            y: (N,) their labels.
            train_fn: `train_fn(dataset, seed) -> model`, the training procedure of the model under attack.
            seed: Chooses the halves and the seeds of the shadow models.
        """
        shadow, inside = self.shadow_scores(x, y, train_fn=train_fn, seed=seed)
        return likelihood_ratio(self._score(model, x, y), shadow, inside, mode=self.mode, variance=self.variance)

    def shadow_scores(self, x: Tensor, y: Tensor, *, train_fn: TrainFn, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Scores (S, N) of all samples under all shadow models, and which were inside each training set (S, N) bool."""
        check_tensor(x, "x", finite=False)
        labels = check_labels(y, len(x))
        if len(x) < 4:
            raise refuse("at least 4 samples", "x", x, "Pass members and non-members")
        inside = half_splits(len(x), self.shadows, derive_seed(seed, "halves"))
        scores = []
        for number, chosen in enumerate(inside):
            dataset = TensorDataset(x[chosen], labels[chosen])
            shadow = train_isolated(train_fn, dataset, derive_seed(seed, "shadow", number) % 2**31)
            scores.append(self._score(shadow, x, labels))
        return torch.stack(scores), inside

    def _score(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        log_probability = ask(model, x, self.batch_size, int(y.max()) + 1)
        labels = check_labels(y, len(x), log_probability.shape[1])
        return scaled_logit(log_probability, labels.cpu())


def half_splits(n: int, shadows: int, seed: int) -> Tensor:
    """(S, N) bool: S / 2 random halves, each followed by its complement."""
    stream = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(shadows // 2):
        half = torch.zeros(n, dtype=torch.bool)
        half[torch.randperm(n, generator=stream)[: n // 2]] = True
        rows += [half, ~half]
    return torch.stack(rows)


def likelihood_ratio(
    observed: Tensor, shadow: Tensor, inside: Tensor, *, mode: Mode = "online", variance: Variance = "fixed"
) -> Tensor:
    """The test statistic alone, from scores that were computed elsewhere.

    Args:
        observed: (N,) score of each sample under the model in question, higher = fits better.
        shadow: (S, N) the same under the shadow models.
        inside: (S, N) bool, which samples each shadow model trained on; each sample at least once in and out
            (twice with `variance="per_example"`).
        mode: "online": log of the ratio of two normal densities. "offline": the log of the odds that a
            non-member scores lower.
        variance: One variance for all samples, or one for each.
    Returns: (N,) float64, higher = rather a member.
    Raises: ConfigurationError: shapes differ, a sample that is never inside or never outside.
    """
    n = len(check_tensor(observed, "observed", ndim=1, floating=True))
    check_not_empty(n, "observed")
    if shadow.shape != inside.shape or shadow.ndim != 2 or shadow.shape[1] != n:
        raise refuse(f"shadow and inside of shape (S, {n})", "shadow", shadow, "One row for each shadow model")
    check_tensor(shadow, "shadow")
    needed = 2 if variance == "per_example" else 1
    seen = [inside] if mode == "online" else []
    if any(int(part.sum(dim=0).min()) < needed for part in [*seen, ~inside]):
        raise refuse(
            f"each sample inside and outside of {needed} shadow model(s)", "inside", inside, "Train more shadow models"
        )
    mean_out, deviation_out = _normal_fit(shadow.double(), ~inside, variance)
    z_out = (observed.double() - mean_out) / deviation_out
    if mode == "offline":
        odds: Tensor = torch.special.log_ndtr(z_out) - torch.special.log_ndtr(-z_out)
        return odds
    mean_in, deviation_in = _normal_fit(shadow.double(), inside, variance)
    z_in = (observed.double() - mean_in) / deviation_in
    return (z_out.square() - z_in.square()) / 2 + (deviation_out / deviation_in).log()


def _normal_fit(scores: Tensor, chosen: Tensor, variance: Variance) -> tuple[Tensor, Tensor]:
    """Mean (N,) and deviation ((N,) or a number) of the chosen scores of each sample."""
    weight = chosen.double()
    count = weight.sum(dim=0)
    mean = (scores * weight).sum(dim=0) / count
    squares = ((scores - mean).square() * weight).sum(dim=0)
    if variance == "per_example":
        return mean, (squares / (count - 1)).sqrt().clamp(min=_SMALLEST)
    freedom = max(1.0, float((count - 1).sum()))
    return mean, torch.tensor(max(_SMALLEST, math.sqrt(float(squares.sum()) / freedom)), dtype=torch.float64)
