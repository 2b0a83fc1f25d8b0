"""Pruning: of features that trusted rows leave asleep, of channels with a large Lipschitz bound, of fragile neurons."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from aidefend._core.batches import in_batches
from aidefend._core.modules import InputCapture, preserve
from aidefend._core.random import derive_seed, make_generator
from aidefend.sanitize.repair.tuning import BATCH, TrustedRows, copied, tuned, weighted_layers

Logits = Callable[[Tensor, dict[str, Tensor], dict[str, Tensor]], Tensor]
Weighted = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


def fine_pruned(
    model: nn.Module, layer: nn.Module, rows: TrustedRows, *, share: float, rate: float, epochs: int, seed: int
) -> nn.Module:
    """A copy without the inputs of `layer` that are least active on trusted rows, then tuned.

    `layer` is a linear layer or a convolution; the `share` of its input channels that sleeps most goes, and stays away.

    Source: Liu, Dolan-Gavitt, Garg 2018.
    """
    asleep = activity(model, layer, rows.x).argsort()
    gone = asleep[: min(len(asleep) - 1, round(share * len(asleep)))]
    name = next(name for name, module in model.named_modules() if module is layer)

    def prune(twin: nn.Module) -> None:
        with torch.no_grad():
            weight: Tensor = twin.get_submodule(name).weight  # type: ignore[assignment]  # a layer with a weight
            weight[:, gone] = 0

    start = copied(model)
    prune(start)
    return tuned(start, rows, rate=rate, epochs=epochs, seed=seed, after_step=prune)


def activity(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """Mean size (C,) of each input channel of a layer over the rows."""
    channels: int = layer.weight.shape[1]  # type: ignore[index,assignment]  # checked to be a weighted layer
    with preserve(model), torch.no_grad(), InputCapture(layer) as capture:
        model.eval()

        def read(part: Tensor) -> Tensor:
            model(part)
            return capture.take().abs().reshape(len(part), channels, -1).mean(dim=2)

        return in_batches(read, x).mean(dim=0)


def lipschitz_pruned(model: nn.Module, x: Tensor, *, deviations: float) -> nn.Module:
    """A copy without the channels whose Lipschitz bound lies `deviations` standard deviations above their layer's mean.

    No row takes part but the one pass that finds the order of the layers; nothing is tuned.

    Source: Zheng, Tang, Li, Liu 2022. The bound is the spectral norm of a channel's kernel (in x cells), times the
        scale of a batch normalisation that follows; linear layers take part by the norm of their rows.
    """
    twin = copied(model)
    layers = weighted_layers(twin, x)[:-1]
    norms = _following_norms(twin)
    with torch.no_grad():
        for layer in layers:
            kernels = layer.weight.reshape(len(layer.weight), layer.weight.shape[1], -1)
            bounds = torch.linalg.matrix_norm(kernels, ord=2)
            norm = norms.get(layer)
            if norm is not None and norm.running_var is not None and norm.weight is not None:
                bounds = bounds * (norm.weight / (norm.running_var + norm.eps).sqrt()).abs()
            gone = bounds > bounds.mean() + deviations * bounds.std(correction=0)
            _silence(layer, norm, gone)
    return twin


def _following_norms(model: nn.Module) -> dict[nn.Module, nn.modules.batchnorm._BatchNorm]:
    """Batch normalisation that was registered right after a layer and has its number of channels."""
    modules = [module for module in model.modules() if not list(module.children())]
    found = {}
    for layer, after in itertools.pairwise(modules):
        channels = getattr(layer, "weight", None)
        if channels is None or not isinstance(after, nn.modules.batchnorm._BatchNorm):
            continue
        if after.num_features == len(channels):
            found[layer] = after
    return found


def _silence(layer: Weighted, norm: nn.Module | None, gone: Tensor) -> None:
    for part in (layer, norm):
        for tensor in (getattr(part, "weight", None), getattr(part, "bias", None)):
            if tensor is not None:
                tensor[gone] = 0


def fragility(model: nn.Module, rows: TrustedRows, *, steps: int, seed: int, size: float = 0.4) -> dict[str, Tensor]:
    """Masks in [0, 1] of the output channels of every hidden layer: low where a small change of the neuron does harm.

    Source: Wu, Wang 2021 (adversarial neuron pruning): the mask descends on the loss of the masked model and of the
        masked model whose neurons were moved against it by relative changes of up to `size`.
    """
    names = {module: name for name, module in model.named_modules()}
    layers = {names[layer]: layer for layer in weighted_layers(model, rows.x)[:-1]}
    values = {name: tensor.detach() for name, tensor in model.named_parameters()}
    masks = {name: torch.ones(len(layer.weight)).to(layer.weight) for name, layer in layers.items()}
    stream = make_generator(seed=derive_seed(seed, "fragility"))

    def logits(x: Tensor, mask: dict[str, Tensor], lean: dict[str, Tensor]) -> Tensor:
        moved = dict(values)
        for name in masks:
            weight, bias = f"{name}.weight", f"{name}.bias"
            scale = mask[name] + lean.get(weight, 0)
            moved[weight] = values[weight] * scale.reshape(-1, *[1] * (values[weight].ndim - 1))
            if bias in values:
                moved[bias] = values[bias] * (1 + lean.get(bias, 0))
        found: Tensor = functional_call(model, moved, (x,))
        return found

    with preserve(model), torch.enable_grad():
        model.eval()
        for _ in range(steps):
            chosen = torch.randperm(len(rows.x), generator=stream)[: 2 * BATCH].to(rows.x.device)
            x, y = rows.x[chosen], rows.y[chosen]
            lean = _worst_lean(logits, x, y, masks, values, size, stream)
            wanted = {name: mask.clone().requires_grad_(True) for name, mask in masks.items()}
            loss = 0.2 * cross_entropy(logits(x, wanted, {}), y) + 0.8 * cross_entropy(logits(x, wanted, lean), y)
            slopes = torch.autograd.grad(loss, list(wanted.values()))
            masks = {
                name: (mask - 0.2 * slope).clamp(0, 1)
                for (name, mask), slope in zip(masks.items(), slopes, strict=True)
            }
    return masks


def _worst_lean(
    logits: Logits,
    x: Tensor,
    y: Tensor,
    masks: dict[str, Tensor],
    values: dict[str, Tensor],
    size: float,
    stream: torch.Generator,
) -> dict[str, Tensor]:
    """Relative changes of weights and biases, one a channel, that raise the loss: one step from a random start."""
    names = [part for name in masks for part in (f"{name}.weight", f"{name}.bias") if part in values]
    lean = {}
    for part in names:
        mask = masks[part.rpartition(".")[0]]
        start = torch.rand(mask.shape, generator=stream).to(mask) * 2 - 1
        lean[part] = (size * start).requires_grad_(True)
    slopes = torch.autograd.grad(cross_entropy(logits(x, masks, lean), y), list(lean.values()))
    return {
        part: (start.detach() + size * slope.sign()).clamp(-size, size)
        for (part, start), slope in zip(lean.items(), slopes, strict=True)
    }


def without_fragile(model: nn.Module, masks: dict[str, Tensor], *, share: float) -> nn.Module:
    """A copy without the share of all hidden channels whose masks are lowest."""
    twin = copied(model)
    edge = torch.cat(list(masks.values())).quantile(share)
    with torch.no_grad():
        for name, mask in masks.items():
            weight: Tensor = twin.get_submodule(name).weight  # type: ignore[assignment]  # a layer with a weight
            weight[(mask < edge) & (mask < 1)] = 0
    return twin
