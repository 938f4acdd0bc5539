"""What the inputs of Train DLA offer, and the data in the host's input folder. Imports nothing heavy."""

import hashlib
import os
import sys
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import folder_paths

from ..common.files import folded, listed, path_problem
from ..common.picture_files import PICTURES

TRAINING_STAGES = ["1: MLLM tokens", "2: MLLM and VAE tokens"]
BESIDE = "beside the DLA"  # as start_lora: the LoRA that was trained with the connected DLA, which has its name
NONE = "none"
NO_DATA = (
    "no training data in input/"  # offered where there is nothing: the host refuses an empty list in its own words
)
LISTS = (".json", ".jsonl", ".tar")
NAMES = 100_000  # most names of a folder that are read for an offer: half a second


def list_sources() -> list[str]:
    """Lists what can be trained on in the host's input folder, and for lists and .tar shards also in its folders."""
    root = Path(folder_paths.get_input_directory())
    top = _look(root)
    found = [*top.lists, *(name for name in top.folders if _trains(root / name))]
    found += [f"{name}/{one}" for name in top.folders for one in _look(root / name).lists]
    return sorted(found, key=str.lower)


class _Names(NamedTuple):
    """What is in a folder."""

    lists: tuple[str, ...]
    folders: tuple[str, ...]
    captioned: bool  # whether a picture has a caption


def _look(folder: Path, most: int = NAMES) -> _Names:
    """What the first names in a folder are; nothing where it cannot be read."""
    try:
        return _read(folder, folder.stat().st_mtime_ns, most)
    except OSError:
        return _Names((), (), False)


@lru_cache(maxsize=4096)
def _read(folder: Path, changed: int, most: int) -> _Names:
    """The same, read again only when the folder was changed: a million names take seconds."""
    lists, folders, pictures, captions = [], [], [], set()
    with os.scandir(folder) as entries:
        names = list(islice(entries, most))
    for entry in names:
        stem, suffix = os.path.splitext(entry.name)
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            folders.append(entry.name)
        elif suffix.lower() == ".txt":
            captions.add(folded(stem))
        elif suffix.lower() in PICTURES:
            pictures.append(stem)
        elif suffix.lower() in LISTS:
            lists.append(entry.name)
    captioned = any(folded(stem) in captions for stem in pictures)
    if len(names) == most and not captioned:  # the rest is not read: these may come first, and their others later
        captioned = bool(captions) or any(
            (folder / f"{stem}{suffix}").is_file() for stem in pictures[:100] for suffix in (".txt", ".TXT")
        )
    return _Names(tuple(lists), tuple(folders), captioned)


def _trains(folder: Path, most: int = NAMES) -> bool:
    """Whether shards, or pictures with captions, are in a folder; so many names of it and of its folders are read."""
    top = _look(folder, most)
    if top.captioned or any(name.lower().endswith(".tar") for name in top.lists):
        return True
    inner = [folder / name for name in top.folders]
    some = inner[: most // 1000]  # with more, who knows
    return len(some) < len(inner) or any(_look(one, most // len(some)).captioned for one in some)


def find_source(data: str | None) -> Path:
    """Returns the path of a source. Raises ValueError where it is none, or has nothing to train on.

    What is not offered is taken, too, where it is a folder or a list in the place of those: a saved workflow's, or one
    behind more names than are read for the offer.
    """
    root = Path(folder_paths.get_input_directory())
    path = root / data if isinstance(data, str) else root
    parts = path.relative_to(root).parts if path.is_relative_to(root) else ()
    plain = "/".join(parts) == data and not any(part.startswith(".") for part in parts) and not path_problem(data)
    if plain and len(parts) <= 2 and path.is_file() and path.suffix.lower() in LISTS:
        return path
    if not (plain and len(parts) == 1 and path.is_dir()):
        found = list_sources()
        there = listed(found)
        chosen = "no data is chosen" if data in ("", NO_DATA) else f"no data {data!r:.100}"
        raise ValueError(
            f"Train DLA: {chosen} in ComfyUI's input folder; of folders and lists there is: {there}. Put a folder of "
            "subjects, a .json list or .tar shards there, press R and choose it."
        )
    if not _trains(path, sys.maxsize):
        raise ValueError(
            f"Train DLA: the folder {data!r} has no captions beside its pictures, expected SUBJECT/PICTURE.jpg and "
            "SUBJECT/PICTURE.txt in it. If it holds a .json list, choose that list instead of the folder."
        )
    return path


def fingerprint_source(data: str | None) -> str:
    """Returns sizes and times of a source's files, so that changed data are read again."""
    source = Path(folder_paths.get_input_directory()) / (data or "linked")
    if source.is_file():
        return str([(str(source), source.stat().st_size, source.stat().st_mtime_ns)])
    found = hashlib.sha256()
    for folder, folders, files in os.walk(source):
        folders.sort()
        for path in (os.path.join(folder, name) for name in sorted(files)):
            if os.path.isfile(path):
                status = os.stat(path)
                found.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogatepass"))
    return found.hexdigest()
