"""Files inside uncompressed .tar archives, read where they are: nothing is ever extracted."""

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .files import DataError

BLOCK = 512  # bytes, of the format
HEADER = 2**16  # most bytes of a member's header, which tarfile reads into memory
DIGITS = re.compile(rb"\d{256}")  # more than a name has; tarfile up to Python 3.11.9 takes time by their square


@dataclass(frozen=True, order=True)
class TarMember:
    """A file inside a .tar."""

    tar: Path
    member: str  # its name in there
    offset: int  # bytes from the start of the .tar
    size: int  # bytes

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.tar.name}/{self.member}"

    def open(self) -> BinaryIO:
        """Opens it for reading; it cannot be read beyond its end."""
        return io.BufferedReader(_Slice(self))

    def read_bytes(self) -> bytes:
        """Reads all of it."""
        with self.open() as file:
            return file.read()


def tar_members(path: Path) -> Iterator[TarMember]:
    """The files in a .tar, in order, from their headers alone.

    Raises:
        DataError: It is no whole, uncompressed .tar, or holds anything but files and folders with plain names.
    """
    whole, end = path.stat().st_size, 0
    try:
        with _Bounded(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # which would hold every header
                _check(path, info, whole)
                end = info.offset_data + (-(-info.size // BLOCK) * BLOCK if info.isreg() else 0)
                if info.isreg():
                    yield TarMember(path, info.name, info.offset_data, info.size)
            file.seek(end)  # tarfile takes damage for the end
            if file.read(BLOCK) != bytes(BLOCK):
                raise DataError(
                    f"{path}: is truncated or damaged at byte {end:,} of {whole:,}, expected a header or the end mark "
                    "of a .tar. Copy or pack it again."
                )
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: cannot be read as a .tar ({error}), expected a whole and uncompressed one. Unpack a .tar.gz, or "
            "pack it again."
        ) from None


def _check(path: Path, info: tarfile.TarInfo, whole: int) -> None:
    """Raises DataError for what a shard of pictures has no use for."""
    kind = "link" if info.issym() or info.islnk() else "sparse file" if info.issparse() else "device or pipe"
    parts = info.name.split("/")
    if info.issparse() or not (info.isreg() or info.isdir()):
        found, expected = f"is a {kind}", "files and folders alone. Pack it again with the files themselves"
    elif info.name.startswith("/") or ".." in parts or "\0" in info.name:
        found, expected = "is no plain name", "names relative to the .tar, with /, without '..'. Pack it again"
    elif info.size < 0 or info.isreg() and info.offset_data + info.size > whole:
        found = f"is said to have {info.size:,} bytes from byte {info.offset_data:,} on"
        expected = f"at most the {whole:,} of the .tar: it is truncated or damaged. Copy or pack it again"
    else:
        return
    raise DataError(f"{path}: member {info.name!r:.100} {found}, expected {expected}.")


class _Bounded(io.FileIO):
    """A file of which no single read is larger than HEADER bytes, whatever a header declares."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= HEADER:
            raise DataError(f"{self.name}: a header is said to have {size} bytes, expected at most {HEADER:,}.")
        found = super().read(size)
        if size > BLOCK and DIGITS.search(found):
            raise DataError(f"{self.name}: a header holds a number of over 255 digits. Pack it again.")
        return found


class _Slice(io.RawIOBase):
    """The bytes of one member, as a file."""

    def __init__(self, member: TarMember):
        self._file, self._member, self._position = open(member.tar, "rb", buffering=0), member, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._member.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self._member.size - self._position))
        self._file.seek(self._member.offset + self._position)
        read = self._file.readinto(memoryview(buffer)[:count])
        self._position += read
        return read

    def close(self) -> None:
        self._file.close()
        super().close()
