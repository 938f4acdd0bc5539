"""The header of a .safetensors file: what it holds, read and checked without reading a weight."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from .dtypes import FILE_DTYPES
from .files import file_problem
from .untrusted_json import parse_json

LONGEST = 32 * 2**20  # bytes of a header; a model of 100,000 tensors has 15 MB, the format allows 100 MB
# The format's dtypes that nothing here reads.
OTHER_DTYPES = ("U16", "U32", "U64", "C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
# How other files begin that are met under the name .safetensors.
SIGNATURES = (
    (b"PK\x03\x04", "a zip archive, probably a pickled .pt or .pth that was renamed"),
    (b"\x80\x02", "a pickle, probably a .pt or .ckpt that was renamed"),
    (b"GGUF", "a GGUF file that was renamed"),
    (b"version https://git-lfs", "a Git LFS pointer instead of the file itself"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"RIFF", "a WebP picture or a sound"),
    (b"<", "a web page, probably of a download that needed a login"),
)


class SafetensorsError(ValueError):
    """A file that is no whole .safetensors. `problem` is the text without the file's name, to follow it or "it"."""

    def __init__(self, path: str | os.PathLike, problem: str):
        super().__init__(f"{path} {problem}")
        self.problem = problem


@dataclass(frozen=True)
class TensorHeader:
    """What the header says of one tensor; `dtype` is the format's name (see common/dtypes.py)."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SafetensorsHeader:
    """Tensors by key, in the file's order, and the metadata ({} where there is none)."""

    tensors: dict[str, TensorHeader]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike) -> SafetensorsHeader:
    """Keys with dtypes and shapes, and the metadata, of a file that is as long as its header says.

    Raises:
        SafetensorsError: No such file, another kind of file, a damaged one, or one that is cut off.
    """
    path = Path(path)
    if problem := file_problem(path, "one .safetensors file"):
        raise SafetensorsError(path, problem)
    size = path.stat().st_size
    if size == 0:
        raise SafetensorsError(path, "is empty (0 bytes). Download or save it again.")
    with open(path, "rb") as file:  # an unsigned 64 bit length, that many bytes of JSON, the data
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if start[8:9] == b"{" and LONGEST < length <= size:
            raise SafetensorsError(path, f"has a header of {length:,} bytes, expected at most {LONGEST:,}.")
        if not (start[8:9] == b"{" and length <= LONGEST):
            if kind := signature(start):
                raise SafetensorsError(path, f"is {kind}, expected a .safetensors file. Download or save it again.")
            raise SafetensorsError(
                path, f"is not a .safetensors file: it begins with {start[:8]!r}. Download or save it again."
            )
        if 8 + length > size:
            raise SafetensorsError(
                path, f"is cut off inside its header: {size} bytes, at least {8 + length} expected. Download it again."
            )
        file.seek(8)
        text = file.read(length)
    try:
        entries = parse_json(text, longest=LONGEST)
        metadata = entries.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in dict(metadata).values()):
            raise ValueError("its metadata hold more than texts")
        tensors = {key: TensorHeader(one["dtype"], tuple(one["shape"])) for key, one in entries.items()}
        expected = 8 + length + _check_data(tensors, {key: one["data_offsets"] for key, one in entries.items()})
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise SafetensorsError(path, f"has a damaged .safetensors header ({error}). Download it again.") from None
    if size != expected:
        cut = "is cut off" if size < expected else "has bytes too many at its end"
        raise SafetensorsError(path, f"{cut}: {size} bytes, expected {expected}. Download or save it again.")
    return SafetensorsHeader(tensors, metadata)


def _check_data(tensors: dict[str, TensorHeader], offsets: dict[str, list[int]]) -> int:
    """The bytes of all tensors, which follow each other without gaps. Raises ValueError, as the library does."""
    end = 0
    for key, (start, stop) in sorted(offsets.items(), key=lambda item: item[1]):
        dtype, shape = tensors[key].dtype, tensors[key].shape
        if not isinstance(dtype, str):
            raise ValueError(f"{key!r} has dtype {dtype!r:.60}, expected a name such as F32")
        if any(type(size) is not int or size < 0 for size in (start, stop, *shape)):
            raise ValueError(
                f"{key!r} has shape {shape!r:.60} at {start!r:.20} to {stop!r:.20}, expected whole numbers"
            )
        if start != end or stop < start:
            raise ValueError(f"{key!r} has the bytes {start} to {stop}, expected them from {end} on")
        if dtype not in FILE_DTYPES and dtype not in OTHER_DTYPES:
            raise ValueError(f"{key!r} has the dtype {dtype!r:.20}, which the format lacks")
        if dtype in FILE_DTYPES and math.prod(shape) * FILE_DTYPES[dtype].itemsize != stop - start:
            raise ValueError(f"{key!r} is {dtype} of shape {shape!r:.60}, which does not fill its {stop - start} bytes")
        end = stop
    return end


def signature(start: bytes) -> str | None:
    """What another kind of file is, by its first 64 bytes; None where it is none of SIGNATURES."""
    return next((kind for magic, kind in SIGNATURES if start.lstrip().startswith(magic)), None)
