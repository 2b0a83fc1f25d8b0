"""Tensors that an attacker or a careless caller may hand over: every kind that torch can make on a CPU."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Watching(torch.Tensor):
    """A subclass that would run its own code on every use."""

    @classmethod
    def __torch_function__(cls, *_: object) -> object:
        raise AssertionError("code of the input ran")


class Wrapping(torch.Tensor):
    """A subclass below the dispatcher, without any memory."""

    @staticmethod
    def __new__(cls, like: Tensor) -> "Wrapping":
        made: Wrapping = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)  # type: ignore[attr-defined]
        return made

    @classmethod
    def __torch_dispatch__(cls, *_: object) -> object:
        raise AssertionError("code of the input ran")


def _without_memory(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def _with_attributes(x: Tensor) -> Tensor:
    x = x.clone()
    for name in (
        "aminmax",
        "amin",
        "amax",
        "numel",
        "stride",
        "detach",
        "is_conj",
        "is_inference",
        "untyped_storage",
        "view",
    ):
        setattr(x, name, lambda *_: (_ for _ in ()).throw(AssertionError("code of the input ran")))
    return x


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def _nested(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, torch says
        return torch.nested.nested_tensor(list(x.reshape(len(x), -1)))


def _compressed(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beta, torch says
        return x.reshape(len(x), -1).to_sparse_csr()


def _quantised(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, torch says
        return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8)


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "flipped": lambda x: x.flip(0),
    "transposed twice": lambda x: x.transpose(0, -1).clone().transpose(0, -1),
    "every second": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "buffer": lambda x: nn.Buffer(x.clone()),
    "in inference mode": _inference,
    "attributes that shadow methods": _with_attributes,
    "shared memory with numpy": lambda x: torch.from_numpy(x.numpy().copy()),
}

HOSTILE: dict[str, Callable[[Tensor], object]] = {
    "watching subclass": lambda x: x.as_subclass(Watching),
    "wrapping subclass": Wrapping,
    "parameter": nn.Parameter,
    "requires grad": lambda x: x.clone().requires_grad_(),
    "has a graph": lambda x: x.clone().requires_grad_() * 2,
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "compressed sparse": _compressed,
    "nested": _nested,
    "quantised": _quantised,
    "complex": lambda x: x.to(torch.complex64),
    "conjugate": lambda x: torch.complex(x, x).conj(),
    "negative view": lambda x: torch.complex(x, x).conj().imag,
    "stride 0": lambda x: x[:1].expand(x.shape) if len(x) > 1 else x[:, :1].expand(len(x), 2),
    "giant": lambda x: torch.zeros(1).expand(2**40, *x.shape[1:]),
    "giant row": lambda x: torch.zeros(1).expand(len(x), 2**50),
    "overlapping": lambda x: torch.zeros(4 * x.numel()).as_strided(x.shape, [1] * x.ndim),
    "without memory": _without_memory,
    "other dtype": lambda x: x.to(torch.float8_e5m2),
    "double": lambda x: x.double(),
    "bits": lambda x: torch.zeros(x.shape, dtype=torch.uint8).view(torch.uint16) if x.shape[-1] % 2 == 0 else x.bool(),
    "scalar": lambda x: torch.tensor(1.0),
    "no columns": lambda x: x[..., :0],
    "one dimension more": lambda x: x[None],
    "many dimensions": lambda x: x.reshape(*x.shape, *[1] * 40),
    "list": lambda x: x.tolist(),
    "array": lambda x: x.numpy(),
    "nothing": lambda x: None,
    "a class": lambda x: torch.Tensor,
}
