"""A folder that several processes fill at once: each entry is computed by one of them and read by the others."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import comfy.model_management

from ...common.locks import lock

PAUSE = 0.05  # seconds between looks at an entry that another process computes
Entry = TypeVar("Entry")
Key = TypeVar("Key")


def compute_once(
    file: Path, read: Callable[[], Entry | None], compute: Callable[[], Entry], wait: bool = True
) -> Entry | None:
    """Reads an entry, or computes it while no other process does.

    Args:
        file: Of the entry.
        read: Reads it; None where it is missing or damaged.
        compute: Makes it and writes its file, atomically.
        wait: Whether to wait for another process that computes it at present; if that one dies, it is computed here.

    Returns:
        The entry; None where another process computes it at present and `wait` is not set.
    """
    while True:
        if (found := read()) is not None:
            return found
        file.parent.mkdir(parents=True, exist_ok=True)
        name = file.with_name(f".{file.name}.lock")
        left = name.exists()
        with lock(name) as held:
            if held:
                for part in file.parent.glob(f".{file.name}.*.part") if left else ():  # of a process that was killed
                    part.unlink(missing_ok=True)
                return compute() if (found := read()) is None else found
        if not wait:
            return None
        comfy.model_management.throw_exception_if_processing_interrupted()
        time.sleep(PAUSE)


def each(keys: Iterable[Key], get: Callable[[Key, bool], object]) -> None:
    """Calls `get(key, wait)` for every key, first without waiting: processes with the same keys share the work."""
    for key in [key for key in keys if get(key, False) is None]:
        get(key, True)
