"""What an adversary reads off a model's outputs: log-probabilities, whatever form the outputs have."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from aidefend._core.checks import check_logits, expected
from aidefend._core.errors import AidefendError
from aidefend._core.modules import Model, looks_like_probabilities, preserve

_SMALLEST = 1e-12


def log_probabilities(outputs: Tensor) -> Tensor:
    """Log-probabilities (N, K) float64 from logits or from probabilities; keeps the gradient.

    Where all finite rows are non-negative and sum to one, or sum to less and hold zeros (the first k only), they are
    taken as probabilities: a zero becomes `log(1e-12)`. A non-finite output counts as no support for its class.
    """
    wide = outputs.double()
    shown = outputs.detach()
    shown = shown[torch.isfinite(shown).all(dim=1)]
    if looks_like_probabilities(shown) or _looks_cut_off(shown):
        return wide.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(min=_SMALLEST).log()
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


def ask(model: Model, x: Tensor, batch_size: int = 512, classes: int = 2) -> Tensor:
    """All answers of a model as given, without a trace: log-probabilities (N, K) float64 on the CPU.

    `classes` is the least K where the model answers with labels alone.
    """
    with preserve(model), torch.no_grad():
        answers = [_answer(model, part) for part in x.split(batch_size)]
    if len(x) and all(_unanswered(answer) for answer in answers):
        cure = "Repair the model, or pass rows that its guard accepts: nothing can be measured on refusals alone"
        raise AidefendError(expected("an answer other than NaN to at least one row", "model", "NaN", cure))
    return joined([_as_log_probabilities(answer, len(answer), classes).cpu() for answer in answers])


def joined(parts: Sequence[Tensor], classes: int = 0) -> Tensor:
    """Answers of one model as one table of at least `classes` columns: labels alone name only the classes they saw."""
    most = max(classes, *(part.shape[1] for part in parts))
    unseen = torch.tensor(_SMALLEST, dtype=torch.float64).log().item()
    return torch.cat([functional.pad(part, (0, most - part.shape[1]), value=unseen) for part in parts])


def read(model: Model, x: Tensor, classes: int = 2) -> Tensor:
    """Log-probabilities (N, K) float64 of one batch; the gradient is kept; an error inside the model is named as such.

    Labels alone (N,), integers, count as certain; a negative label (a refused row) supports no class.
    """
    return _as_log_probabilities(_answer(model, x), len(x), classes)


def _answer(model: Model, x: Tensor) -> Tensor:
    """Labels (N,) or outputs (N, K)."""
    try:
        outputs: Any = model(x)
    except (AidefendError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        message = expected(f"the model to accept x of shape {tuple(x.shape)}", "model", found, "Call it with such an x")
        raise AidefendError(message) from error
    labels_alone = isinstance(outputs, Tensor) and outputs.shape == (len(x),) and not outputs.is_floating_point()
    answer: Tensor = outputs if labels_alone else check_logits(outputs, len(x))
    return answer


def _unanswered(answer: Tensor) -> bool:
    """Whether every row is refused or broken."""
    return answer.ndim == 2 and bool(answer.isnan().any(dim=1).all())


def _as_log_probabilities(answer: Tensor, n: int, classes: int) -> Tensor:
    if answer.ndim == 2:
        return log_probabilities(answer)
    width = max(classes, int(answer.max()) + 1 if n else 0)
    certain = functional.one_hot(answer.long().clamp(min=0), width) * (answer >= 0)[:, None]
    return certain.double().clamp(min=_SMALLEST).log()


def _looks_cut_off(outputs: Tensor) -> bool:
    """Probabilities of the k largest classes, zeros elsewhere."""
    if len(outputs) == 0:
        return False
    total = outputs.double().sum(dim=1)
    zeros = (outputs == 0).any(dim=1)
    return bool((outputs >= 0).all() and zeros.all() and (total > 0).all() and (total <= 1 + 1e-3).all())
