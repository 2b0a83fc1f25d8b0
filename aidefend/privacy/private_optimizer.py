"""The user's optimizer behind the noise: it sees private gradients only, once for each batch of the loader."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aidefend._core.checks import refuse
from aidefend.privacy.banded_noise import BandedNoise, band_coefficients
from aidefend.privacy.clip_bound import ClipBound
from aidefend.privacy.config import PrivacyConfig
from aidefend.privacy.layer_gradients import trainable_parameters
from aidefend.privacy.ranks import Ranks
from aidefend.privacy.run_draws import draw_noise
from aidefend.privacy.step_book import StepBook, Ticket, refused

_OWN = "Let gradients come from private.loss(...).backward() or private.backward(losses) alone: no clipping, scaling, "
_OWN += "penalty or backward of your own between backward and step"


class ParameterGuard:
    """The trainable parameters as they were when the run began."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self.trainable = trainable_parameters(model)
        self._facts = self._now()
        self._groups = self._members()

    def check(self) -> None:
        """Refuse parameters that were added, replaced, frozen, unfrozen or retyped since."""
        now = self._now()
        changed = sorted(name for name in self._facts.keys() | now.keys() if self._facts.get(name) != now.get(name))
        if changed:
            cure = "Change the model before make_private, or private.release() and wrap it again (the runs compose)"
            raise refused("the parameters of make_private, unchanged", "changed parameters", changed[:10], cure)
        if self._members() != self._groups:
            cure = "Give the optimizer all its parameters before make_private"
            raise refused("the parameter groups of make_private", "parameter groups", "changed", cure)

    def optimized(self) -> list[Tensor]:
        """All parameters that the optimizer steps."""
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _now(self) -> dict[str, tuple[Any, ...]]:
        return {n: (id(p), p.shape, p.dtype, p.requires_grad) for n, p in self._model.named_parameters()}

    def _members(self) -> set[int]:
        return {id(parameter) for parameter in self.optimized()}


class Noise:
    """The noise of each step and parameter, correlated over a band of steps if the configuration says so.

    Of several processes the first one adds it; the others add nothing.
    """

    def __init__(self, config: PrivacyConfig, bound: ClipBound, ranks: Ranks) -> None:
        self._config, self._bound, self._ranks = config, bound, ranks
        self._band: BandedNoise | None = None
        if config.bands is not None:
            self._band = BandedNoise(band_coefficients(config.bands, config.steps))

    def like(self, parameter: Tensor, name: str, step: int) -> Tensor:
        """Noise for one parameter at one step, in the units of the clipped sum, float32 or wider; the caller's own."""
        fresh = self._fresh(parameter, name, step)
        return fresh if self._band is None else self._band.correlated(fresh, name, step)

    def _fresh(self, parameter: Tensor, name: str, step: int) -> Tensor:
        dtype = parameter.dtype if parameter.dtype == torch.float64 else torch.float32
        shape, place = tuple(parameter.shape), parameter.device
        if not self._ranks.first:
            return torch.zeros(shape, dtype=dtype, device=place)
        return draw_noise(
            self._config, shape, self._bound.noise_deviation, "noise", step, name, device=place, dtype=dtype
        )


class PrivateOptimizer(torch.optim.Optimizer):
    """The user's optimizer; its gradients are clipped, noisy and divided by the public batch size. Schedulers take it.

    The noise is added when the sums arrive, once for each batch, so that `.grad` never holds anything but what is
    released anyway.
    Whatever the inner optimizer does with the noisy gradient (momentum, weight decay, adaptive rates) is
    post-processing and costs nothing.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        config: PrivacyConfig,
        book: StepBook,
        guard: ParameterGuard,
        bound: ClipBound,
        ranks: Ranks,
    ) -> None:
        # The parent's constructor would make a second set of groups and state: both are the inner optimizer's own.
        self.inner = inner
        self.defaults = inner.defaults
        self._optimizer_step_pre_hooks = inner._optimizer_step_pre_hooks
        self._optimizer_step_post_hooks = inner._optimizer_step_post_hooks
        self._config, self._book, self._guard = config, book, guard
        self._noise = Noise(config, bound, ranks)
        self._ranks = ranks
        self._holders: dict[str, tuple[Tensor, int]] = {}
        self.on_step: Callable[[], None] = lambda: None

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # the parent declares an attribute
        """The groups of the inner optimizer."""
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]  # the parent declares an attribute
        """The state of the inner optimizer."""
        return self.inner.state

    @torch.no_grad()
    def accept(self, sums: dict[str, Tensor], ticket: Ticket) -> None:
        """Take the clipped sums of the open batch, which are used up: `.grad` is theirs plus noise."""
        ticket.graded = ticket.released = True
        for name, parameter in self._guard.trainable.items():
            noisy = self._noise.like(parameter, name, ticket.number)
            if name in sums:
                noisy += sums.pop(name)
            self._ranks.add_up(noisy)
            if parameter.grad is None or self._is_own(name, parameter.grad):
                parameter.grad = noisy.div_(self._config.expected_batch_size).to(parameter.dtype)
                self._holders[name] = (parameter.grad, parameter.grad._version)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure would run the loop again
        """One private step.

        Raises: BudgetExceeded: no step is left; nothing was changed. PrivacyError: gradients that are not those of
            exactly one open batch of the loader, or a changed model.
        """
        if closure is not None:
            raise refuse("step() without a closure", "closure", closure, "Call backward first, then step()")
        ticket = self._book.begin_step()
        self._guard.check()
        self._refuse_foreign()
        ticket.closed = True
        self.on_step()
        self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients; a batch whose gradient is dropped stays charged."""
        self._book.discard()
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: parameters cannot join a running private training."""
        cure = "Give the optimizer all its parameters before make_private"
        raise refused("the parameter groups of make_private", "param_group", sorted(param_group), cure)

    def state_dict(self) -> dict[str, Any]:
        """The state of the inner optimizer."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the inner optimizer."""
        self.inner.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"Private{self.inner!r}"

    def _is_own(self, name: str, grad: Tensor) -> bool:
        return name in self._holders and self._holders[name][0] is grad

    def _refuse_foreign(self) -> None:
        own = {id(parameter): name for name, parameter in self._guard.trainable.items()}
        for parameter in self._guard.optimized():
            name = own.get(id(parameter))
            if name is None:
                if parameter.grad is not None:
                    raise refused("frozen parameters without .grad", "grad", parameter.grad, _OWN)
                continue
            holder = self._holders.get(name)
            if holder is None or parameter.grad is not holder[0] or parameter.grad._version != holder[1]:
                raise refused(f"the gradient of {name} untouched since backward", "grad", parameter.grad, _OWN)
