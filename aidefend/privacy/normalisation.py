"""Replaces what normalises over the batch by what normalises each row alone, and tells what it did."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_kind, check_tensor, refuse
from aidefend._core.errors import IncompatibleModel, Offender
from aidefend._core.modules import naming_the_model, preserve
from aidefend.privacy.lora import replaced

_FEWEST_FEATURES = 4  # a row of two normalised features has two values left, one of three lies on a circle
_CHANNELS_IN_GROUP = 4
_MOST_GROUPS = 32
_ROWS = 4
_POSITIONS = 4


class Change(NamedTuple):
    """One replaced module: where, what it was, what it is now, and why this one."""

    path: str
    before: str
    after: str
    why: str


class Fixed(NamedTuple):
    """What `fix` returns: the new model, and every change that was made to it."""

    model: nn.Module
    changes: tuple[Change, ...]


def fix(model: nn.Module, x: Tensor | None = None) -> Fixed:
    """A copy of a model in which batch normalisation gives way to normalisation of each row alone.

    Guarantee: no batch normalisation in train mode and no running statistics of instance normalisation are left; each
        new layer, and with x the whole model, still tells rows apart. Everything else is untouched: layers of other
        kinds that private training refuses are named by `check_private_ready`.
    Args:
        model: Left as it is. A batch normalisation that is frozen (in eval mode, no parameter trainable) is a fixed
            scaling and stays.
        x: Some rows (N >= 2, ...) on which the model runs; public ones, or the first of the data. They show what
            BatchNorm1d works on (tables or signals); without x it is taken to be a table.
    Returns: `Fixed(model, changes)`. Weights and biases of the replaced layers are kept; their running statistics are
        not, so a trained model needs some training again.
    Raises: IncompatibleModel: a new layer or the new model gives the same output for all rows, or a lazy layer has no
        shape yet. ConfigurationError: model is no module, x has fewer than two rows.
    Cost: One copy of the model; with x two forward passes.

    Source: Wu, He 2018 (group normalisation); for private training: De et al. 2022.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
        >>> fixed = fix(model)
        >>> [(change.path, change.after.split(", eps")[0]) for change in fixed.changes]
        [('1', 'GroupNorm(1, 32')]
    """
    check_kind(model, nn.Module, "model")
    if x is not None and len(check_tensor(x, "x", finite=False)) < 2:
        raise refuse("x with at least two rows", "x", x, "Pass two or more examples, or None")
    _check_shapes(model)
    fixed = copy.deepcopy(model)
    paths = {id(module): path for path, module in fixed.named_modules()}
    signals = set() if x is None else _running_on_signals(fixed, x)
    made: dict[str, _New] = {}
    changes: dict[str, Change] = {}

    def other(module: nn.Module) -> nn.Module | None:
        path = paths.get(id(module), "")
        new = _replacement(module, path in signals)
        if new is None:
            return None
        made[path] = new
        changes[path] = Change(path, repr(module), repr(new.module), new.why)
        return new.module.train(module.training)

    fixed = replaced(fixed, other)
    _check_rows_differ(fixed, made, x)
    return Fixed(fixed, tuple(changes[path] for path in paths.values() if path in changes))


class _New(NamedTuple):
    """A new module, why it is this one, and how many positions the rows have that it must tell apart at the least."""

    module: nn.Module
    why: str
    positions: int


def _check_shapes(model: nn.Module) -> None:
    lazy = [
        Offender(path, f"{type(module).__name__} has no shape yet", "Run the model once before")
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.lazy.LazyModuleMixin)
    ]
    if lazy:
        raise IncompatibleModel("Expected layers with shapes.", lazy)


def _replacement(module: nn.Module, on_signals: bool) -> _New | None:
    """What takes the place of a module; None for what may stay."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return _without_statistics(module) if module.track_running_stats else None
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or _is_frozen(module):
        return None
    reason = f"{type(module).__name__} mixes the examples of a batch and keeps un-noised statistics"
    channels = module.num_features
    if not isinstance(module, nn.BatchNorm1d) or on_signals:
        groups = _groups(channels)
        why = f"{reason}; groups of {channels // groups} channel(s) of each row do not"
        return _New(_like(module, groups), why, _POSITIONS)
    if channels < _FEWEST_FEATURES:
        why = f"{reason}; normalising a row of {channels} feature(s) alone would erase most of what it says"
        return _New(nn.Identity(), why, 1)
    why = f"{reason}; one group of all {channels} features of a row does not, and tells rows apart"
    return _New(_like(module, 1), why, 1)


def _is_frozen(module: nn.modules.batchnorm._BatchNorm) -> bool:
    trainable = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    return not module.training and module.running_mean is not None and not trainable


def _groups(channels: int) -> int:
    """The largest number of groups that divides the channels, within what is usual."""
    most = max(1, min(_MOST_GROUPS, channels // _CHANNELS_IN_GROUP))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


def _like(module: nn.modules.batchnorm._BatchNorm, groups: int) -> nn.GroupNorm:
    """Group normalisation with the same scale, shift, place and trainability."""
    parameters = list(module.parameters(recurse=False))
    norm = nn.GroupNorm(groups, module.num_features, module.eps, module.affine)
    if parameters:
        norm = norm.to(parameters[0].device, parameters[0].dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters(recurse=False):
            getattr(norm, name).copy_(parameter).requires_grad_(parameter.requires_grad)
    return norm


def _without_statistics(module: nn.modules.instancenorm._InstanceNorm) -> _New:
    plain = copy.deepcopy(module)
    plain.track_running_stats = False
    plain.running_mean = plain.running_var = plain.num_batches_tracked = None
    why = f"{type(module).__name__} keeps un-noised statistics of the data; without them it treats each row alone"
    return _New(plain, why, _POSITIONS)


def _running_on_signals(model: nn.Module, x: Tensor) -> set[str]:
    """Paths of the BatchNorm1d layers that meet (N, C, L)."""
    found: set[str] = set()

    def look(path: str) -> object:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs and inputs[0].ndim == 3:
                found.add(path)

        return hook

    with preserve(model), torch.no_grad(), naming_the_model(x):
        for path, module in model.named_modules():
            if isinstance(module, nn.BatchNorm1d):
                module.register_forward_pre_hook(look(path))  # type: ignore[arg-type]
        model(x)
    return found


def _check_rows_differ(model: nn.Module, made: dict[str, _New], x: Tensor | None) -> None:
    """Each new layer on random rows, and the model on x."""
    cure = "Replace it by hand, or pass x= with rows on which the model runs"
    dead = [
        Offender(path, f"{new.module!r} gives the same output for all rows", cure)
        for path, new in made.items()
        if isinstance(new.module, nn.GroupNorm) and not _norm_tells_apart(new.module, new.positions)
    ]
    if not dead and made and x is not None:
        with preserve(model), torch.no_grad(), naming_the_model(x):
            outputs = torch.utils._pytree.tree_leaves(model(x))
        alive = any(isinstance(value, Tensor) and value.ndim > 0 and _rows_differ(value) for value in outputs)
        reason, cure = (
            "the new model gives the same output for all rows of x",
            "Pass rows that the old model tells apart",
        )
        dead = [] if alive else [Offender("", reason, cure)]
    if dead:
        raise IncompatibleModel("Expected a model whose outputs differ from row to row.", dead)


def _norm_tells_apart(module: nn.GroupNorm, positions: int) -> bool:
    """Without its scale, which may begin at zero, and in float64, where a constant is a constant."""
    stream = torch.Generator().manual_seed(0)
    rows = torch.randn(_ROWS, module.num_channels, positions, generator=stream, dtype=torch.float64)
    return _rows_differ(nn.functional.group_norm(rows, module.num_groups, eps=module.eps), 0.1)


def _rows_differ(outputs: Tensor, least: float = 1e-4) -> bool:
    """Whether some row lies further from the first than a share of the largest output."""
    return bool(((outputs - outputs[:1]).abs() > max(least * float(outputs.abs().max()), 1e-12)).any())
