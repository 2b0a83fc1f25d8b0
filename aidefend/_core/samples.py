"""What a sample is: which of its columns is the input, which the label, and how both become numbers."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aidefend._core.checks import check_callable, check_items, refuse

INPUT_KEYS = ("x", "image", "images", "input", "inputs", "features", "pixel_values", "data")
LABEL_KEYS = ("y", "label", "labels", "target", "targets")
_FILES = ("jpg", "jpeg", "png", "webp", "npy", "pth")  # how WebDataset names an input, by the ending of its file
_FILE_LABELS = ("cls",)


class Columns(dict[str, Any]):
    """Columns of a table: where none of them is called like an input, all but the labels are."""


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Any source of samples together with the names of its columns; goes wherever data goes.

    Without it names are guessed: an input column is called x, image, images, input, inputs, features, pixel_values or
    data, a label column y, label, labels, target or targets; of a table without such an input column all other columns
    are the input; samples with the entry `__key__` may hold jpg, jpeg, png, webp, npy or pth, and cls.

    Args:
        data: Samples as dicts (or tables: DataFrame, arrow, Parquet, Hugging Face), or as (x, y) or (key, x, y); or
            inputs and labels apart, such as (DataFrame, Series): rows by position, and an index has to be the same.
        inputs: Name of the input column, or names of columns with one number a row each: they become one row of
            float32, in the order given (what float32 cannot tell apart is then one row). None: as above.
        label: Name of the label column. None: as above.
        decode: From the raw input of one sample (bytes, a PIL image, a path) to a tensor or array. What it raises is
            the fault of that sample, not of the stream.
        classes: All labels in order, where they are no class indices: label i is `classes[i]`.
    Raises: ConfigurationError: names that are no texts, labels that repeat.

    Example:
        >>> from aidefend._core.batches import gather
        >>> people = {"age": [31.0, 64.0], "height": [1.7, 1.8], "vote": ["no", "yes"]}
        >>> gather(Samples(people, inputs=["age", "height"], label="vote", classes=["no", "yes"])).y
        tensor([0, 1])
    """

    data: Any
    inputs: str | Sequence[str] | None = None
    label: str | None = None
    decode: Callable[[Any], Any] | None = None
    classes: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.data, Samples):
            raise refuse("data that is no Samples already", "data", "Samples", "Wrap it once, with all names")
        if self.inputs is not None and not isinstance(self.inputs, str):
            names = check_items(self.inputs, str, "inputs", "Pass the name of a column, or a list of names")
            if not names or len(set(names)) != len(names):
                raise refuse("inputs to name columns, each once", "inputs", names, "Pass a list of column names")
            object.__setattr__(self, "inputs", tuple(names))
        if self.label is not None and not isinstance(self.label, str):
            raise refuse("label to be the name of a column", "label", self.label, "Pass a text")
        if self.decode is not None:
            check_callable(self.decode, "decode", "Pass a function from the raw input of a sample to a tensor")
        if self.classes is not None:
            kinds = (str, int, np.str_, np.integer)
            classes = tuple(check_items(self.classes, kinds, "classes", "Pass all labels in order"))
            if len(set(classes)) != len(classes) or not classes:
                raise refuse("classes to list each label once", "classes", classes, "Remove what stands twice")
            object.__setattr__(self, "classes", classes)

    def pick(self, sample: Any) -> tuple[Any, Any]:
        """(raw inputs, raw labels or None) of a sample or of a batch, by position or by name."""
        if isinstance(sample, Mapping):
            return self._named(sample)
        if isinstance(sample, tuple | list):
            if len(sample) in (2, 3) and isinstance(sample[0], str) and not isinstance(sample[1], str):
                sample = sample[1:]  # (key, x) or (key, x, y), as WebDataset makes them
            if len(sample) not in (1, 2):
                raise refuse("samples of the form x or (x, y)", "data", f"{len(sample)} parts", "Return (x, y)")
            return sample[0], sample[1] if len(sample) == 2 else None
        return sample, None

    def columns_in(self, names: Collection[Any]) -> tuple[list[str], str | None]:
        """Names of the input columns and of the label column among those that there are; the label may be missing.

        Raises: ConfigurationError: no input column, or one that was named is not there.
        """
        web = "__key__" in names
        inputs, label = self.inputs, self.label
        if label is None:
            label = next((key for key in LABEL_KEYS + _FILE_LABELS * web if key in names), None)
        if inputs is None and isinstance(names, Columns):
            inputs = table_inputs(widths(names), label)
        elif inputs is None:
            inputs = next((key for key in INPUT_KEYS + _FILES * web if key in names), None)
        if inputs is None:
            cure = "Name the input column so, or say Samples(data, inputs=...)"
            raise refuse(f"a key among {INPUT_KEYS}", "data", sorted(map(str, names)), cure)
        wanted = [inputs] if isinstance(inputs, str) else list(inputs)
        absent = [name for name in [*wanted, *([] if label is None else [label])] if name not in names]
        if absent:
            raise refuse(f"the columns {absent}", "data", sorted(map(str, names)), "Name columns that there are")
        return wanted, label

    def _named(self, sample: Mapping[Any, Any]) -> tuple[Any, Any]:
        inputs, label = self.columns_in(sample)
        single = isinstance(self.inputs, str) or (len(inputs) == 1 and inputs[0] in INPUT_KEYS + _FILES)
        x = sample[inputs[0]] if single else side_by_side([sample[name] for name in inputs])
        return x, None if label is None else sample[label]

    def input_of(self, raw: Any) -> Tensor:
        """One decoded input, or a batch of inputs that need no decoding, as a tensor."""
        return tensor_of(raw if self.decode is None else self.decode(raw))

    def labels_of(self, raw: Any, n: int) -> Tensor:
        """Class indices (n,) int64 from indices, one-hot rows, or names of classes."""
        if self.classes is None:
            if n and not isinstance(raw, Tensor) and isinstance(next(iter(raw), None), str | bytes):
                cure = "Name all labels in order: Samples(data, classes=[...])"
                raise refuse("labels as class indices", "y", next(iter(raw)), cure)
            return class_indices(tensor_of(raw), n)
        place = {str(label): i for i, label in enumerate(self.classes)}
        given = raw.tolist() if hasattr(raw, "tolist") else list(raw)
        unknown = next((label for label in given if _text(label) not in place), None)
        if unknown is not None or len(given) != n:
            found = unknown if len(given) == n else f"{len(given)} labels"
            raise refuse(f"{n} labels among {list(self.classes)[:20]}", "y", found, "Add what is missing to classes=")
        return torch.tensor([place[_text(label)] for label in given], dtype=torch.int64)


def table_inputs(columns: Mapping[str, bool], label: str | None) -> str | tuple[str, ...]:
    """The input columns of a table, given which columns hold more than one number a row."""
    arrays = [name for name in INPUT_KEYS if columns.get(name)]
    others = tuple(name for name in columns if name != label)
    if not others:
        raise refuse("a table with an input column", "data", list(columns), "Pass a table with more than its labels")
    return arrays[0] if arrays else others


def widths(columns: Columns) -> dict[str, bool]:
    """Whether each column holds more than one number a row, by its first entry."""
    return {name: len(values) > 0 and _many(values[0]) for name, values in columns.items()}


def _many(value: Any) -> bool:
    return isinstance(value, bytes | Mapping) or np.ndim(value) > 0


def _text(label: Any) -> str:
    """The name of a class as text; `.cls` files hold bytes."""
    return label.decode("utf-8", "replace").strip() if isinstance(label, bytes) else str(label)


def side_by_side(columns: Sequence[Any]) -> "np.ndarray[Any, Any]":
    """Columns (n,) of numbers as rows (n, d) float32, or d numbers as one row (d,); missing entries are NaN."""
    arrays = [np.asarray(column) for column in columns]
    if any(array.dtype.kind == "O" for array in arrays):
        arrays = [_numbers(array) for array in arrays]
    if any(array.dtype.kind not in "biuf" for array in arrays):
        kinds = sorted({str(array.dtype) for array in arrays if array.dtype.kind not in "biuf"})
        cure = "Leave them out of inputs=, or turn them into numbers first"
        raise refuse("input columns of numbers", "data", f"columns of {kinds}", cure)
    with np.errstate(over="ignore"):
        found: np.ndarray[Any, Any] = np.stack(arrays, axis=-1).astype(np.float32)
    return found


def _numbers(values: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """A column of anything as float64, NaN where nothing stands; as it is where it holds something else."""
    try:
        numbers = np.array([_number(value) for value in values.ravel()], dtype=np.float64)
    except (TypeError, ValueError):
        return values
    return np.reshape(numbers, values.shape)


def _number(value: Any) -> float:
    return float("nan") if value is None or type(value).__name__ in ("NAType", "NaTType") else float(value)


def class_indices(y: Tensor, n: int) -> Tensor:
    """Class indices (N,) int64 from indices or from one-hot rows."""
    if y.ndim == 0 or len(y) != n:
        raise refuse(f"{n} labels", "y", y, "Pass one label for each sample")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 2 and bool(((y == 0) | (y == 1)).all()) and bool((y.sum(dim=1) == 1).all()):
        y = y.argmax(dim=1)
    if y.ndim != 1 or y.is_complex() or (y.is_floating_point() and not bool((y == y.round()).all())):
        raise refuse("labels as class indices (N,) or one-hot rows", "y", y, "Convert the labels to integers")
    return y.long()


def tensor_of(value: Any) -> Tensor:
    """A dense tensor, detached, from a tensor or from anything numpy reads as numbers."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta:
            raise refuse("dense tensors", "data", value, "Convert them with .to_dense() first")
        return value.detach()
    try:
        return torch.from_numpy(_array(value))
    except (TypeError, ValueError) as error:
        rule = "numbers that fit a tensor"
        cure = "Convert the samples to tensors first, or say how in Samples(data, decode=...)"
        raise refuse(rule, "data", type(value).__name__, cure) from error


def _array(value: Any) -> "np.ndarray[Any, Any]":
    array = np.ascontiguousarray(value)
    if array.dtype.kind == "O":  # a column of arrays, as pandas and arrow hold them
        array = np.stack([np.asarray(row) for row in array])
        if array.dtype.kind == "O":
            array = np.array(array.tolist())
    return array if array.flags.writeable else array.copy()
