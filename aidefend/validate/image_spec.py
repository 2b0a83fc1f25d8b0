"""Hard checks on images that arrive as bytes: what may be decoded is decided before a decoder runs."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_int, check_number, refuse
from aidefend.validate.image_decoding import decode, pillow
from aidefend.validate.image_structure import BadImage, Structure, read_structure
from aidefend.validate.spec_file import read_spec, spec_fields, write_spec
from aidefend.validate.spec_header import MOST_ROWS
from aidefend.validate.spec_result import Reasons, SpecResult, refused_batch, remark

_SCHEMA = "aidefend.image-spec/2"
_FORMATS = ("png", "jpeg", "gif", "bmp", "webp")
Side = int | tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """The rules that image files must satisfy, and the one way in which they become tensors. Needs Pillow.

    Guarantee: `check` never raises. The format is what the first bytes say, never a name; only the decoder of a named
        format runs, and only after the caps on bytes, pixels, frames, scans and metadata have been checked from the
        file's own structure by a reader of ours, with which the decoder must then agree. Files that end early, hold
        damaged checksums, or go on after their end are refused; a JPEG whose scan is cut but closed by an end marker
        decodes to grey, as in every viewer. It does not make a decoder free of flaws: keep Pillow
        up to date, and decode in a process of its own where images come from enemies.
    Args:
        formats: Allowed formats, among png, jpeg, gif, bmp, webp.
        mode: "RGB" (3 channels) or "L" (1 channel, luma of ITU-R 601). Both 8 bit: 16-bit, CMYK and other colour modes
            are refused, since there is no one way to convert them.
        height, width: Of the decoded image in pixels: a number or (smallest, largest); None = any.
        max_bytes: Largest size of one file.
        max_pixels: Largest width x height of one image. Above 89 million Pillow has a limit of its own.
        max_frames: Largest number of frames; the first one is decoded.
        max_metadata_bytes: Largest total of profiles, EXIF, comments and the like.
        max_rows: Largest number of files in a batch.
        max_batch_bytes: Largest total of the files; more refuse the batch.
        max_batch_pixels: Largest total of the pixels of files that pass; more refuse the batch.
        trailing: Policy for data after the end of the image, as in files that are two things at once: "reject",
            "clip" (cut off) or "quarantine". Phones put further pictures there: "clip" for photographs.
        alpha: What is under transparent pixels: "white" or "black", or "reject" images with any. A model that dropped
            the channel would see what no viewer shows.
        orientation: "apply" the EXIF orientation, as viewers do, or "ignore" it.
        otherwise: Policy for files that break any other rule: "reject", or "quarantine" to ask to keep them aside.
    All other metadata is dropped: colour profiles are not applied, pixels are taken as stored; gamma, comments and
    thumbnails are never looked at.
    Raises: ConfigurationError: a rule contradicts itself.
        MissingExtra: Pillow is not installed.
    Cost: One pass over the bytes of a file, then its decoder.
    Example:
        >>> import base64
        >>> dot = base64.b64decode("R0lGODdhAQABAIAAAP///////ywAAAAAAQABAAACAkQBADs=")
        >>> result = ImageSpec(formats=("gif",), mode="L").check([dot, dot + b"#!/bin/sh", dot[:-1], b"text"])
        >>> result.x, result.reasons[1:]
        ([tensor([[[255]]], dtype=torch.uint8)],
         (('input: data after the image',), ('input: truncated',), ('input: unknown image format',)))
    """

    formats: tuple[str, ...] = ("png", "jpeg")
    mode: Literal["RGB", "L"] = "RGB"
    height: Side | None = None
    width: Side | None = None
    max_bytes: int = 8 * 2**20
    max_pixels: int = 2**24
    max_frames: int = 1
    max_metadata_bytes: int = 2**20
    max_rows: int = 256
    max_batch_bytes: int = 64 * 2**20
    max_batch_pixels: int = 2**26
    trailing: Literal["reject", "clip", "quarantine"] = "reject"
    alpha: Literal["white", "black", "reject"] = "white"
    orientation: Literal["apply", "ignore"] = "apply"
    otherwise: Literal["reject", "quarantine"] = "reject"

    def __post_init__(self) -> None:
        formats = self.formats
        if (
            not isinstance(formats, tuple | list)
            or not formats
            or not all(isinstance(one, str) and one in _FORMATS for one in formats)
        ):
            raise refuse(f"formats among {_FORMATS}", "formats", formats, "Name at least one")
        object.__setattr__(self, "formats", tuple(formats))
        check_choice(self.mode, ("RGB", "L"), "mode")
        check_choice(self.trailing, ("reject", "clip", "quarantine"), "trailing")
        check_choice(self.alpha, ("white", "black", "reject"), "alpha")
        check_choice(self.orientation, ("apply", "ignore"), "orientation")
        check_choice(self.otherwise, ("reject", "quarantine"), "otherwise")
        for name in ("max_bytes", "max_pixels", "max_frames", "max_batch_bytes", "max_batch_pixels"):
            check_int(getattr(self, name), name)
        check_int(self.max_metadata_bytes, "max_metadata_bytes", 0)
        check_int(self.max_rows, "max_rows", 1, MOST_ROWS)
        for name in ("height", "width"):
            _check_side(getattr(self, name), name)
        pillow()

    @classmethod
    def infer(cls, images: Any, *, margin: float = 0.25, max_rows: int = 256) -> "ImageSpec":
        """The rules that trusted files satisfy: their formats, sizes and number of frames; room for bytes alone.

        Args:
            images: A list of files as bytes, trusted, not empty.
            margin: Room above the largest number of bytes, as a share, >= 0.
            max_rows: As in `ImageSpec`.
        Raises: ConfigurationError: no such list, or a file that can never be accepted (says why).
        Cost: Decodes every file.
        """
        check_number(margin, "margin", 0.0)
        if type(images) not in (list, tuple) or not images:
            raise refuse("a list of at least one file as bytes", "images", images, "Pass trusted images")
        most = dict.fromkeys(("max_bytes", "max_pixels", "max_frames", "max_batch_bytes", "max_batch_pixels"), 2**40)
        loose = cls(_FORMATS, max_metadata_bytes=2**40, max_rows=MOST_ROWS, **most)  # type: ignore[arg-type]  # all are counts
        sizes, grey, found = [], True, []
        for image in images:
            checked = loose.check([image])
            if not bool(checked.accepted.all()):
                reason = checked.fault or checked.reasons[0][0]
                raise refuse("images that can be accepted", "images", reason, "Remove the files that are broken")
            pixels = checked.x[0]
            sizes.append(tuple(pixels.shape[1:]))
            grey = grey and bool((pixels[0] == pixels[1]).all() & (pixels[1] == pixels[2]).all())
            found.append(read_structure(image))
        largest = max(map(len, images))
        return cls(
            tuple(one for one in _FORMATS if one in {structure.format for structure in found}),
            "L" if grey else "RGB",
            _merged([height for height, _ in sizes]),
            _merged([width for _, width in sizes]),
            int(largest * (1 + margin)) or 1,
            max(height * width for height, width in sizes),
            max(structure.frames for structure in found),
            max_rows=max_rows,
        )

    def check(self, images: Any) -> SpecResult:
        """Judge a list of files, each as bytes. Any object may be passed; nothing raises.

        Returns: Verdicts; `x` is a list with a tensor uint8 (C, H, W) for each accepted file.
        """
        if type(images) not in (list, tuple):
            return refused_batch("input: not a list of files")
        n = min(len(images), MOST_ROWS)
        if len(images) > self.max_rows:
            return refused_batch("input: too many rows", n)
        if sum(len(image) for image in images if type(image) is bytes) > self.max_batch_bytes:
            return refused_batch("input: too many bytes", n)
        looked = [self._look(image) for image in images]
        if sum(one.width * one.height for one, _ in looked if one is not None) > self.max_batch_pixels:
            return refused_batch("input: too many pixels", n)
        judged = [(None, reasons) if one is None else self._decoded(one) for one, reasons in looked]
        accepted = torch.tensor([pixels is not None for pixels, _ in judged], dtype=torch.bool)
        kept = [pixels for pixels, _ in judged if pixels is not None]
        return SpecResult(None, accepted, tuple(reasons for _, reasons in judged), kept)

    def _look(self, image: object) -> tuple[Structure | None, Reasons]:
        """The structure of a file that may be decoded, or None and the rules that it breaks."""
        if type(image) is not bytes:
            return None, self._refused("not bytes")
        if len(image) > self.max_bytes:
            return None, self._refused("too many bytes")
        try:
            found = read_structure(image)
        except BadImage as error:
            return None, self._refused(str(error))
        except Exception:
            return None, self._refused("cannot be inspected")
        reasons = self._broken(found)
        if found.end < len(image) and self.trailing != "clip":
            reasons = (*reasons, remark(self.trailing, "data after the image"))
        return (None, reasons) if reasons else (found, ())

    def _broken(self, found: Structure) -> Reasons:
        size = (found.height, found.width)
        turned = self.orientation == "apply" and self._fits(*reversed(size))
        rules = {
            "format is not allowed": found.format not in self.formats,
            "too many pixels": found.width * found.height > self.max_pixels,
            "wrong size": not (self._fits(*size) or turned),
            "too many frames": found.frames > self.max_frames,
            "too much metadata": found.metadata > self.max_metadata_bytes,
        }
        return self._refused(*(rule for rule, broken in rules.items() if broken))

    def _refused(self, *rules: str) -> Reasons:
        return tuple(remark(self.otherwise, rule) for rule in rules)

    def _fits(self, height: int, width: int) -> bool:
        sides = ((self.height, height), (self.width, width))
        return all(
            rule is None or (rule[0] <= side <= rule[1] if isinstance(rule, tuple) else rule == side)
            for rule, side in sides
        )

    def _decoded(self, found: Structure) -> tuple[Tensor | None, Reasons]:
        try:
            pixels = decode(found, self.mode, self.alpha, self.orientation)
        except Exception as error:
            return None, self._refused(str(error) if isinstance(error, BadImage) else "cannot be decoded")
        return (pixels, ()) if self._fits(*pixels.shape[1:]) else (None, self._refused("wrong size"))

    def to_tensor(self, x: Sequence[Tensor]) -> Tensor:
        """The accepted images `result.x` as float32 (M, C, H, W) in [0, 1]: divided by 255 and nothing else.

        Raises: ConfigurationError: the images differ in size, or there is none.
        """
        shapes = {one.shape for one in x if type(one) is Tensor} if isinstance(x, list | tuple) else set()
        if len(shapes) != 1 or any(type(one) is not Tensor or one.dtype != torch.uint8 for one in x):
            raise refuse("images of one size", "x", x, "Pass result.x, and resize each first if height and width vary")
        return torch.stack(tuple(x)).float() / 255

    def to_dict(self) -> dict[str, Any]:
        """The rules as JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        return {"schema": _SCHEMA, **lists}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ImageSpec":
        """The rules back from `to_dict`."""
        found = spec_fields(data, cls, _SCHEMA)
        tuples: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in found.items()}
        return cls(**tuples)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rules as JSON, whole or not at all."""
        write_spec(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ImageSpec":
        """The rules back from `save`."""
        return cls.from_dict(read_spec(path, cls.__name__))

    def to_json_schema(self) -> dict[str, Any]:
        """A JSON Schema (draft 2020-12) of a batch as base64 texts. Coarser than `check`: it sees sizes alone."""
        text = {"type": "string", "contentEncoding": "base64", "minLength": 4, "maxLength": 4 * -(-self.max_bytes // 3)}
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "array",
            "maxItems": self.max_rows,
            "items": text,
        }


def _check_side(side: Any, name: str) -> None:
    if side is None:
        return
    pair = side if isinstance(side, tuple) else (side, side)
    if len(pair) != 2:
        raise refuse(f"{name} as a number or (smallest, largest)", name, side, "Give one or two numbers")
    check_int(pair[1], name, check_int(pair[0], name))


def _merged(sides: list[int]) -> Side:
    low, high = min(sides), max(sides)
    return low if low == high else (low, high)
