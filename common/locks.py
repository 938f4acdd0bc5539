"""Locks between processes, also of machines that share a folder, which the system drops when their holder dies."""

import errno
import logging
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger(__name__)
BYTE = 1 << 30  # the one that Windows locks, which nobody can read then: far behind the text
FLAGS = getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}  # of a file system that has none


@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Tries to hold the lock file `path` inside, and yields whether it does; the file says who holds it.

    A lock belongs to an open file, so that it ends with its process, however that ends; a file that a killed process
    left behind is in nobody's way. Where a file system has no locks, the log says so and everyone holds it.
    """
    handle = _take(path)
    try:
        if handle is not None:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode())
        yield handle is not None
    finally:
        if handle is not None:
            _release(handle, path)


def holder(path: Path) -> str:
    """Returns what the lock file `path` says of its holder."""
    with suppress(OSError):
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(200).strip() or "another process"
    return "another process"


def _take(path: Path) -> int | None:
    """An open file that holds the lock; None where another one does."""
    while True:
        try:  # not through a link that a folder from elsewhere has there: its target would be emptied
            handle = os.open(path, os.O_RDWR | os.O_CREAT | FLAGS, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise OSError(errno.ELOOP, "It is a link, expected a file of its own. Remove it", str(path)) from None
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(errno.EEXIST, "It is a pipe, socket or device, expected a file. Remove it", str(path))
            if sys.platform == "win32":
                os.lseek(handle, BYTE, os.SEEK_SET)
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(handle)
                if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                    return None
                raise
            log.warning("%s: its file system has no locks (%s), so nothing keeps processes apart", path.parent, error)
        os.ftruncate(handle, 0)
        with suppress(FileNotFoundError):
            if sys.platform == "win32" or os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # its last holder removed it between the two calls


def _release(handle: int, path: Path) -> None:
    """Removes the file and gives up its lock."""
    if sys.platform == "win32":  # removes no open file
        os.lseek(handle, BYTE, os.SEEK_SET)
        with suppress(OSError):
            msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
        os.close(handle)
        with suppress(OSError):  # the next one has opened it
            path.unlink()
    else:
        path.unlink(missing_ok=True)
        os.close(handle)
