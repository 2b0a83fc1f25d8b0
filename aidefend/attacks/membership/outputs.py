"""What an adversary reads off a model's outputs: log-probabilities, whatever form the outputs have."""

import torch
from torch import Tensor

from aidefend._core.checks import check_logits, expected
from aidefend._core.errors import AidefendError
from aidefend._core.modules import Model, looks_like_probabilities, preserve

_SMALLEST = 1e-12


def log_probabilities(outputs: Tensor) -> Tensor:
    """Log-probabilities (N, K) float64 from logits or from probabilities; keeps the gradient.

    Rows that are non-negative and sum to one are taken as probabilities (hardened outputs such as labels only or the
    first k): a zero becomes `log(1e-12)`. A non-finite output counts as no support for its class.
    """
    wide = outputs.double()
    if looks_like_probabilities(outputs):
        return wide.clamp(min=_SMALLEST).log()
    limited = wide.nan_to_num(nan=-1e9, posinf=1e9, neginf=-1e9)
    return torch.log_softmax(limited, dim=1)


def scaled_logit(log_probability: Tensor, y: Tensor) -> Tensor:
    """log(p_y / (1 - p_y)) of each row (N,): close to normal over models, unlike the loss.

    The mass of the other classes is summed, not taken as 1 - p_y, so that sure rows keep their digits.
    """
    column = y[:, None]
    of_label = log_probability.gather(1, column)[:, 0]
    others = log_probability.scatter(1, column, -torch.inf).logsumexp(dim=1)
    return of_label - others


def ask(model: Model, x: Tensor, batch_size: int = 512) -> Tensor:
    """All outputs of a model as given, without a trace: log-probabilities (N, K) float64 on the CPU."""
    with preserve(model), torch.no_grad():
        return torch.cat([log_probabilities(answer(model, part)).cpu() for part in x.split(batch_size)])


def answer(model: Model, x: Tensor) -> Tensor:
    """The outputs of one batch (N, K), checked; an error inside the model is named as such."""
    try:
        outputs = model(x)
    except (AidefendError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        cure = "Call the model with such an x to see the cause"
        raise AidefendError(
            expected(f"the model to accept x of shape {tuple(x.shape)}", "model", found, cure)
        ) from error
    return check_logits(outputs, len(x))
