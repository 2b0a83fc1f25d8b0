"""Per-example gradients of one layer, from its inputs and the gradients of its outputs."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from aidefend.privacy.gradient_parts import Blocks, GradientPart, Gram, Lookup, Outer, Rows, wide


class Call(NamedTuple):
    """One run of a layer: its positional inputs and the gradient of its output, rows first in each tensor."""

    inputs: tuple[Any, ...]
    gradient: Tensor

    def rows(self, index: Any) -> "Call":
        """The call for some of its rows."""
        n = len(self.gradient)
        return Call(tuple(v[index] if _by_row(v, n) else v for v in self.inputs), self.gradient[index])


def gradient_parts(layer: nn.Module, calls: Sequence[Call]) -> list[GradientPart]:
    """What all calls of a layer in one step add to the gradients of its own trainable parameters.

    Linear, Conv1d, Conv2d, Embedding and the normalisations have forms of their own; any other layer that treats rows
    alike goes through a vectorised vector-Jacobian product of its forward function.
    """
    trainable = own_parameters(layer)
    if isinstance(layer, nn.Linear):
        return _linear(trainable, calls)
    if isinstance(layer, nn.Conv2d | nn.Conv1d):
        return _convolution(layer, trainable, calls)
    if isinstance(layer, nn.Embedding):
        return _embedding(layer, calls)
    if isinstance(layer, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
        return _normalisation(layer, trainable, calls)
    return [_generic(layer, trainable, calls)]


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters that belong to the layer itself; those of its children may have a second name in it."""
    of_children = {id(p) for child in layer.children() for p in child.parameters()}
    mine = layer.named_parameters(recurse=False)
    return {name: p for name, p in mine if p.requires_grad and id(p) not in of_children}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All trainable parameters of a model, under the name of the layer that uses them."""
    named = (
        (f"{path}.{name}" if path else name, parameter)
        for path, layer in model.named_modules()
        for name, parameter in own_parameters(layer).items()
    )
    return dict(named)


def _linear(trainable: dict[str, nn.Parameter], calls: Sequence[Call]) -> list[GradientPart]:
    inputs = _joined([_positions(wide(call.inputs[0])) for call in calls])
    outputs = _joined([_positions(wide(call.gradient)) for call in calls])
    parts: list[GradientPart] = [Rows("bias", outputs.sum(dim=1))] if "bias" in trainable else []
    if "weight" not in trainable:
        return parts
    n, positions, width_in = inputs.shape
    width_out = outputs.shape[2]
    if positions == 1:
        return [*parts, Outer("weight", inputs[:, 0], outputs[:, 0])]
    if positions * (width_in + width_out) <= width_in * width_out:
        return [*parts, Gram("weight", inputs, outputs)]

    def make(rows: slice) -> dict[str, Tensor]:
        return {"weight": outputs[rows].mT @ inputs[rows]}

    return [*parts, Blocks(make, n, width_in * width_out)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The positions of all calls side by side; one call is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _positions(tensor: Tensor) -> Tensor:
    """(n, d) and (n, ..., d) as (n, P, d)."""
    return tensor.flatten(1, -2) if tensor.ndim > 2 else tensor.unsqueeze(1)


def _convolution(
    layer: nn.Conv2d | nn.Conv1d, trainable: dict[str, nn.Parameter], calls: Sequence[Call]
) -> list[GradientPart]:
    n = len(calls[0].gradient)
    parts: list[GradientPart] = []
    if "bias" in trainable:
        summed = torch.stack([wide(call.gradient).flatten(2).sum(dim=2) for call in calls]).sum(dim=0)
        parts.append(Rows("bias", summed))
    if "weight" not in trainable:
        return parts

    def make(rows: slice) -> dict[str, Tensor]:
        return {"weight": torch.stack([_kernel_gradients(layer, call.rows(rows)) for call in calls]).sum(dim=0)}

    patch = math.prod(layer.kernel_size) * layer.in_channels
    spatial = max(call.gradient[0, 0].numel() for call in calls)
    return [*parts, Blocks(make, n, max(patch * spatial, layer.weight.numel()))]


def _kernel_gradients(layer: nn.Conv2d | nn.Conv1d, call: Call) -> Tensor:
    """(k, *weight.shape): the patches that each output position saw, times the gradients of these positions."""
    outputs = wide(call.gradient).flatten(2)
    rows, groups = len(outputs), layer.groups
    patches = _patches(layer, wide(call.inputs[0]))
    patches = patches.reshape(rows, groups, -1, patches.shape[-1])
    grouped = outputs.reshape(rows, groups, -1, outputs.shape[-1])
    return (grouped @ patches.mT).reshape(rows, *layer.weight.shape)


def _patches(layer: nn.Conv2d | nn.Conv1d, x: Tensor) -> Tensor:
    """(k, channels * kernel, positions), padded as the layer does; a signal is an image of height one."""
    if layer.padding_mode != "zeros":
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding: tuple[int, ...] = (0,) * len(layer.kernel_size)
    elif isinstance(layer.padding, str):
        x = functional.pad(x, layer._reversed_padding_repeated_twice)
        padding = (0,) * len(layer.kernel_size)
    else:
        padding = tuple(layer.padding)
    shape: tuple[Any, Any, Any, Any] = (layer.kernel_size, layer.dilation, padding, layer.stride)
    if isinstance(layer, nn.Conv1d):
        kernel, dilation, pad, stride = ((neutral, size[0]) for neutral, size in zip((1, 1, 0, 1), shape, strict=True))
        return functional.unfold(x.unsqueeze(2), kernel, dilation, pad, stride)
    return functional.unfold(x, *shape)


def _embedding(layer: nn.Embedding, calls: Sequence[Call]) -> list[GradientPart]:
    ids = torch.cat([call.inputs[0].reshape(len(call.gradient), -1) for call in calls], dim=1)
    outputs = torch.cat([wide(call.gradient).reshape(len(ids), -1, layer.embedding_dim) for call in calls], dim=1)
    if layer.padding_idx is not None:
        outputs = torch.where((ids == layer.padding_idx)[:, :, None], 0.0, outputs)
    return [Lookup("weight", ids, outputs, layer.num_embeddings)]


def _normalisation(
    layer: nn.GroupNorm | nn.LayerNorm | nn.RMSNorm, trainable: dict[str, nn.Parameter], calls: Sequence[Call]
) -> list[GradientPart]:
    parts: list[GradientPart] = []
    if "weight" in trainable:
        scaled = [wide(call.gradient) * _normalised(layer, wide(call.inputs[0])) for call in calls]
        parts.append(Rows("weight", sum(_per_feature(layer, value) for value in scaled)))  # type: ignore[arg-type]
    if "bias" in trainable:
        shifts = [_per_feature(layer, wide(call.gradient)) for call in calls]
        parts.append(Rows("bias", sum(shifts)))  # type: ignore[arg-type]  # there is at least one call
    return parts


def _normalised(layer: nn.GroupNorm | nn.LayerNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    if isinstance(layer, nn.GroupNorm):
        return functional.group_norm(x, layer.num_groups, eps=layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    return functional.rms_norm(x, layer.normalized_shape, eps=layer.eps)


def _per_feature(layer: nn.GroupNorm | nn.LayerNorm | nn.RMSNorm, values: Tensor) -> Tensor:
    """Sum over everything but the row and the features that have a weight each."""
    if isinstance(layer, nn.GroupNorm):
        return values.flatten(2).sum(dim=2) if values.ndim > 2 else values
    features = len(layer.normalized_shape)
    between = tuple(range(1, values.ndim - features))
    return values.sum(dim=between) if between else values


def _generic(layer: nn.Module, trainable: dict[str, nn.Parameter], calls: Sequence[Call]) -> GradientPart:
    """Any layer, row by row: the gradient of its forward function, vectorised over the rows."""
    values = {name: parameter.detach() for name, parameter in trainable.items()}

    def make(rows: slice) -> dict[str, Tensor]:
        parts = [_vectorised(layer, values, call.rows(rows)) for call in calls]
        return {name: torch.stack([part[name] for part in parts]).sum(dim=0) for name in values}

    numbers = sum(value.numel() for value in values.values())
    return Blocks(make, len(calls[0].gradient), numbers)


def _vectorised(layer: nn.Module, values: dict[str, Tensor], call: Call) -> dict[str, Tensor]:
    n = len(call.gradient)
    mapped = [isinstance(value, Tensor) and _by_row(value, n) for value in call.inputs]

    def of_one(inputs: tuple[Any, ...], gradient: Tensor) -> dict[str, Tensor]:
        row = tuple(v.unsqueeze(0) if by_row else v for v, by_row in zip(inputs, mapped, strict=True))

        def run(parameters: dict[str, Tensor]) -> Tensor:
            output: Tensor = torch.func.functional_call(layer, parameters, row)
            return output.squeeze(0)

        pull_back: Any = torch.func.vjp(run, values)[1]
        pulled: dict[str, Tensor] = pull_back(gradient)[0]
        return pulled

    axes = tuple(0 if by_row else None for by_row in mapped)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        gradients: dict[str, Tensor] = torch.func.vmap(of_one, in_dims=(axes, 0))(call.inputs, call.gradient)
    return {name: wide(gradient) for name, gradient in gradients.items()}


def _by_row(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == n
