"""Atomic writes: a file is the old one or the new one, never a part; and the error for files that cannot be used."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


class DataError(ValueError):
    """A folder, file or entry that cannot be used; the text says what was found and what was expected."""


@contextmanager
def replacing(path: Path):
    """Yields a temporary path in the same folder, which replaces `path` at the end, flushed to the disk."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        yield Path(temporary)
        umask = os.umask(0)  # mkstemp makes files for the owner alone
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def sync(path) -> None:
    """Waits until a file has reached the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a .safetensors file."""
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def save_bytes(path: Path, data: bytes) -> None:
    """Writes a file."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def save_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file; halves of surrogate pairs, which UTF-8 has no form for, are escaped."""
    save_bytes(path, text.encode("utf-8", "backslashreplace"))
