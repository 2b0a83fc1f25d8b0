"""From the bytes of one image to a tensor of pixels, by the one decoder that its first bytes name."""

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aidefend._core.errors import MissingExtra
from aidefend.validate.image_structure import BadImage, Structure, png_lacks_pixels

_MODES = frozenset(["1", "L", "LA", "P", "PA", "RGB", "RGBA"])
_ORIENTATION = 0x0112
_SHADES = {"white": 255, "black": 0}


def pillow() -> Any:
    """The package PIL with what is used of it. Raises: MissingExtra: it is not installed."""
    try:
        import PIL
        import PIL.Image
        import PIL.ImageFile
        import PIL.ImageOps
    except ImportError as error:
        raise MissingExtra("Pillow", "images") from error
    return PIL


def decode(found: Structure, mode: str, alpha: str, orientation: str) -> Tensor:
    """The first frame as uint8 (C, H, W): C = 1 for mode "L", 3 for "RGB".

    Raises: BadImage: the decoder disagrees with the header, cannot decode all of it, or the colours are of a kind that
        has no exact 8-bit form.
    """
    library = pillow()
    if library.ImageFile.LOAD_TRUNCATED_IMAGES:  # set by the application: cut files would decode to grey
        raise BadImage("Pillow is set to load truncated images")
    kind = found.format.upper()
    try:
        if found.format == "png" and png_lacks_pixels(found.core):
            raise BadImage("truncated")
        with library.Image.open(io.BytesIO(found.core), formats=[kind]) as image:
            if image.format != kind or image.size != (found.width, found.height) or image.mode not in _MODES:
                raise BadImage("header and decoder disagree, or a colour mode without 8-bit form")
            image.load()
            if image.size != (found.width, found.height):
                raise BadImage("header and decoder disagree")
            upright = library.ImageOps.exif_transpose(image) if orientation == "apply" and _turned(image) else image
            return _pixels(_flat(library, upright, mode, alpha))
    except BadImage:
        raise
    except Exception:
        raise BadImage("cannot be decoded") from None


def _turned(image: Any) -> bool:
    return bool(image.getexif().get(_ORIENTATION, 1) != 1)


def _flat(library: Any, image: Any, mode: str, alpha: str) -> Any:
    """The image in the wanted mode, on a background of one colour where it is transparent."""
    if image.mode not in ("LA", "PA", "RGBA") and "transparency" not in image.info:
        return image.convert(mode)
    layered = image.convert("RGBA")
    if layered.getchannel("A").getextrema()[0] < 255:
        if alpha == "reject":
            raise BadImage("transparent")
        shade = _SHADES[alpha]
        ground = library.Image.new("RGBA", layered.size, (shade, shade, shade, 255))
        layered = library.Image.alpha_composite(ground, layered)
    return layered.convert("RGB").convert(mode)


def _pixels(image: Any) -> Tensor:
    array = np.array(image, dtype=np.uint8)
    pixels = torch.from_numpy(array)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
