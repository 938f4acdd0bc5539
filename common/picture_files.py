"""Picture files to tensors. Damaged ones are an ImageError, whatever Pillow raises for them."""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from .images import SLIMMEST, SMALLEST, ImageError
from .tar_files import TarMember

PictureFile = Path | TarMember
PICTURES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
)  # first frames
# Pictures too, which Pillow reads on some systems alone or not at all: named where they are left out.
OTHER_PICTURES = (
    ".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".psd", ".svg", ".tga", ".exr", ".hdr", ".ico", ".ppm", ".pgm",
    ".dng", ".cr2", ".cr3", ".nef", ".arw",
)  # fmt: skip
# What these names stand for. Pillow goes by content, and would start Ghostscript for an EPS of any name.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
LARGEST = 2 * 89_478_485  # pixels; Pillow's own limit, which other packs lift
MOST_SCANS = 500  # of a JPEG, which has about ten; each takes the time of the whole picture, whatever is in it
LARGE = 2**26  # pixels beyond which a picture is halved: a hundred million take 2 GB as floats
PNG, TEXT_CHUNKS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
LONGEST_TEXT = 2**20  # bytes of a PNG's text; Pillow's own limit
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap width and height


def left_out(name: str) -> str:
    """Why a picture of this name is not used, as text to follow the name; "" where it is used, or no picture."""
    suffix = Path(name).suffix.lower()
    return f"is {suffix}, expected {', '.join(PICTURES)}: convert it" if suffix in OTHER_PICTURES else ""


def file_version(file: PictureFile) -> tuple[Path | str, int, int]:
    """Where a file is, its bytes, and when it was changed in ns: for the keys of caches."""
    if isinstance(file, TarMember):
        return f"{file.tar.resolve()}/{file.member} at {file.offset}", file.size, file.tar.stat().st_mtime_ns
    status = file.stat()
    return file.resolve(), status.st_size, status.st_mtime_ns


def load_picture(path: PictureFile) -> Tensor:
    """(H, W, 3) float32 in 0..1: turned as EXIF says, transparency over white, 16 bits a channel reduced to 8.

    One of more than LARGE pixels has half its sides.
    """
    with _reading(path), whole_pictures(), _open(path) as file:
        _check_scans(file)
        if halved := file.width * file.height > LARGE:
            file.draft("RGB", (file.width // 2, file.height // 2))  # a JPEG, while it is decoded
        picture = ImageOps.exif_transpose(file)
        if picture.mode.startswith("I"):
            picture = _of_8_bits(picture)
        mode = "RGBA" if "A" in picture.getbands() or "transparency" in picture.info else "RGB"
        picture = picture if picture.mode == mode else picture.convert(mode)
        if halved and picture.width * picture.height > LARGE:
            picture = picture.reduce(2)
        if mode == "RGBA":
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        return torch.from_numpy(numpy.array(picture)).float().div_(255)


def _of_8_bits(picture: Image.Image) -> Image.Image:
    """Rounds a grey picture of 16 bits, which Pillow would clip at 255. Raises ImageError for one of more bits."""
    values = numpy.asarray(picture)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"it holds numbers from {low} to {high}, expected 8 or 16 bits a channel")
    return Image.fromarray((numpy.arange(65536) / 257).round().astype(numpy.uint8)[values])


def shown_size(path: PictureFile, whole: bool = True) -> tuple[int, int]:
    """(width, height) in px of a picture as shown; to be called in `whole_pictures`.

    Args:
        path: The picture.
        whole: Decode all of it, so that damage is found; else read its header alone.

    Raises:
        ImageError: It cannot be read, or has sizes that nothing can be done with.
    """
    with _reading(path), _open(path) as file:
        size = file.size
        if whole or _exif_behind_pixels(file):
            _check_scans(file)
            file.draft("RGB", (1, 1))  # a JPEG at an eighth: all its data are read, in half the time
            file.load()
            turned = file.getexif().get(ORIENTATION)
        else:
            turned = Image.Image.getexif(file).get(ORIENTATION)  # a PNG's own would decode it
        size = size[::-1] if turned in TURNED else size
    if min(size) < SMALLEST or max(size) > SLIMMEST * min(size):
        raise ImageError(
            f"{path.name} is {size[0]} x {size[1]} px, expected at least {SMALLEST} px a side, and sides at most "
            f"{SLIMMEST}:1 apart"
        )
    return size


def _check_scans(file: Image.Image) -> None:
    """Raises ImageError for a JPEG of so many scans that 300 KB take half a minute."""
    if file.format not in ("JPEG", "MPO"):
        return
    stream, scans, end = file.fp, 0, b""
    before = stream.tell()
    stream.seek(0)
    while part := stream.read(2**20):
        scans += (end + part).count(b"\xff\xda")  # nothing else begins so, but for a thumbnail's
        end = part[-1:]
    stream.seek(before)
    if scans > MOST_SCANS:
        raise ImageError(f"it has {scans:,} scans, expected at most {MOST_SCANS}: save it again")


def _exif_behind_pixels(file: Image.Image) -> bool:
    """Whether a PNG has its orientation behind its pixels, by the headers of its chunks."""
    if file.format != "PNG" or "exif" in file.info or "Raw profile type exif" in file.info:
        return False
    stream, before, position, found = file.fp, file.fp.tell(), 8, False
    while not found:
        stream.seek(position)
        header = stream.read(29)  # length, kind, and the keyword of a text
        if len(header) < 8 or header[4:8] == b"IEND":
            break
        found = header[4:8] == b"eXIf" or header[8:] == b"Raw profile type exif"
        position += 12 + struct.unpack(">I", header[:4])[0]
    stream.seek(before)
    return found


@contextmanager
def _open(path: PictureFile) -> Iterator[Image.Image]:
    if isinstance(path, Path) and path.exists() and not path.is_file():
        raise OSError("it is no file")  # a pipe would wait for ever
    with path.open() if isinstance(path, TarMember) else open(path, "rb") as stream:
        with open_picture(_without_long_texts(stream)) as picture:
            if picture.width * picture.height > LARGEST:
                raise ImageError(f"it has {picture.width} x {picture.height} px, expected at most {LARGEST:,} in all")
            if picture.mode == "F":
                raise ImageError("it holds floating-point values, expected 8 or 16 bits a channel")
            yield picture


def open_picture(file: IO[bytes] | Path) -> Image.Image:
    """Pillow's picture of one of FORMATS, not decoded."""
    Image.init()
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def _without_long_texts(stream: IO[bytes]) -> IO[bytes]:
    """A picture file, a PNG without its texts and profile where one unpacks to more than LONGEST_TEXT.

    Pillow refuses such a PNG, as it should: compressed, gigabytes take a few MB. Nothing here reads them.
    """
    start, position, left_out = stream.read(8), 8, []
    while start == PNG:
        stream.seek(position)
        header = stream.read(8)
        if len(header) < 8 or header[4:] == b"IEND":
            break
        length, kind = struct.unpack(">I", header[:4])[0], header[4:]
        if kind in TEXT_CHUNKS and (length > LONGEST_TEXT or _unpacked(kind, stream.read(length)) > LONGEST_TEXT):
            left_out.append((position, position + 12 + length))
        position += 12 + length
    stream.seek(0)
    if not left_out:
        return stream
    data = stream.read()
    bounds = [0, *(place for chunk in left_out for place in chunk), len(data)]
    return io.BytesIO(b"".join(data[first:last] for first, last in zip(bounds[::2], bounds[1::2])))


def _unpacked(kind: bytes, chunk: bytes) -> int:
    """Bytes to which a PNG's chunk of text unpacks, counted up to LONGEST_TEXT + 1."""
    rest = chunk.partition(b"\0")[2]
    if kind == b"iTXt":
        if not rest.startswith(b"\1"):
            return len(chunk)
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]  # behind its language and translated keyword
    elif kind != b"tEXt":
        rest = rest[1:]
    try:
        return len(chunk if kind == b"tEXt" else zlib.decompressobj().decompress(rest, LONGEST_TEXT + 1))
    except zlib.error:
        return 0  # Pillow judges it


@contextmanager
def _reading(path: PictureFile) -> Iterator[None]:
    """Whatever goes wrong with a picture inside becomes an ImageError."""
    try:
        yield
    except FileNotFoundError:
        raise ImageError(f"{path.name} does not exist") from None
    except Exception as error:  # Pillow's readers raise nearly everything on damaged files
        empty = isinstance(error, UnidentifiedImageError) and not file_version(path)[1]
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
