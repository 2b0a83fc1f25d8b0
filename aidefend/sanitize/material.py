"""What a screen is given: arrays, a table, or texts; and how a model is asked about them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aidefend._core.batches import Batch, content_ids
from aidefend._core.checks import check_callable, check_tensor, refuse
from aidefend._core.modules import Model
from aidefend._core.naming import columns_of, paired
from aidefend._core.samples import LABEL_KEYS
from aidefend.sanitize.block import LARGEST_CLASS
from aidefend.sanitize.features import Features, Layer, extract_features, predictor, read_samples
from aidefend.sanitize.items import Items
from aidefend.sanitize.mixed_table import MixedTable, encoded, numbers_of, row_text
from aidefend.sanitize.raw_table import RawTable, class_numbers, listed, raw_table, rows_of
from aidefend.sanitize.table_items import Column, TableItems, plain_columns
from aidefend.sanitize.text_encoder import TextEncoder
from aidefend.sanitize.text_items import TextItems
from aidefend.sanitize.texts import TextRows, read_texts, text_ids

_WIDEST_TABLE = 1024  # columns; wider rows are features or pixels, whose values are no statements
Encoder = Callable[[list[str]], Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """The samples of a data set.

    Args:
        samples: Inputs as numbers, with labels; texts are encoded.
        texts: The texts, or None.
        encoder: What made numbers of them.
        given: Whether the user gave the encoder: then models read its numbers, and not texts.
        names: Names of the columns of a table.
        table: The table with categories or gaps, or None.
        classes: Names of the classes in order, where labels were words, or numbers above LARGEST_CLASS, and the data do
            not say their order.
        columns: Of texts: the names of their columns, where somebody said them.
    """

    samples: Batch
    texts: tuple[str, ...] | None = None
    encoder: Encoder | None = None
    given: bool = False
    names: tuple[str, ...] | None = None
    table: MixedTable | None = None
    classes: tuple[str, ...] | None = None
    columns: dict[str, Any] | None = None

    @property
    def kind(self) -> str:
        """One of "text", "mixed" (a table with categories or gaps), "table", "array"."""
        if self.texts is not None:
            return "text"
        if self.table is not None:
            return "mixed"
        return "table" if self.samples.x.ndim == 2 and self.samples.x.shape[1] <= _WIDEST_TABLE else "array"

    def told(self, dataset: Any) -> dict[str, Any] | None:
        """What has to be known to find the same columns and classes in a batch."""
        if self.table is not None:
            return self.table.told()
        if self.columns is not None:
            return self.columns if any(self.columns.values()) else None
        told = columns_of(dataset)
        if self.classes is not None:
            return {"inputs": None, "label": None, **(told or {}), "classes": list(self.classes)}
        return told

    def asked(self, model: Model | None, layer: Layer | None) -> tuple[Model | None, Layer | None]:
        """A user's model of a table with categories behind its numbers, and its layer by the name that it then has."""
        if self.table is None or model is None:
            return model, layer
        return behind_numbers(model, self.table.decoded), _layer_behind(model, layer)

    def features(self, model: Model, layer: Layer | None, own: bool) -> Features:
        """Features of all samples; a user's model of texts reads texts."""
        if self.texts is None or own or self.given:
            return dataclasses.replace(extract_features(self.samples, model, layer), texts=self.texts)
        handles = torch.arange(len(self.texts)).unsqueeze(1)
        asked = _on_texts(model, self.texts)
        found = extract_features(self.samples._replace(x=handles), asked, _layer_behind(model, layer))
        return dataclasses.replace(found, x=self.samples.x, texts=self.texts)

    def items(self, found: Features, model: Model, own: bool, seed: int) -> Items | None:
        """What the usable rows hold that could have been written there; None for arrays."""
        if self.texts is not None:
            kept = [text for text, usable in zip(self.texts, found.usable.tolist(), strict=True) if usable]
            return TextItems(kept, self._reader(model, own), seed)
        if self.kind == "array":
            return None
        if self.table is not None:
            return TableItems(found.x[found.usable], self.table.columns, predictor(model))
        x = found.x[found.usable]
        return TableItems(x, self._columns(x.shape[1]), predictor(model))

    def _columns(self, width: int) -> tuple[Column, ...]:
        if self.names is None or len(self.names) != width:
            return plain_columns(width)
        return tuple(Column(name, (cell,)) for cell, name in enumerate(self.names))

    def _reader(self, model: Model, own: bool) -> Callable[[list[str]], Tensor]:
        """Predicted classes (n,) of texts."""
        encoder = self.encoder
        if encoder is not None and (own or self.given):
            return lambda texts: predictor(model)(_encoded(encoder, texts))
        return lambda texts: predictor(_on_texts(model, texts))(torch.arange(len(texts)).unsqueeze(1))


def behind_numbers(model: Model, decoded: Callable[[Tensor], Any]) -> Model:
    """A model that reads something else, asked with numbers: `decoded` makes of a batch of them what it reads."""
    return _BehindNumbers(model, decoded) if isinstance(model, nn.Module) else lambda x: model(decoded(x))


class _BehindNumbers(nn.Module):
    def __init__(self, model: nn.Module, decoded: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.decoded = model, decoded

    def forward(self, x: Tensor) -> Any:
        return self.model(self.decoded(x))


def _layer_behind(model: Model, layer: Layer | None) -> Layer | None:
    """The layer of a model by the name that it has behind numbers."""
    return f"model.{layer}" if isinstance(layer, str) and isinstance(model, nn.Module) else layer


def _on_texts(model: Model, texts: Sequence[str]) -> Model:
    """The model of texts behind numbers: row i of the input names text i."""
    return behind_numbers(model, lambda handles: [texts[int(handle)] for handle in handles.flatten().tolist()])


def read_material(dataset: Any, encoder: Encoder | None = None) -> Material:
    """Texts with labels, or whatever `read_samples` reads.

    Raises: ConfigurationError: see `read_samples` and `read_texts`; an encoder for what is no text.
    """
    if encoder is not None:
        check_callable(encoder, "encoder", "Pass a function from a list of texts to a tensor (N, d)")
    written, dataset = read_texts(dataset)
    if written is not None:
        return _of_texts(written, encoder)
    if encoder is not None:
        raise refuse("texts where an encoder is given", "dataset", type(dataset).__name__, "Pass (texts, labels)")
    raw = raw_table(dataset)
    if raw is not None and _is_mixed(raw):
        return _mixed(encoded(raw))
    told = (columns_of(dataset) or {}).get("inputs")
    names = tuple(told) if isinstance(told, list | tuple) else _names_of(dataset)
    rows, classes = with_class_numbers(dataset)
    samples = read_samples(rows)
    if classes is None:
        samples, classes = _renumbered(samples)
    return Material(samples, names=names, classes=classes)


def _renumbered(samples: Batch) -> tuple[Batch, tuple[str, ...] | None]:
    """Labels above LARGEST_CLASS, such as keys of a database, as class numbers in their order, and their names."""
    labels = samples.y
    if labels is None or int(labels.max()) <= LARGEST_CLASS:
        return samples, None
    names, numbers = labels.unique(return_inverse=True)
    broken = {row for row, _ in samples.broken}
    good = [row for row in range(len(labels)) if row not in broken]
    ids = list(samples.ids)
    for row, row_id in zip(good, content_ids(samples.x[good], numbers[good]), strict=True):
        ids[row] = row_id
    return samples._replace(ids=tuple(ids), y=numbers), tuple(map(str, names.tolist()))


def _of_texts(written: TextRows, encoder: Encoder | None) -> Material:
    texts, labels, classes, broken = written.usable()
    used = TextEncoder() if encoder is None else encoder
    x = _encoded(used, texts)
    x[list(broken)] = torch.nan
    samples = Batch(text_ids(texts, labels, broken), x, labels, tuple(sorted(broken.items())))
    told = {"inputs": written.inputs, "label": written.label, "classes": None if classes is None else list(classes)}
    return Material(samples, tuple(texts), used, encoder is not None, classes=classes, columns=told)


def _is_mixed(raw: RawTable) -> bool:
    """Whether a table holds more than numbers: categories, bools beside them, gaps, or labels in words."""
    numbers = [None if name in raw.declared else numbers_of(raw.columns[name]) for name in raw.inputs]
    plain = all(
        column is not None or np.asarray(raw.columns[name]).dtype.kind == "b"
        for name, column in zip(raw.inputs, numbers, strict=True)
    )
    words = (
        raw.label is not None and raw.classes is None and class_numbers(listed(raw.columns[raw.label]))[1] is not None
    )
    return not plain or words or any(column is not None and bool(np.isnan(column).any()) for column in numbers)


def _mixed(table: MixedTable) -> Material:
    names = table.raw.inputs
    broken = {row for row, _ in table.broken}
    texts = [row_text(names, row) for row in rows_of(table.raw.columns, names)]
    ids = text_ids(texts, table.labels, broken)
    return Material(Batch(ids, table.x, table.labels, table.broken), names=names, table=table)


def _names_of(dataset: Any) -> tuple[str, ...] | None:
    names = getattr(dataset, "columns", None) if not isinstance(dataset, Mapping) else list(dataset)
    return None if names is None else tuple(str(name) for name in names if str(name) not in LABEL_KEYS)


def _encoded(encoder: Encoder, texts: list[str]) -> Tensor:
    rows = check_tensor(encoder(texts), "encoder(texts)", ndim=2, floating=True, finite=False, rows=len(texts))
    return rows.detach().float().cpu()


def with_class_numbers(dataset: Any) -> tuple[Any, tuple[str, ...] | None]:
    """A pair (x, y) whose labels are words with numbers in their place, and the names; other data as they are."""
    dataset = paired(dataset)
    if not isinstance(dataset, tuple | list) or len(dataset) != 2 or not isinstance(dataset[0], Tensor | np.ndarray):
        return dataset, None
    numbers, classes = class_numbers(dataset[1])
    return (dataset, None) if classes is None else ((dataset[0], numbers), classes)
