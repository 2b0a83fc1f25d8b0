"""Low-rank adapters: a given model learns privately through a few small matrices, which then melt into its weights."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_int, check_items, check_kind, check_number, refuse
from aidefend._core.errors import IncompatibleModel, Offender
from aidefend._core.random import make_generator


class _Adapted(nn.Module):
    """A frozen linear layer plus `scale * up(down(x))`. The two maps are layers of their own: each is clipped exactly.

    `weight` and `bias` are those of the merged layer: code that reads them in place of calling the layer (the fast
    path of nn.TransformerEncoderLayer) computes the same.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        place = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.base, self.scale = base, scale
        self.down = nn.utils.skip_init(nn.Linear, base.in_features, rank, **place)
        self.up = nn.utils.skip_init(nn.Linear, rank, base.out_features, **place)
        reach = 1 / math.sqrt(base.in_features)
        start = torch.rand(rank, base.in_features, generator=generator, device=generator.device) * 2 * reach - reach
        with torch.no_grad():
            self.down.weight.copy_(start)
            self.up.weight.zero_()
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with its correction."""
        output: Tensor = self.base(x) + self.scale * self.up(self.down(x))
        return output

    @property
    def weight(self) -> Tensor:
        """The weight with its correction."""
        weight: Tensor = self.base.weight + self.scale * self.up.weight @ self.down.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, which is not corrected."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """As of the layer."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """As of the layer."""
        return self.base.out_features


def add_lora(
    model: nn.Module,
    rank: int,
    *,
    layers: Sequence[str] | None = None,
    alpha: float | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A copy of a model that learns through low-rank corrections of its linear layers, and through nothing else.

    Guarantee: the copy computes what the model computes until it is trained; its trainable parameters are the
        corrections alone, and `make_private` clips their per-example gradients exactly. None about what the given
        weights reveal of the data that they were trained on.
    Args:
        model: Left as it is. Its copy is frozen; set requires_grad on a new head yourself, before the optimizer.
        rank: Of each correction, >= 1 and at most the smaller side of the layer; noise grows with it.
        layers: Names of plain nn.Linear layers, as in named_modules(); None: all of them. Not those inside of
            nn.MultiheadAttention, which reads weights without calling layers, nor subclasses and parametrised layers.
        alpha: Corrections are multiplied by alpha / rank, > 0; None: alpha = rank.
        generator: For the random half of each correction (the other half is zero); None: a fresh one.
    Returns: The copy, in the same train/eval mode. `merge_lora` turns it back into a plain model.
    Raises: ConfigurationError: arguments out of range, an unknown name. IncompatibleModel: a named layer is no
        nn.Linear that is called, or the model has none.
    Cost: One copy of the model; rank * (in + out) parameters and as many multiplications more for each layer and row.

    Source: Hu et al. 2021; under differential privacy: Yu et al. 2022.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> adapted = add_lora(model, rank=2)
        >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        44
        >>> torch.equal(adapted(torch.ones(1, 8)), model(torch.ones(1, 8)))
        True
    """
    check_kind(model, nn.Module, "model")
    check_int(rank, "rank")
    scale = 1.0 if alpha is None else check_number(alpha, "alpha", 0.0, open_low=True) / rank
    stream = make_generator(generator)
    adapted = copy.deepcopy(model).requires_grad_(False)
    chosen = _chosen(adapted, None if layers is None else check_items(layers, str, "layers", "Pass names of layers"))
    for name, layer in chosen.items():
        if rank > min(layer.in_features, layer.out_features):
            cure = f"Lower rank, or leave {name or 'the model'} out of layers"
            raise refuse(f"rank <= {min(layer.in_features, layer.out_features)}", "rank", rank, cure)
    made = {id(layer): _Adapted(layer, rank, scale, stream) for layer in chosen.values()}
    return replaced(adapted, lambda module: made.get(id(module)))


def merge_lora(model: nn.Module) -> nn.Module:
    """A copy of a model with its low-rank corrections added into the plain layers: same outputs, same names as before.

    Guarantee: post-processing: it costs no privacy.
    Args:
        model: What `add_lora` returned, also wrapped in others, trained or not; left as it is.
    Returns: The copy. Parameters of merged layers ask for gradients again; a tied weight is the layer's own now.
    Raises: ConfigurationError: model has no corrections.
    Cost: One copy of the model, one product for each correction.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> merge_lora(add_lora(model, rank=2))
        Sequential(
          (0): Linear(in_features=8, out_features=6, bias=True)
          (1): ReLU()
          (2): Linear(in_features=6, out_features=2, bias=True)
        )
    """
    check_kind(model, nn.Module, "model")
    if not any(isinstance(module, _Adapted) for module in model.modules()):
        raise refuse("a model from add_lora", "model", type(model).__name__, "Call add_lora first")
    return replaced(copy.deepcopy(model), _merged)


def _merged(module: nn.Module) -> nn.Module | None:
    if not isinstance(module, _Adapted):
        return None
    module.base.weight = nn.Parameter(module.weight.detach().clone())  # another one: the old may be tied elsewhere
    return module.base.requires_grad_(True)


def _chosen(model: nn.Module, names: tuple[str, ...] | None) -> dict[str, nn.Linear]:
    """The layers to adapt; offenders among the named ones are refused together."""
    modules = dict(model.named_modules())
    linears = {name: module for name, module in modules.items() if _is_plain(module)}
    unseen = {
        name
        for name in linears
        if any(isinstance(modules[parent], nn.MultiheadAttention | _Adapted) for parent in _parents(name))
    }
    if names is None:
        found = {name: layer for name, layer in linears.items() if name not in unseen}
        if not found:
            cure = "Name the layers to train, and set requires_grad on them"
            raise IncompatibleModel(
                "Expected a model with linear layers.", [Offender("", "it has no plain nn.Linear of its own", cure)]
            )
        return found
    for name in names:
        if name not in modules:
            raise refuse(f"names of layers, such as {list(linears)[:10]}", "layers", name, "See named_modules()")
    cure = "Leave it out of layers"
    bad = [Offender(name, "it is no plain nn.Linear", cure) for name in names if name not in linears]
    bad += [Offender(name, "its weights are read without calling it", cure) for name in names if name in unseen]
    if bad or not names:
        raise IncompatibleModel("Expected linear layers that are called.", bad)
    return {name: linears[name] for name in names}


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A subclass may compute something else, and a computed weight cannot be written to."""
    return type(module) is nn.Linear and "weight" in module._parameters


def _parents(name: str) -> list[str]:
    """Names of all modules around a module, the model ("") first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:length]) for length in range(len(parts))]


def replaced(model: nn.Module, other: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """The model with `other(module)` in the place of each module for which it is not None, under all of its names."""
    known: dict[int, tuple[nn.Module, nn.Module | None]] = {}

    def of(module: nn.Module) -> nn.Module | None:
        if id(module) not in known:
            known[id(module)] = (module, other(module))
        return known[id(module)][1]

    if (root := of(model)) is not None:
        return root
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            found = None if child is None else of(child)
            if found is not None:
                parent._modules[name] = found
    return model
