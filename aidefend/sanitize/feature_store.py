"""Features of a data set of any size on disk: float16, shard by shard, with digests; written in one resumable pass."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from aidefend._core.batches import Batch, iterate
from aidefend._core.checks import check_callable, check_flag, check_int, check_path, check_tensor, refuse
from aidefend._core.modules import Model
from aidefend._core.storage import atomic_path, canonical_json, write_atomic
from aidefend.sanitize.block import LARGEST_CLASS
from aidefend.sanitize.choose import Detector, named_detectors
from aidefend.sanitize.feature_shards import (
    FORMAT,
    INDEX,
    check_shard,
    packed,
    read_index,
    read_shard,
    sha256,
    widened,
    widths,
)
from aidefend.sanitize.features import Features, Layer, check_still, extract_features
from aidefend.sanitize.texts import refuse_texts


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureStore:
    """Features, logits, losses, labels and ids of every sample, in shards of a fixed number of rows.

    A row's features are float16 numbers times a power of two of its own: off by at most 2**-11 of the row's largest
    entry, whatever its size. One shard is in memory at a time.

    Guarantee: `open` refuses a store of which one byte of one shard has changed, or a shard is missing, as long as
        whoever changed it did not write a fitting index, too: sign the folder (`aidefend.artifacts.Manifest`), or keep
        its `digest`, where somebody might. Reading later does not check again.
    Args:
        path: The folder.
        index: What it holds; made by `write` and `open`.

    Example:
        >>> import tempfile
        >>> x, y = torch.rand(10, 4, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 2
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = FeatureStore.write((x, y), nn.Linear(4, 2), folder, shard_rows=4)
        ...     blocks = [block["features"].shape for block in FeatureStore.open(folder).blocks()]
        >>> blocks
        [torch.Size([4, 4]), torch.Size([4, 4]), torch.Size([2, 4])]
    """

    path: Path
    index: Mapping[str, Any]

    def __len__(self) -> int:
        return sum(int(shard["rows"]) for shard in self.index["shards"])

    @property
    def digest(self) -> str:
        """SHA-256 of all that the store holds."""
        return hashlib.sha256(canonical_json(self.index).encode()).hexdigest()

    @classmethod
    def write(
        cls,
        data: Any,
        model: Model,
        path: str | os.PathLike[str],
        layer: Layer | None = None,
        *,
        shard_rows: int = 8192,
        batch_size: int = 512,
        on_batch: Callable[[Batch, Features], Any] | None = None,
    ) -> "FeatureStore":
        """Read the data once, and keep what the model makes of them.

        Run again after a crash it reads the data again, but the model sees only rows of shards that are not there yet.
        A sample that cannot be read, or whose label is above 32,767, gets a row that is not usable; see
        `extract_features` for the rest.

        Args:
            data: Anything that `Samples` takes; of a DataLoader its data set, in its own order.
            model: See `extract_features`.
            layer: See there; features that were computed elsewhere (a tensor) cannot be passed here.
            path: Folder; made where it is missing. It may hold an unfinished store of the same data and settings.
            shard_rows: Rows a shard. Shards do not depend on `batch_size`, except for rounding inside the model.
            batch_size: Rows in memory at once.
            on_batch: Called with each batch and its features (of rows that were there already: as they were stored).
        Raises: ConfigurationError: the folder holds another store, or one of other data or of another model.
        Cost: one forward pass a sample; memory for one batch of inputs and one shard of features, and about 8 bytes a
            row for the ids that were seen; 2 d + 4 K + 70 bytes of disk a row.
        """
        check_int(shard_rows, "shard_rows")
        check_int(batch_size, "batch_size")
        if isinstance(layer, Tensor | np.ndarray):
            raise refuse("layer to be a module, a name or a function", "layer", layer, "Use Features.blocks instead")
        if on_batch is not None:
            check_callable(on_batch, "on_batch", "Pass a function of a batch and its features")
        refuse_texts(data)
        check_still(data)
        folder = _made(path)
        setting = {"format": FORMAT, "shard_rows": shard_rows, "layer": _name_of(layer), "model": _digest_of(model)}
        writer = _Writer(folder, setting)
        for batch in _pieces(iterate(data, batch_size, bad="mark"), shard_rows):
            if batch.y is None:
                raise refuse("data of (x, y) samples", "data", "inputs without labels", "Give every sample a label")
            batch = _without_keys(batch)
            stored = writer.stored(batch.ids)
            found = stored if stored is not None else extract_features(batch, model, layer, batch_size)
            if stored is None:
                writer.add(found)
            if on_batch is not None:
                on_batch(batch, found)
        return cls(folder, writer.finish())

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> "FeatureStore":
        """A finished store from its folder.

        Args:
            path: The folder.
            verify: Read every shard and compare its digest.
        Raises: ConfigurationError: no store, an unfinished one, or one that was changed.
        """
        folder, index = check_path(path), read_index(check_path(path))
        if not index["complete"]:
            raise refuse(
                "a finished store", "path", str(path), "Call FeatureStore.write with the same data to finish it"
            )
        for shard in index["shards"] if check_flag(verify, "verify") else ():
            check_shard(folder, shard)
        return cls(folder, index)

    def blocks(self, size: int = 1024) -> Iterator[dict[str, Any]]:
        """The rows in order as blocks for detectors; beside their keys "usable" (N,) and "broken" {row: reason}."""
        check_int(size, "size")
        for shard in self.index["shards"]:
            whole = read_shard(self.path / shard["file"])
            for start in range(0, len(whole["ids"]), size):
                part = slice(start, start + size)
                block = {name: values[part] for name, values in whole.items() if name != "broken"}
                block = {**block, **{name: widened(block[name], self.index[name]) for name in ("features", "logits")}}
                broken = {row - start: why for row, why in whole["broken"].items() if start <= row < start + size}
                yield {**block, "broken": broken}

    def scores(self, detector: Detector, size: int = 1024) -> Tensor:
        """(N,) scores of a detector that is fitted on all rows in one pass and asked in a second; it is changed.

        Raises: ConfigurationError: the detector needs what a store does not hold, such as inputs.
        """
        named_detectors([detector], copied=False)  # refuses what is none
        for block in self.blocks(size):
            detector.partial_fit(block)
        parts = [
            check_tensor(detector.score(block), "score(block)", ndim=1, finite=False, rows=len(block["ids"]))
            for block in self.blocks(size)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


class _Writer:
    """Adds shards to a folder, each whole or not at all, and passes over those that are there."""

    def __init__(self, folder: Path, setting: Mapping[str, Any]) -> None:
        self._folder, self._setting = folder, dict(setting)
        self._shards: list[dict[str, Any]] = []
        if (folder / INDEX).exists():
            index = read_index(folder)
            other = next((name for name, value in setting.items() if index.get(name) != value), None)
            if other is not None:
                cure = "Choose an empty folder, or remove this one"
                raise refuse(f"a store with {other}={setting[other]}", "path", index.get(other), cure)
            self._shards = index["shards"]
        elif any(folder.iterdir()):
            raise refuse("an empty folder, or one with a store", "path", str(folder), "Choose another folder")
        else:
            self._save(complete=False)
        self._at, self._offset = 0, 0
        self._current: dict[str, Any] | None = None
        self._pieces: list[Features] = []

    def stored(self, ids: tuple[str, ...]) -> Features | None:
        """What the store holds of the next rows, or None if they have to be made; refuses other data."""
        if self._at >= len(self._shards):
            return None
        if self._current is None:
            shard = self._shards[self._at]
            self._current, self._offset = read_shard(check_shard(self._folder, shard)), 0
        whole, start = self._current, self._offset
        part = slice(start, start + len(ids))
        if whole["ids"][part] != ids:
            cure = "Pass the data that the store was begun with, or choose an empty folder"
            raise refuse("the same data in the same order as before", "data", f"other rows in shard {self._at}", cure)
        self._offset += len(ids)
        if self._offset >= len(whole["ids"]):
            self._at, self._current = self._at + 1, None
        broken = tuple((row - start, why) for row, why in whole["broken"].items() if start <= row < start + len(ids))
        tensors = {name: whole[name][part] for name in ("labels", "features", "logits", "losses", "usable")}
        return Features(ids, torch.zeros(len(ids), 0), **tensors, broken=broken)

    def add(self, found: Features) -> None:
        """Collect rows, and write the shard that they fill."""
        self._pieces.append(dataclasses.replace(found, x=torch.zeros(len(found), 0)))
        if sum(len(piece) for piece in self._pieces) >= self._setting["shard_rows"]:
            self._flush()

    def finish(self) -> dict[str, Any]:
        """The index of the whole."""
        if self._at < len(self._shards):
            raise refuse("the same data as before", "data", "fewer rows than the store holds", "Pass the same data")
        if self._pieces:
            self._flush()
        if not self._shards:
            raise refuse("data to have at least one sample", "data", "0 samples", "Pass data that is not empty")
        sizes = [widths(self._folder / shard["file"]) for shard in self._shards]
        self._setting |= {"features": max(width[0] for width in sizes), "logits": max(width[1] for width in sizes)}
        return self._save(complete=True)

    def _flush(self) -> None:
        name = f"shard-{len(self._shards):06}.safetensors"
        rows = sum(len(piece) for piece in self._pieces)
        with atomic_path(self._folder / name) as temporary:
            safetensors.torch.save_file(packed(self._pieces), temporary)
        digest = sha256(self._folder / name)
        self._shards.append({"file": name, "rows": rows, "sha256": digest})
        self._pieces, self._at = [], len(self._shards)
        self._save(complete=False)

    def _save(self, *, complete: bool) -> dict[str, Any]:
        index = {**self._setting, "shards": self._shards, "complete": complete}
        write_atomic(self._folder / INDEX, canonical_json(index))
        return index


def _made(path: Any) -> Path:
    folder = check_path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refuse("path to be a folder that can be made", "path", str(path), str(error)) from error
    return folder


def _pieces(batches: Iterator[Batch], shard_rows: int) -> Iterator[Batch]:
    """Batches, cut where a shard ends."""
    room = shard_rows
    for batch in batches:
        start = 0
        while start < len(batch.ids):
            stop = min(start + room, len(batch.ids))
            broken = tuple((row - start, why) for row, why in batch.broken if start <= row < stop)
            y = None if batch.y is None else batch.y[start:stop]
            yield Batch(batch.ids[start:stop], batch.x[start:stop], y, broken)
            room = shard_rows if stop - start == room else room - (stop - start)
            start = stop


def _without_keys(batch: Batch) -> Batch:
    """Rows with labels that are keys and no class numbers as rows that cannot be read."""
    if batch.y is None or not len(batch.y) or int(batch.y.max()) <= LARGEST_CLASS:
        return batch
    labels, broken = batch.y.clone(), dict(batch.broken)
    for row in (labels > LARGEST_CLASS).nonzero().flatten().tolist():
        broken.setdefault(row, f"the label {int(labels[row])} is above {LARGEST_CLASS}: number the classes from 0 on")
    labels[labels > LARGEST_CLASS] = 0
    return batch._replace(y=labels, broken=tuple(sorted(broken.items())))


def _name_of(layer: Any) -> str:
    return layer if isinstance(layer, str) else "the last Linear" if layer is None else type(layer).__name__


def _digest_of(model: Any) -> str:
    """What tells two models apart: weights and buffers; of a plain callable the name of its type."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    state = model.state_dict() if isinstance(model, nn.Module) else {}
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{array.dtype}{tuple(value.shape)}".encode() + array.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
