"""What a tensor's header tells before one of its numbers is read: kind, layout, size and memory."""

import torch
from torch import Tensor

MOST_ROWS = 2**24  # a stride-0 tensor may claim any number of rows; verdicts on it must stay small


def kind_fault(x: object) -> str | None:
    """Why x is no plain dense tensor with numbers behind it, or None."""
    if type(x) is not Tensor:  # a subclass may run its own code on every access
        return "input: not a plain tensor"
    if x.is_nested or x.layout != torch.strided or x.is_quantized or x.is_meta:
        return "input: not a dense tensor"
    # by the class, since an attribute that was set on x could stand for its method
    if Tensor.is_conj(x) or Tensor.is_neg(x):  # the numbers in memory are not the numbers of the tensor
        return "input: a conjugate or negative view"
    return "input: requires grad" if x.requires_grad else None


def memory_fault(x: Tensor) -> str | None:
    """Why the memory of a dense tensor cannot be what it claims, or None."""
    count = x.numel()
    if not count:  # its strides say nothing
        return None
    reach = count - 1 if x.is_contiguous() else _reach(x)
    if reach is None:
        return "input: overlapping memory"
    needed = (x.storage_offset() + reach + 1) * x.element_size()
    return "input: memory is missing" if x.untyped_storage().nbytes() < needed else None


def _reach(x: Tensor) -> int | None:
    """How many elements the last one lies behind the first; None for stride 0, and where overlap cannot be excluded."""
    strides = sorted((abs(stride), size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    reach = 0
    for stride, size in strides:
        if stride <= reach:
            return None
        reach += stride * (size - 1)
    return reach


def count_rows(x: object) -> int:
    """N of a plain tensor (N, ...), at most MOST_ROWS; 1 for anything else, so that nothing refused counts as empty."""
    try:
        return min(len(x), MOST_ROWS) if type(x) is Tensor and x.ndim else 1
    except Exception:
        return 1
