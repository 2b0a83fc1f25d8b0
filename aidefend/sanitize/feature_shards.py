"""Shards of features as files: safetensors with float16 features, checked by their digests, and the index of them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from aidefend._core.checks import refuse
from aidefend._core.storage import canonical_json, unique_fields
from aidefend.sanitize.features import Features

FORMAT = "aidefend.features/1"
INDEX = "index.json"
_FIELDS = ("features", "exponents", "logits", "losses", "labels", "usable", "ids", "broken")
_LARGEST_EXPONENT = 120


def packed(pieces: Sequence[Features]) -> dict[str, Tensor]:
    """The tensors of one shard: all rows of the pieces, ids and reasons as bytes of text."""
    width, classes = (max(getattr(piece, name).shape[1] for piece in pieces) for name in ("features", "logits"))
    features = torch.cat([widened(piece.features, width) for piece in pieces])
    halves, exponents = halved(features)
    starts = torch.tensor([0, *(len(piece) for piece in pieces)]).cumsum(0).tolist()
    broken = {start + row: why for start, piece in zip(starts, pieces, strict=False) for row, why in piece.broken}
    ids = "\n".join(row_id for piece in pieces for row_id in piece.ids)
    return {
        "features": halves,
        "exponents": exponents,
        "logits": torch.cat([widened(piece.logits, classes) for piece in pieces]),
        "losses": torch.cat([piece.losses for piece in pieces]),
        "labels": torch.cat([piece.labels for piece in pieces]),
        "usable": torch.cat([piece.usable for piece in pieces]),
        "ids": as_bytes(ids),
        "broken": as_bytes(canonical_json({str(row): why for row, why in broken.items()})),
    }


def widened(rows: Tensor, width: int) -> Tensor:
    """Where not one row was usable, nobody knew how many features there would be: they are all NaN."""
    return nn.functional.pad(rows, (0, width - rows.shape[1]), value=torch.nan) if rows.shape[1] < width else rows


def widths(path: Path) -> tuple[int, int]:
    """Number of features and of logits in a shard."""
    with safetensors.safe_open(path, framework="pt") as file:
        return file.get_slice("features").get_shape()[1], file.get_slice("logits").get_shape()[1]


def halved(features: Tensor) -> tuple[Tensor, Tensor]:
    """(N, d) float16 and exponents (N,) int16; `restored` is off by at most 2**-11 of each row's largest entry."""
    top = features.abs().nan_to_num(0.0, 0.0, 0.0).amax(dim=1)
    exponents = torch.frexp(top).exponent.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return torch.ldexp(features, -exponents[:, None]).half(), exponents.to(torch.int16)


def restored(halves: Tensor, exponents: Tensor) -> Tensor:
    """(N, d) float32 from `halved`."""
    return torch.ldexp(halves.float(), exponents.to(torch.int32)[:, None])


def as_bytes(text: str) -> Tensor:
    """UTF-8 as (n,) uint8; an empty text as one line break."""
    return torch.frombuffer(bytearray(text.encode() or b"\n"), dtype=torch.uint8).clone()


def read_shard(path: Path) -> dict[str, Any]:
    """Ids, features, logits, losses, labels, usable and broken {row: reason} of one shard."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found: dict[str, Any] = {name: file.get_tensor(name) for name in _FIELDS}
        found["features"] = restored(found.pop("features"), found.pop("exponents"))
        found["ids"] = tuple(found["ids"].numpy().tobytes().decode().split("\n"))
        broken = json.loads(found["broken"].numpy().tobytes())
        found["broken"] = {int(row): str(why) for row, why in broken.items()}
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise refuse("a shard of a feature store", "path", str(path), f"Write the store anew ({error})") from error
    return found


def check_shard(folder: Path, shard: Mapping[str, Any]) -> Path:
    """The path of a shard that is as it was written, or an error."""
    path = folder / str(shard["file"])
    if not path.is_file() or sha256(path) != shard["sha256"]:
        raise refuse("shards as they were written", "path", str(path), "Write the store anew, or restore this file")
    return path


def read_index(folder: Path) -> dict[str, Any]:
    """What a folder holds, as far as its index says so."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="ascii"), object_pairs_hook=unique_fields)
        fits = index["format"] == FORMAT and isinstance(index["complete"], bool)
        for place, shard in enumerate(index["shards"]):
            fits = fits and shard["file"] == f"shard-{place:06}.safetensors" and type(shard["rows"]) is int
            fits = fits and isinstance(shard["sha256"], str)
        fits = fits and (not index["complete"] or all(type(index[name]) is int for name in ("features", "logits")))
        if not fits:
            raise ValueError("it has another form")
    except (OSError, KeyError, TypeError, ValueError) as error:
        found = f"could not read {folder / INDEX} ({error})"
        raise refuse("the folder of a feature store", "path", found, "Name a folder that write() made") from error
    return dict(index)


def sha256(path: Path) -> str:
    """Digest of a file, read in parts."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
