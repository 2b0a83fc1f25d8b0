"""Membership from one number: members have smaller losses than other samples."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from aidefend._core.checks import check_choice, check_int, check_labels, check_not_empty, check_tensor
from aidefend._core.modules import Model
from aidefend.attacks.membership.outputs import ask, scaled_logit


@dataclasses.dataclass(frozen=True)
class LossThreshold:
    """Scores samples by how well the model fits them; one threshold for all.

    Guarantee: none. It is a lower bound on what an adversary can infer: `LiRA` is stronger where shadow models can be
        trained. Outputs that hide the loss (labels only) leave the difference in accuracy, which it still finds.
    Args:
        score: "loss" is the log-probability of the label (the scaled logit log(p / (1 - p)) gives the same order);
            "margin" is the gap to the best other class, the statistic that label smoothing and temperature hide less.
        batch_size: Rows a forward pass.
    Raises: ConfigurationError: unknown score, labels that the model has no output for.
    Cost: One forward pass.

    Source: Yeom, Giacomelli, Fredrikson, Jha 2018, Adversary 2. Differs: gives the score; the threshold is left to the
        caller.

    Example:
        >>> scores = LossThreshold()(
        ...     torch.nn.Identity(), torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 0])
        ... )
        >>> bool(scores[0] > scores[1])
        True
    """

    score: Literal["loss", "margin"] = "loss"
    batch_size: int = 512

    def __post_init__(self) -> None:
        check_choice(self.score, ("loss", "margin"), "score")
        check_int(self.batch_size, "batch_size")

    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """Scores (N,) float64, higher = rather a member. x (N, ...), y (N,) labels."""
        labels = _checked(x, y)
        log_probability = ask(model, x, self.batch_size, int(labels.max()) + 1)
        column = check_labels(labels, len(x), log_probability.shape[1]).cpu()
        if self.score == "loss":
            return functional.logsigmoid(scaled_logit(log_probability, column))
        others = log_probability.scatter(1, column[:, None], -torch.inf).amax(dim=1)
        return log_probability.gather(1, column[:, None])[:, 0] - others


def _checked(x: Tensor, y: Tensor) -> Tensor:
    check_tensor(x, "x", finite=False)
    check_not_empty(len(x), "x")
    return check_labels(y, len(x))
