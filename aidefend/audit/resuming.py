"""Finished parts of a long evaluation on disk, so that a killed one goes on where it stopped."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from aidefend._core.checks import refuse
from aidefend._core.modules import Model
from aidefend._core.storage import canonical_json, write_atomic

Tensors = dict[str, Tensor]


class FinishedParts:
    """Results of parts by what they depend on: the same part of the same evaluation is read, anything else computed.

    A file that cannot be read is computed anew. Whoever can write to the folder can forge results: keep it to yourself.
    Without a folder every part is computed.
    """

    def __init__(self, folder: Path | None = None, evaluation: str = "") -> None:
        self._folder, self._evaluation = folder, evaluation
        self._used: list[Path] = []

    @classmethod
    def of(cls, folder: Any, *, model: Model, logits: Tensor, setting: Any) -> "FinishedParts":
        """Parts of one evaluation: of this setting (JSON values) and this model, known by weights and clean outputs."""
        if folder is None:
            return cls()
        if not isinstance(folder, str | Path):
            raise refuse("a folder", "resume", folder, "Pass the path of a folder of your own")
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            rule = "a folder that can be made and written to"
            raise refuse(rule, "resume", str(folder), "Pass another folder") from error
        digest = hashlib.sha256(canonical_json(setting).encode())
        tensors = [logits, *(model.state_dict().values() if isinstance(model, nn.Module) else [])]
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                digest.update(save({"": tensor.detach().cpu().contiguous()}))
        return cls(path, digest.hexdigest())

    def get(self, name: str, ids: Sequence[str], compute: Callable[[], Tensors]) -> Tensors:
        """The tensors of the part `name` over these rows."""
        if self._folder is None:
            return compute()
        key = hashlib.sha256(canonical_json([self._evaluation, name, list(ids)]).encode()).hexdigest()
        path = self._folder / f"{key}.safetensors"
        self._used.append(path)
        found = _read(path)
        if found is None:
            found = compute()
            write_atomic(path, save({name: value.detach().cpu().contiguous() for name, value in found.items()}))
        return found

    def forget(self) -> None:
        """Remove the files of this evaluation: it is done."""
        for path in self._used:
            path.unlink(missing_ok=True)


def _read(path: Path) -> Tensors | None:
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError, ValueError):
        return None
