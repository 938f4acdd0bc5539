"""Atomic writes: a file is the old one or the new one, never a part; bounded reads; the error for files."""

import os
import re
import stat
import tempfile
import unicodedata
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath

from safetensors.torch import save_file
from torch import Tensor

LONGEST_NAME, LONGEST_PATH = 200, 1000  # of files that are written: 255 bytes a name, with a number and an extension
RESERVED = re.compile(r"CON(IN\$|OUT\$)?|PRN|AUX|NUL|(COM|LPT)[1-9¹²³]", re.IGNORECASE)  # as Python 3.13's isreserved


class DataError(ValueError):
    """A folder, file or entry that cannot be used; the text says what was found and what was expected."""


def file_problem(path: str | os.PathLike, expected: str = "a file") -> str:
    """Why a path, also behind links, is no regular file, as text to follow its name; "" if it is: a pipe would hang."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        return "does not exist." if missing else f"cannot be read ({getattr(error, 'strerror', None) or error})."
    if stat.S_ISREG(mode):
        return "" if os.access(path, os.R_OK) else "cannot be read (permission denied)."
    return f"is {'a folder' if stat.S_ISDIR(mode) else 'a pipe, socket or device'}, expected {expected}."


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names for a message, the first `most` of them and how many more there are; "nothing" for none."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "nothing"


def name_problem(name: str, windows: bool = os.name == "nt") -> str:
    """Why a name given by a widget or a file does not stay in its folder, or is none here; "" where all is well.

    Args:
        name: Of what is there already, with folders or without.
        windows: Whether it also has to be one that Windows takes as it is.
    """
    path = PureWindowsPath(name)  # takes both kinds of slash
    if path.drive or path.root or any(not part.strip(". ") for part in path.parts):
        return "leads out of its folder ('..', a drive or a leading slash)"
    if any(unicodedata.category(letter) == "Cc" for letter in name):
        return "holds control characters"
    if windows and _is_device(path):
        return "holds a name that Windows keeps for devices"
    if windows and (":" in name or any(part != part.rstrip(". ") for part in path.parts)):
        return "holds a colon, or a name that ends in a dot or blank: Windows takes these for other files"
    return ""


def path_problem(name: str) -> str:
    """The same of a path that is to be written, which every system should take."""
    path = PureWindowsPath(name)
    if problem := name_problem(name):
        return problem
    if len(name) > LONGEST_PATH or any(len(part.encode("utf-8", "replace")) > LONGEST_NAME for part in path.parts):
        return f"is longer than {LONGEST_NAME} bytes a name or {LONGEST_PATH} characters in all"
    if any(unicodedata.category(letter)[0] == "C" and letter != "\u200d" for letter in name):
        return "holds control characters"
    return "holds a name that Windows keeps for devices" if _is_device(path) else ""


def _is_device(path: PureWindowsPath) -> bool:
    return any(RESERVED.fullmatch(part.split(".")[0].strip()) for part in path.parts)


def folded(name: str) -> str:
    """A name without what some systems do not tell apart: its case, and how accents are written."""
    return unicodedata.normalize("NFC", name).casefold()


def read_bytes(path: str | os.PathLike, longest: int) -> bytes:
    """A regular file of at most `longest` bytes, whose size is checked before it is read. Raises DataError."""
    if problem := file_problem(path):
        raise DataError(f"{path} {problem}")
    if (size := os.path.getsize(path)) > longest:
        raise DataError(f"{path} has {size:,} bytes, expected at most {longest:,}.")
    try:
        with open(path, "rb") as file:
            return file.read(longest)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).") from None


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
