"""Picture files to tensors. Damaged ones are an ImageError, whatever Pillow raises for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from .images import SLIMMEST, SMALLEST, ImageError

ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap width and height


def load_picture(path: Path) -> Tensor:
    """(H, W, 3) float32 in 0..1: turned as EXIF says, transparency over white, 16 bits a channel reduced to 8."""
    with _reading(path), whole_pictures(), _open(path) as file:
        picture = ImageOps.exif_transpose(file)
        if picture.mode.startswith("I"):  # 16 bit grey, which Pillow would clip at 255
            values = numpy.asarray(picture).astype(numpy.float64) / 257
            picture = Image.fromarray(values.round().clip(0, 255).astype(numpy.uint8))
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return torch.from_numpy(numpy.asarray(picture.convert("RGB"), dtype=numpy.float32) / 255)


def shown_size(path: Path) -> tuple[int, int]:
    """(width, height) in px of a picture as shown, after decoding all of it; to be called in `whole_pictures`."""
    with _reading(path), _open(path) as file:
        size = file.size
        file.draft("RGB", (1, 1))  # a JPEG at an eighth: all its data are read, in half the time
        file.load()
        size = size[::-1] if file.getexif().get(ORIENTATION) in TURNED else size
    if min(size) < SMALLEST or max(size) > SLIMMEST * min(size):
        raise ImageError(
            f"{path.name} is {size[0]} x {size[1]} px, expected at least {SMALLEST} px a side, and sides at most "
            f"{SLIMMEST}:1 apart"
        )
    return size


def _open(path: Path) -> Image.Image:
    if path.exists() and not path.is_file():
        raise OSError("it is no file")  # a pipe would wait for ever
    return Image.open(path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a picture inside becomes an ImageError."""
    try:
        yield
    except FileNotFoundError:
        raise ImageError(f"{path.name} does not exist") from None
    except Exception as error:  # Pillow's readers raise nearly everything on damaged files
        empty = isinstance(error, UnidentifiedImageError) and not path.stat().st_size
        reason = "it has 0 bytes" if empty else getattr(error, "strerror", None) or error
        raise ImageError(f"{path.name[:255]} cannot be read as a picture ({reason})") from error


@contextmanager
def whole_pictures() -> Iterator[None]:
    """Pillow refuses truncated pictures inside, also where another pack has made it fill them up with grey."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
