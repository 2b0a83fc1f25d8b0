"""The operations that bounds can pass through: each as an interval forward and as a linear form backward."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.grad import conv1d_input, conv2d_input

from aidefend._core.checks import refuse
from aidefend._core.errors import IncompatibleModel


@dataclasses.dataclass(frozen=True)
class Box:
    """Lower and upper values (N, ...) of one tensor of the net; `clean` beside them where a training pass wants it."""

    lower: Tensor
    upper: Tensor
    clean: Tensor | None = None

    @property
    def middle(self) -> Tensor:
        """Centre of the box."""
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        """Half its width."""
        return (self.upper - self.lower) / 2

    @property
    def size(self) -> Tensor:
        """The largest absolute value."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def raised(self, function: Callable[[Tensor], Tensor]) -> "Box":
        """The box behind a function that rises in every value: each end on its own."""
        return Box(function(self.lower), function(self.upper), None if self.clean is None else function(self.clean))

    def scaled(self, factor: Tensor, shift: Tensor) -> "Box":
        """The box behind x * factor + shift."""
        middle, radius = self.middle * factor + shift, self.radius * factor.abs()
        return Box(middle - radius, middle + radius, None if self.clean is None else self.clean * factor + shift)


class Operation(Protocol):
    """One step of the net. `affine` ones are exact in both directions, up to the rounding of the model's own dtype."""

    affine: bool

    def forward(self, boxes: Sequence[Box]) -> Box:
        """The box of the output, in exact arithmetic."""
        ...

    def back(self, form: Tensor, boxes: Sequence[Box]) -> tuple[list[Tensor], Tensor]:
        """A lower bound of form * output: forms (N, S, ...) over the inputs, and what is constant, (N, S)."""
        ...

    def rounding(self, boxes: Sequence[Box], unit: float) -> Tensor | None:
        """Largest error of the output as the model computes it with unit roundoff `unit`; None: it is exact."""
        ...


class Weighted:
    """Linear and convolution: y = W x + b, weights read from the live module."""

    affine = True

    def __init__(self, module: Any) -> None:
        self.module = module

    def forward(self, boxes: Sequence[Box]) -> Box:
        """Centre through W, radius through |W|."""
        box = boxes[0]
        middle, radius = self._apply(box.middle, bias=True), self._apply(box.radius, absolute=True)
        clean = None if box.clean is None else self._apply(box.clean, bias=True)
        return Box(middle - radius, middle + radius, clean)

    def back(self, form: Tensor, boxes: Sequence[Box]) -> tuple[list[Tensor], Tensor]:
        """The form through the transpose of W."""
        x, weight = boxes[0].lower, self._weight(form)
        bias: Tensor | None = getattr(self.module, "bias", None)
        constant = form.new_zeros(form.shape[:2])
        if bias is not None:
            shape = (1, 1, -1) if isinstance(self.module, nn.Linear) else (1, 1, -1, *[1] * (form.ndim - 3))
            constant = (form * bias.to(form).reshape(shape)).flatten(2).sum(dim=2)
        if isinstance(self.module, nn.Linear):
            return [form @ weight], constant
        rows = form.flatten(0, 1)
        give = conv2d_input if isinstance(self.module, nn.Conv2d) else conv1d_input
        m = self.module
        size = (len(rows), *x.shape[1:])
        inner: Tensor = give(size, weight, rows, m.stride, m.padding, m.dilation, m.groups)  # type: ignore[no-untyped-call]
        return [inner.reshape(*form.shape[:2], *x.shape[1:])], constant

    def rounding(self, boxes: Sequence[Box], unit: float) -> Tensor | None:
        """The bound of a dot product in any order: gamma of the fan-in times |W| |x| + |b|."""
        count = self._weight(boxes[0].lower)[0].numel() + 2
        return gamma(count, unit) * self._apply(boxes[0].size, bias=True, absolute=True)

    def _weight(self, like: Tensor) -> Tensor:
        weight: Tensor = self.module.weight.to(like)
        return weight

    def _apply(self, x: Tensor, *, bias: bool = False, absolute: bool = False) -> Tensor:
        weight, own = self._weight(x), self.module.bias if bias else None
        shift = None if own is None else own.to(x)
        if absolute:
            weight, shift = weight.abs(), None if shift is None else shift.abs()
        if isinstance(self.module, nn.Linear):
            return nn.functional.linear(x, weight, shift)
        m = self.module
        convolve = nn.functional.conv2d if isinstance(m, nn.Conv2d) else nn.functional.conv1d
        found: Tensor = convolve(x, weight, shift, m.stride, m.padding, m.dilation, m.groups)
        return found


class Normalised:
    """BatchNorm: with its running statistics in eval mode, with those of the clean batch in train mode.

    Nothing is updated here: the clean pass of the model itself does that.
    """

    affine = True

    def __init__(self, module: nn.modules.batchnorm._BatchNorm) -> None:
        self.module = module
        self._training: tuple[Tensor, Tensor] | None = None

    def forward(self, boxes: Sequence[Box]) -> Box:
        """A factor and a shift by channel; the factor's sign says which end is which."""
        return boxes[0].scaled(*self._factor_and_shift(boxes[0]))

    def back(self, form: Tensor, boxes: Sequence[Box]) -> tuple[list[Tensor], Tensor]:
        """The form times the factor."""
        factor, shift = self._kept(boxes[0].lower)
        return [form * factor[:, None]], (form * shift[:, None]).flatten(2).sum(dim=2)

    def rounding(self, boxes: Sequence[Box], unit: float) -> Tensor | None:
        """Some eight roundings of (x - mean) / deviation * weight + bias."""
        factor, shift = self._kept(boxes[0].lower)
        mean = self.module.running_mean
        centre = 0 if mean is None else mean.to(factor).abs().reshape(factor.shape) * factor.abs()
        return gamma(8, unit) * (boxes[0].size * factor.abs() + shift.abs() + 2 * centre)

    def _factor_and_shift(self, box: Box) -> tuple[Tensor, Tensor]:
        module, x = self.module, box.lower
        if not module.training and module.running_mean is not None:
            self._training = None
            return self._of(module.running_mean, module.running_var, x)  # type: ignore[arg-type]
        if box.clean is None:
            raise refuse(
                "a clean pass through BatchNorm in train mode", "model", type(module).__name__, "Call model.eval()"
            )
        dims = [0, *range(2, x.ndim)]
        mean, variance = box.clean.mean(dims), box.clean.var(dims, unbiased=False)
        self._training = mean, variance
        return self._of(mean, variance, x)

    def _kept(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = self._training or (self.module.running_mean, self.module.running_var)
        return self._of(mean, variance, x)  # type: ignore[arg-type]

    def _of(self, mean: Tensor, variance: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        factor = (variance.to(x) + self.module.eps).rsqrt()
        if self.module.affine:
            factor = factor * self.module.weight.to(x)
        shift = -mean.to(x) * factor
        if self.module.affine:
            shift = shift + self.module.bias.to(x)
        shape = (1, -1, *[1] * (x.ndim - 2))
        return factor.reshape(shape), shift.reshape(shape)


class Averaged:
    """Average pooling, plain or adaptive: positive weights that sum to at most one."""

    affine = True

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        self.pool = pool

    def forward(self, boxes: Sequence[Box]) -> Box:
        """Each end on its own."""
        return boxes[0].raised(self.pool)

    def back(self, form: Tensor, boxes: Sequence[Box]) -> tuple[list[Tensor], Tensor]:
        """The form through the transpose, by automatic differentiation of the linear map."""
        shape = boxes[0].lower.shape[1:]
        origin = form.new_zeros(form.shape[0] * form.shape[1], *shape).requires_grad_()
        with torch.enable_grad():
            outputs = self.pool(origin)
        inner = torch.autograd.grad(outputs, origin, form.flatten(0, 1), create_graph=form.requires_grad)[0]
        return [inner.reshape(*form.shape[:2], *shape)], form.new_zeros(form.shape[:2])

    def rounding(self, boxes: Sequence[Box], unit: float) -> Tensor | None:
        """The mean of as many values as there can be."""
        size = boxes[0].size
        return gamma(size[0, 0].numel() + 2, unit) * self.pool(size) if size.numel() else None


class Reshaped:
    """Flatten, view, identity, dropout in eval mode: the same values in another shape."""

    affine = True

    def __init__(self, shape: Callable[[Tensor], Tensor]) -> None:
        self.shape = shape

    def forward(self, boxes: Sequence[Box]) -> Box:
        """Each end on its own."""
        return boxes[0].raised(self.shape)

    def back(self, form: Tensor, boxes: Sequence[Box]) -> tuple[list[Tensor], Tensor]:
        """The shape of the input."""
        return [form.reshape(*form.shape[:2], *boxes[0].lower.shape[1:])], form.new_zeros(form.shape[:2])

    def rounding(self, boxes: Sequence[Box], unit: float) -> Tensor | None:
        """None."""
        return None


class Summed:
    """Sum or difference of two tensors of the net, of one shape."""

    affine = True

    def __init__(self, sign: float) -> None:
        self.sign = sign

    def forward(self, boxes: Sequence[Box]) -> Box:
        """Ends add up; those of what is taken off change places."""
        a, b = boxes
        if a.lower.shape != b.lower.shape:
            shapes = f"{tuple(a.lower.shape[1:])} and {tuple(b.lower.shape[1:])}"
            raise IncompatibleModel(f"Expected a model that adds tensors of one shape, got {shapes} for each sample.")
        low, high = (b.lower, b.upper) if self.sign > 0 else (-b.upper, -b.lower)
        clean = None if a.clean is None or b.clean is None else a.clean + self.sign * b.clean
        return Box(a.lower + low, a.upper + high, clean)

    def back(self, form: Tensor, boxes: Sequence[Box]) -> tuple[list[Tensor], Tensor]:
        """The form for both."""
        return [form, self.sign * form], form.new_zeros(form.shape[:2])

    def rounding(self, boxes: Sequence[Box], unit: float) -> Tensor | None:
        """One rounding."""
        return gamma(1, unit) * (boxes[0].size + boxes[1].size)


class Scaled:
    """x * factor + shift with constants that broadcast to one sample."""

    affine = True

    def __init__(self, factor: Callable[[], Tensor | float], shift: Callable[[], Tensor | float]) -> None:
        self.factor, self.shift = factor, shift

    def forward(self, boxes: Sequence[Box]) -> Box:
        """Centre and radius."""
        return boxes[0].scaled(*self._constants(boxes[0].lower))

    def back(self, form: Tensor, boxes: Sequence[Box]) -> tuple[list[Tensor], Tensor]:
        """The form times the factor."""
        factor, shift = self._constants(boxes[0].lower)
        return [form * factor], (form * shift).flatten(2).sum(dim=2)

    def rounding(self, boxes: Sequence[Box], unit: float) -> Tensor | None:
        """One rounding for each of the two, and one of the constant."""
        factor, shift = self._constants(boxes[0].lower)
        return gamma(3, unit) * (boxes[0].size * factor.abs() + shift.abs())

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = like.shape[1:]
        factor, shift = (_of_sample(torch.as_tensor(value()).to(like), shape) for value in (self.factor, self.shift))
        if any(shape != torch.broadcast_shapes(value.shape, shape) for value in (factor, shift)):
            found = f"{tuple(factor.shape)} and {tuple(shift.shape)} beside {tuple(shape)}"
            raise IncompatibleModel(f"Expected constants no larger than one sample, got {found}.")
        return torch.broadcast_to(factor, shape), torch.broadcast_to(shift, shape)


class Bent:
    """ReLU and leaky ReLU: two slopes that meet at zero, 0 <= slope < 1."""

    affine = False

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def forward(self, boxes: Sequence[Box]) -> Box:
        """Each end on its own: the function rises."""
        return boxes[0].raised(self._of)

    def back(self, form: Tensor, boxes: Sequence[Box]) -> tuple[list[Tensor], Tensor]:
        """Below: the steeper slope where the box lies more to the right. Above: the chord."""
        lower, upper = boxes[0].lower, boxes[0].upper
        below = torch.where(upper > -lower, 1.0, self.slope).to(form)
        width = torch.where(upper > lower, upper - lower, 1.0)
        above = (self._of(upper) - self._of(lower)) / width
        below = torch.where(lower >= 0, 1.0, torch.where(upper <= 0, self.slope, below))
        above = torch.where(lower >= 0, 1.0, torch.where(upper <= 0, self.slope, above))
        height = torch.where((lower < 0) & (upper > 0), self._of(upper) - above * upper, 0.0)
        positive, negative = form.clamp(min=0), form.clamp(max=0)
        inner = positive * below[:, None] + negative * above[:, None]
        return [inner], (negative * height[:, None]).flatten(2).sum(dim=2)

    def rounding(self, boxes: Sequence[Box], unit: float) -> Tensor | None:
        """Exact for ReLU, one rounding on the left side of the leaky one."""
        return None if self.slope == 0 else gamma(1, unit) * boxes[0].size * self.slope

    def _of(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(x, self.slope) if self.slope else x.clamp(min=0)


class Rising:
    """Any other rising function: exact as an interval; as a linear form its two ends."""

    affine = False

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def forward(self, boxes: Sequence[Box]) -> Box:
        """Each end on its own."""
        return boxes[0].raised(self.function)

    def back(self, form: Tensor, boxes: Sequence[Box]) -> tuple[list[Tensor], Tensor]:
        """Nothing of the input; the lower end where the form is positive, else the upper one."""
        low, high = self.function(boxes[0].lower)[:, None], self.function(boxes[0].upper)[:, None]
        constant = (form.clamp(min=0) * low + form.clamp(max=0) * high).flatten(2).sum(dim=2)
        return [torch.zeros_like(form)], constant

    def rounding(self, boxes: Sequence[Box], unit: float) -> Tensor | None:
        """Eight units of the largest value: elementary functions are good to a few."""
        ends = [self.function(part).abs() for part in (boxes[0].lower, boxes[0].upper)]
        return gamma(8, unit) * torch.maximum(*ends)


def gamma(count: int, unit: float) -> float:
    """Relative error of `count` roundings in a row, in any order (Higham 2002, section 3.1)."""
    return count * unit / (1 - count * unit) if count * unit < 0.5 else float("inf")


RISING: Mapping[type[nn.Module], Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    nn.Sigmoid: lambda module: torch.sigmoid,
    nn.Tanh: lambda module: torch.tanh,
    nn.Softplus: lambda module: module,
    nn.ReLU6: lambda module: nn.functional.relu6,
    nn.Hardtanh: lambda module: lambda x: nn.functional.hardtanh(x, module.min_val, module.max_val),  # type: ignore[arg-type]
    nn.ELU: lambda module: lambda x: nn.functional.elu(x, module.alpha),  # type: ignore[arg-type]
}


def _of_sample(value: Tensor, shape: Sequence[int]) -> Tensor:
    """A constant of shape (1, C, 1, 1) as one that broadcasts to (C, H, W)."""
    return value[0] if value.ndim == len(shape) + 1 and value.shape[0] == 1 else value
