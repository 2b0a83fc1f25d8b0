"""What detectors share that ask the model about changed inputs: checks, and the change of its answer."""

from collections.abc import Callable

import torch
from torch import Tensor

from aidefend._core.checks import check_callable, check_logits, check_same_rows, check_tensor, refuse
from aidefend._core.errors import IncompatibleModel
from aidefend._core.modules import Model, naming_the_model, training_layers
from aidefend.validate.detector import check_wide_logits, wide


def check_inputs(features: Tensor, x: Tensor | None, model: Model | None) -> tuple[Tensor, Model]:
    """Inputs and model of the rows of these features.

    Raises: IncompatibleModel: layers in train mode.
    """
    if x is None or model is None:
        cure = "Pass x= and model= to score; a Guard does"
        raise refuse("the inputs and the model", "x" if x is None else "model", None, cure)
    check_tensor(x, "x")
    check_same_rows(("features", "x"), len(features), len(x))
    check_callable(model, "model", "Pass the model that gave the logits")
    if offenders := training_layers(model):
        raise IncompatibleModel("Expected a model in eval mode.", offenders)
    return x, model


def answer_changes(
    features: Tensor,
    logits: Tensor | None,
    x: Tensor | None,
    model: Model | None,
    changes: Callable[[Tensor], list[Tensor]],
) -> Tensor:
    """L1 distance of the softmax of each changed input to that of the rows as they are: (changes, N), in [0, 2]."""
    base = check_wide_logits(features, logits).softmax(dim=1)
    rows, asked = check_inputs(features, x, model)
    if len(rows) == 0:
        return base.new_zeros(1, 0)
    gaps = []
    for changed in changes(rows):
        with naming_the_model(changed):
            answer = wide(check_logits(asked(changed), len(rows)))
        if answer.shape != base.shape:
            raise refuse(f"logits of {answer.shape[1]} classes", "logits", logits, "Pass the logits of this model")
        gaps.append((answer.softmax(dim=1) - base).abs().sum(dim=1))
    return torch.stack(gaps)
