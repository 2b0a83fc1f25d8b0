"""Averages of the weights along training: exponential (EMA) and equal (SWA), in a copy that shares no memory."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from aidefend._core.checks import check_int, check_kind, check_number, refuse
from aidefend.adversarial.crafting import bare

_NARROW = (torch.float16, torch.bfloat16)


class _Average:
    """A copy of the model whose parameters are averages; buffers are copied from the model at each update."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(bare(check_kind(model, nn.Module, "model"))).eval().requires_grad_(False)
        self.updates = 0
        self._wide = {n: p.detach().float() for n, p in self.model.named_parameters() if p.dtype in _NARROW}

    def _take(self, model: nn.Module, share: float) -> None:
        """Move the averages towards the live weights by `share`, and copy the buffers."""
        live = bare(check_kind(model, nn.Module, "model"))
        _check_same_layout(self.model, live)
        with torch.no_grad():
            now = dict(live.named_parameters())
            for name, average in self.model.named_parameters():
                # 16 bits would round a small step away: their average is kept in 32.
                precise = self._wide.get(name, average)
                precise.lerp_(now[name].detach().to(precise), share)
                if precise is not average:
                    average.copy_(precise)
            buffers = dict(live.named_buffers())
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
        self.updates += 1

    def copy_to(self, model: nn.Module) -> None:
        """Write the averages and the buffers into a model: its tensors keep their own memory."""
        live = bare(check_kind(model, nn.Module, "model"))
        _check_same_layout(self.model, live)
        with torch.no_grad():
            live.load_state_dict(self.model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """All state, as copies: `model` (tensors), `wide` (32-bit averages of 16-bit weights), `updates`."""
        tensors = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        return {"model": tensors, "wide": {n: v.clone() for n, v in self._wide.items()}, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        if not isinstance(state, Mapping) or set(state) != {"model", "wide", "updates"}:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else state
            raise refuse("a state with model, wide and updates", "state", found, "Pass what state_dict() returned")
        if set(state["wide"]) != set(self._wide):
            raise refuse(
                f"wide averages of {sorted(self._wide)}", "state", sorted(state["wide"]), "Use the same dtypes"
            )
        updates = check_int(state["updates"], "updates", 0)
        self.model.load_state_dict(state["model"])
        for name, value in state["wide"].items():
            self._wide[name].copy_(value)
        self.updates = updates


class EMA(_Average):
    """Exponential moving average of the weights: average = decay * average + (1 - decay) * weights.

    Guarantee: `.model` shares no memory with the live model (BatchNorm statistics are copied, not averaged and never
        aliased) and is in eval mode; the live model is only read. None about robustness: averages usually gain some
        and delay robust overfitting: measure it.
    Args:
        model: The model in training, a data-parallel or compiled wrapper around it included. Averages start at its
            weights.
        decay: In [0, 1); 1 / (1 - decay) is about the number of steps remembered.
        follow: For so many first updates the average is the live weights, >= 0: the early ones are noise.
    Raises: ConfigurationError: an argument is malformed, or `update` gets a model of another layout.
    Cost: One copy of the model; one read of the weights an update, no pass.
    Source: Polyak, Juditsky 1992; for adversarial training Rebuffi et al. 2021.
    Example:
        >>> model = nn.Linear(1, 1)
        >>> _ = nn.init.zeros_(model.weight)
        >>> ema = EMA(model, decay=0.9)
        >>> _ = nn.init.ones_(model.weight)
        >>> ema.update(model)
        >>> round(ema.model.weight.item(), 6)
        0.1
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, *, follow: int = 0) -> None:
        self.decay = check_number(decay, "decay", 0.0, 1.0, open_high=True)
        self.follow = check_int(follow, "follow", 0)
        super().__init__(check_kind(model, nn.Module, "model"))

    def update(self, model: nn.Module) -> None:
        """Take in the weights as they are now; call it after `optimizer.step()`."""
        self._take(model, 1.0 if self.updates < self.follow else 1.0 - self.decay)


class SWA(_Average):
    """Equal average of the weights at every update: call `update` once an epoch in the last part of training.

    Guarantee: as for `EMA`. BatchNorm statistics are those of the last model, not of the averaged weights: run
        `torch.optim.swa_utils.update_bn(loader, swa.model)` before you judge a net with BatchNorm.
    Args:
        model: The model in training, a data-parallel or compiled wrapper around it included. Its weights count from
            the first `update` on.
    Raises: ConfigurationError: as for `EMA`.
    Cost: One copy of the model; one read of the weights an update, no pass.
    Source: Izmailov et al. 2018.
    Example:
        >>> model = nn.Linear(1, 1)
        >>> swa = SWA(model)
        >>> for value in (1.0, 2.0, 6.0):
        ...     _ = nn.init.constant_(model.weight, value)
        ...     swa.update(model)
        >>> swa.model.weight.item()
        3.0
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(check_kind(model, nn.Module, "model"))

    def update(self, model: nn.Module) -> None:
        """Count the weights as they are now in."""
        self._take(model, 1.0 / (self.updates + 1))


def _check_same_layout(average: nn.Module, live: nn.Module) -> None:
    layouts = [{n: v.shape for n, v in [*m.named_parameters(), *m.named_buffers()]} for m in (average, live)]
    if layouts[0] != layouts[1]:
        differing = sorted(name for name, _ in set(layouts[0].items()) ^ set(layouts[1].items()))[:5]
        cure = "Update with the model that the average was made of"
        raise refuse("a model with the same parameters and buffers", "model", f"others in {differing}", cure)
