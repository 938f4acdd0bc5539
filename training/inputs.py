"""What the inputs of Train DLA offer, and the data in the host's input folder. Imports nothing heavy."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path

import folder_paths

TRAINING_STAGES = ["1: MLLM tokens", "2: MLLM and VAE tokens"]
BESIDE = "beside the DLA"  # as start_lora: the LoRA that was trained with the connected DLA, which has its name
NONE = "none"
LISTS = (".json", ".jsonl", ".tar")


def list_sources() -> list[str]:
    """Lists folders in the host's input folder, and the lists and .tar shards there and in these folders."""
    root = Path(folder_paths.get_input_directory())
    folders = [path for path in root.glob("*") if path.is_dir()]
    lists = [parent / name for parent in (root, *folders) for name in _lists(parent, parent.stat().st_mtime_ns)]
    names = (path.relative_to(root).as_posix() for path in (*folders, *lists))
    return sorted((name for name in names if not name.startswith(".")), key=str.lower)


@lru_cache(maxsize=1024)
def _lists(folder: Path, changed: int) -> tuple[str, ...]:
    """The lists and shards in a folder, read again when it was changed: a million names take seconds."""
    with os.scandir(folder) as entries:
        return tuple(entry.name for entry in entries if os.path.splitext(entry.name)[1].lower() in LISTS)


def find_source(data: str | None) -> Path:
    """Returns the path of a listed source. Raises ValueError where it is not listed, or has nothing to train on."""
    if data not in (found := list_sources()):
        there = ", ".join(found[:20]) + (" and more" if len(found) > 20 else "") if found else "nothing of the kind"
        raise ValueError(
            f"Train DLA: no data {data!r} in ComfyUI's input folder; of folders and lists there is: {there}. Put a "
            "folder of subjects, a .json list or .tar shards there and press R."
        )
    path = Path(folder_paths.get_input_directory()) / data
    captions = (caption for pattern in ("*.tar", "*.txt", "*/*.txt") for caption in path.glob(pattern))
    if path.is_dir() and not any(captions):
        raise ValueError(
            f"Train DLA: the folder {data!r} has no captions, expected SUBJECT/PICTURE.jpg and SUBJECT/PICTURE.txt in "
            "it. If it holds a .json list, choose that list instead of the folder."
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
