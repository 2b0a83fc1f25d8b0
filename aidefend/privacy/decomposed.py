"""Attention and recurrent layers taken apart while a private pass runs, so that each of their products is seen.

Their kernels hide what each weight was multiplied with. The forms here compute the same outputs from the same
parameters, one product at a time, and hand every product to `multiply`, which remembers it. Gradients of the parameters
then follow as those of linear layers do. The kernel itself runs whenever no batch is open.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from aidefend._core.errors import AidefendError
from aidefend.privacy.step_book import refused


class Product(NamedTuple):
    """x @ weight[rows].T + bias[rows]: the names of two parameters of a layer, and the rows of them in use."""

    weight: str
    bias: str | None = None
    rows: tuple[int, int] | None = None  # of the weight
    bias_rows: tuple[int, int] | None = None


Multiply = Callable[[Product, Tensor], Tensor]
Form = Callable[..., Any]


def form_of(layer: nn.Module) -> Form | None:
    """The form `(layer, multiply, *arguments)` that takes a layer apart; None for one that needs none.

    A subclass may compute something else: it has no form here.
    """
    return _FORMS.get(type(layer))


def product_of(layer: nn.Module, product: Product, x: Tensor) -> Tensor:
    """The product itself."""
    weight = _rows(getattr(layer, product.weight), product.rows)
    bias = None if product.bias is None else _rows(getattr(layer, product.bias), product.bias_rows)
    return functional.linear(x, weight, bias)


def _rows(parameter: Tensor, rows: tuple[int, int] | None) -> Tensor:
    return parameter if rows is None else parameter[slice(*rows)]


def attention(
    layer: nn.MultiheadAttention,
    multiply: Multiply,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`nn.MultiheadAttention.forward`."""
    _check_batched(query, 3, "query")
    if not layer.batch_first:
        query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    q, k, v = (_heads(layer, multiply(p, x)) for p, x in zip(_projections(layer), (query, key, value), strict=True))
    if is_causal and attn_mask is None:
        attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    mask = _joint_mask(q, k, attn_mask, key_padding_mask)
    dropout = layer.dropout if layer.training else 0.0
    weights = None
    if need_weights:
        scores = q @ k.mT / math.sqrt(q.shape[3])
        weights = functional.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
        mixed = weights @ v
    else:
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    output = layer.out_proj(mixed.transpose(1, 2).flatten(2))
    if weights is not None and average_attn_weights:
        weights = weights.mean(dim=1)
    return output if layer.batch_first else output.transpose(0, 1), weights


def _projections(layer: nn.MultiheadAttention) -> list[Product]:
    width = layer.embed_dim
    bias = None if layer.in_proj_bias is None else "in_proj_bias"
    thirds = [(index * width, (index + 1) * width) for index in range(3)]
    if layer.in_proj_weight is not None:
        return [Product("in_proj_weight", bias, third, third) for third in thirds]
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return [Product(name, bias, None, third) for name, third in zip(names, thirds, strict=True)]


def _heads(layer: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """(n, positions, width) as (n, heads, positions, width of a head)."""
    heads: Tensor = x.unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
    return heads


def _joint_mask(q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """Both masks as numbers that are added to the scores, (n or 1, heads or 1, positions, keys)."""
    joint: Tensor | None = None
    if attn_mask is not None:
        added = _added(attn_mask, q)
        joint = added if added.ndim == 2 else added.reshape(len(q), -1, q.shape[2], k.shape[2])
    if padding is not None:
        hidden = _added(padding, q)[:, None, None, :]
        joint = hidden if joint is None else joint + hidden
    return joint


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -math.inf)


def recurrent(layer: Any, multiply: Multiply, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
    """`forward` of `nn.RNN`, `nn.LSTM` and `nn.GRU`, on batches of sequences of one length."""
    _check_batched(x, 3, "input")
    sequence = x if layer.batch_first else x.transpose(0, 1)
    starts = _start_states(layer, sequence, hx)
    ends: list[tuple[Tensor, ...]] = []
    for depth in range(layer.num_layers):
        sides = []
        for reverse in (False, True)[: 2 if layer.bidirectional else 1]:
            outputs, end = _one_direction(layer, multiply, sequence, starts[len(ends)], depth, reverse)
            sides.append(outputs)
            ends.append(end)
        sequence = torch.cat(sides, dim=2)
        if layer.dropout and depth < layer.num_layers - 1:
            sequence = functional.dropout(sequence, layer.dropout, layer.training)
    last = tuple(torch.stack(states) for states in zip(*ends, strict=True))
    output = sequence if layer.batch_first else sequence.transpose(0, 1)
    return output, last if isinstance(layer, nn.LSTM) else last[0]


def _one_direction(
    layer: Any, multiply: Multiply, sequence: Tensor, state: tuple[Tensor, ...], depth: int, reverse: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    suffix = f"_l{depth}{'_reverse' if reverse else ''}"
    biases = (f"bias_ih{suffix}", f"bias_hh{suffix}") if layer.bias else (None, None)
    given = multiply(Product(f"weight_ih{suffix}", biases[0]), sequence)
    again = Product(f"weight_hh{suffix}", biases[1])
    outputs = []
    moments = range(sequence.shape[1])
    for moment in reversed(moments) if reverse else moments:
        state = _next_state(layer, given[:, moment], multiply(again, state[0]), state)
        if layer.proj_size:
            state = (multiply(Product(f"weight_hr{suffix}"), state[0]), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs, dim=1), state


def one_step(layer: Any, multiply: Multiply, x: Tensor, hx: Any = None) -> Any:
    """`forward` of `nn.RNNCell`, `nn.LSTMCell` and `nn.GRUCell`."""
    _check_batched(x, 2, "input")
    zeros = x.new_zeros(len(x), layer.hidden_size)
    of_two = isinstance(layer, nn.LSTMCell)
    state = ((zeros, zeros) if of_two else (zeros,)) if hx is None else (tuple(hx) if of_two else (hx,))
    biases = ("bias_ih", "bias_hh") if layer.bias else (None, None)
    given = multiply(Product("weight_ih", biases[0]), x)
    found = _next_state(layer, given, multiply(Product("weight_hh", biases[1]), state[0]), state)
    return found if of_two else found[0]


def _next_state(layer: Any, given: Tensor, again: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if isinstance(layer, nn.LSTM | nn.LSTMCell):
        enter, keep, new, leave = (given + again).chunk(4, dim=1)
        cell = torch.sigmoid(keep) * state[1] + torch.sigmoid(enter) * torch.tanh(new)
        return torch.sigmoid(leave) * torch.tanh(cell), cell
    if isinstance(layer, nn.GRU | nn.GRUCell):
        reset_given, update_given, new_given = given.chunk(3, dim=1)
        reset_again, update_again, new_again = again.chunk(3, dim=1)
        reset, update = torch.sigmoid(reset_given + reset_again), torch.sigmoid(update_given + update_again)
        new = torch.tanh(new_given + reset * new_again)
        return ((1 - update) * new + update * state[0],)
    return (torch.relu(given + again) if layer.nonlinearity == "relu" else torch.tanh(given + again),)


def _start_states(layer: Any, sequence: Tensor, hx: Any) -> list[tuple[Tensor, ...]]:
    """For each layer and direction its (h,) or (h, c)."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 2 if isinstance(layer, nn.LSTM) else 1]
    if hx is None:
        zeros = tuple(sequence.new_zeros(len(sequence), width) for width in widths)
        return [zeros] * count
    given = hx if isinstance(layer, nn.LSTM) else (hx,)
    return [tuple(states) for states in zip(*given, strict=True)]


def _check_batched(x: Any, dimensions: int, name: str) -> None:
    if not isinstance(x, Tensor) or x.ndim != dimensions:
        raise _unbatched(x, dimensions, name)


def _unbatched(x: Any, dimensions: int, name: str) -> AidefendError:
    cure = "Pass padded batches (N, ...), no PackedSequence and no single sequence: rows are told apart by position"
    found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
    return refused(f"a batch of {dimensions} dimensions for the attention or recurrent layer", name, found, cure)


_FORMS: dict[type, Form] = {
    nn.MultiheadAttention: attention,
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU), recurrent),
    **dict.fromkeys((nn.RNNCell, nn.LSTMCell, nn.GRUCell), one_step),
}
