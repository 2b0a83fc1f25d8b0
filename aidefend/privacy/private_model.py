"""The user's model with a memory: forward passes are remembered while a batch is open, and only then."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aidefend.privacy.recorder import Recorder, count_rows
from aidefend.privacy.step_book import StepBook


class PrivateModel(nn.Module):
    """The model inside private training: same outputs, same parameters, same `state_dict` as the user's own.

    Call it as often as the losses need (clean and attacked inputs, row i from example i each time). Without an open
    batch, without gradient, or with frozen parameters it is the plain model. A deep copy is the plain model's.
    `module` is the user's own.
    """

    def __init__(
        self,
        module: nn.Module,
        book: StepBook,
        recorder: Recorder,
        approve: Callable[[nn.Module], None],
        empty_outputs: Callable[[], Any],
    ) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        object.__setattr__(self, "_book", book)
        object.__setattr__(self, "_recorder", recorder)
        object.__setattr__(self, "_approve", approve)
        object.__setattr__(self, "_empty_outputs", empty_outputs)

    _book: StepBook
    _recorder: Recorder
    _approve: Callable[[nn.Module], None]
    _empty_outputs: Callable[[], Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs; an empty batch gives empty outputs without a run of the model."""
        if count_rows(args, kwargs) == 0:
            return self._empty_outputs()
        ticket = self._book.open_ticket
        if ticket is None or not torch.is_grad_enabled() or not _learns(self.module):
            return self.module(*args, **kwargs)
        self._approve(self.module)
        return self._recorder.run(ticket, args, kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state of the user's model, under its own names."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load into the user's model."""
        return self.module.load_state_dict(state_dict, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self.module, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.module.__reduce_ex__(protocol)


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def zero_rows(outputs: Any) -> Any:
    """The outputs of a batch with no row, shaped after those of a batch with some."""
    return torch.utils._pytree.tree_map(
        lambda value: value[:0].detach() if isinstance(value, Tensor) and value.ndim else value, outputs
    )
