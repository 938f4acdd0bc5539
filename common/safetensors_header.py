"""The header of a .safetensors file: what it holds, read and checked without reading a weight."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

LONGEST = 100_000_000  # bytes of a header; the format's own limit
# How other files begin that are met under the name .safetensors.
SIGNATURES = (
    (b"PK\x03\x04", "a zip archive, probably a pickled .pt or .pth that was renamed"),
    (b"\x80\x02", "a pickle, probably a .pt or .ckpt that was renamed"),
    (b"GGUF", "a GGUF file that was renamed"),
    (b"version https://git-lfs", "a Git LFS pointer instead of the file itself"),
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
    if path.is_dir():
        raise SafetensorsError(path, "is a folder, expected one .safetensors file.")
    if not path.is_file():
        raise SafetensorsError(path, "does not exist.")
    size = path.stat().st_size
    if size == 0:
        raise SafetensorsError(path, "is empty (0 bytes). Download or save it again.")
    with open(path, "rb") as file:  # an unsigned 64 bit length, that many bytes of JSON, the data
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if not (start[8:9] == b"{" and length <= LONGEST):
            if kind := signature(start):
                raise SafetensorsError(path, f"is {kind}, expected a .safetensors file. Download or save it again.")
            raise SafetensorsError(path, f"is not a .safetensors file: it begins with {start[:8]!r}. Replace it.")
        if 8 + length > size:
            raise SafetensorsError(
                path, f"is cut off inside its header: {size} bytes, at least {8 + length} expected. Download it again."
            )
        file.seek(8)
        text = file.read(length)
    try:
        entries = json.loads(text)
        metadata = dict(entries.pop("__metadata__", None) or {})
        tensors = {key: TensorHeader(str(one["dtype"]), tuple(map(int, one["shape"]))) for key, one in entries.items()}
        expected = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise SafetensorsError(path, f"has a damaged .safetensors header ({error}). Download it again.") from None
    if size != expected:
        cut = "is cut off" if size < expected else "has bytes too many at its end"
        raise SafetensorsError(path, f"{cut}: {size} bytes, expected {expected}. Download or save it again.")
    return SafetensorsHeader(tensors, metadata)


def signature(start: bytes) -> str | None:
    """What another kind of file is, by its first 64 bytes; None where it is none of SIGNATURES."""
    return next((kind for magic, kind in SIGNATURES if start.lstrip().startswith(magic)), None)
