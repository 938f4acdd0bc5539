"""A folder that several processes fill at once: each entry is computed by one of them and read by the others.

An entry records its own key, a checksum and its pictures, so that one that was damaged, exchanged or made of a picture
that was replaced since, with the same size and time, is made again. 0.1.0's record nothing of it.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import comfy.model_management
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...common.locks import lock
from ...common.picture_files import PictureFile
from ...common.safetensors_header import read_header
from ...common.untrusted_json import parse_json
from ...loaders.encode_cache import checksum

log = logging.getLogger(__name__)

PAUSE = 0.05  # seconds between looks at an entry that another process computes
Entry = TypeVar("Entry")
Key = TypeVar("Key")


def record(key: str, pictures: Sequence[PictureFile], tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
    """The JSON text of an entry's metadata: `facts`, and what `read_entry` compares."""
    seen = [(_changed(picture), _sha256(picture)) for picture in pictures]
    return json.dumps({**facts, "entry": {"key": key, "check": _check(tensors, facts), "pictures": seen}})


def read_entry(
    file: Path, name: str, key: str, pictures: Sequence[PictureFile], problem: Callable[[dict[str, Tensor]], str]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and facts of an entry; None, with a line in the log, where there is none that can be used.

    Args:
        file: Of the entry.
        name: Of its metadata, which `record` made; 0.1.0 wrote none for latents.
        key: That it was saved under.
        pictures: That it was made of.
        problem: Why its tensors cannot be used; "" where they can.
    """
    if not file.exists():
        return None
    try:
        facts: dict[str, Any] = parse_json(read_header(file).metadata.get(name, "{}"))
        tensors = load_file(file)
        entry = facts.pop("entry", None)
        found = problem(tensors)
        if entry is None:
            if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                found = found or "has values that are NaN or infinite"
        elif entry["key"] != key:
            found = "is the entry of another key"
        elif entry["check"] != _check(tensors, facts):
            found = "was changed: its checksum is another one"
        elif len(entry["pictures"]) != len(pictures) or not all(map(_same, pictures, entry["pictures"])):
            found = "was made of another picture, which had the same size and time"
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        found = f"cannot be read ({error})"
    if found:
        log.warning("Subject DLA: the cache entry %s %s. It is made again.", file, found)
        return None
    return tensors, facts


def _check(tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
    sums = sorted((name, str(checksum(tensor))) for name, tensor in tensors.items())
    return hashlib.sha256(json.dumps([sums, facts], sort_keys=True).encode()).hexdigest()[:32]


def _changed(picture: PictureFile) -> int:
    """When a file's content or name was last changed, in ns; unlike the time of its content, nobody sets it (POSIX)."""
    return (picture if isinstance(picture, Path) else picture.tar).stat().st_ctime_ns


def _sha256(picture: PictureFile) -> str:
    return hashlib.sha256(picture.read_bytes()).hexdigest()[:32]


def _same(picture: PictureFile, seen: tuple[int, str]) -> bool:
    return _changed(picture) == seen[0] or _sha256(picture) == seen[1]


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
