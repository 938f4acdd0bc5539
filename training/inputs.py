"""What the inputs of Train DLA offer, and the data in the host's input folder. Imports nothing heavy."""

from pathlib import Path

import folder_paths

TRAINING_STAGES = ["1: MLLM tokens", "2: MLLM and VAE tokens"]
BESIDE = "beside the DLA"  # as start_lora: the LoRA that was trained with the connected DLA, which has its name
NONE = "none"
LISTS = (".json", ".jsonl")


def list_sources() -> list[str]:
    """Lists folders in the host's input folder, and the lists there and in these folders."""
    root = Path(folder_paths.get_input_directory())
    folders = [path for path in root.glob("*") if path.is_dir()]
    lists = [path for parent in (root, *folders) for path in parent.glob("*") if path.suffix.lower() in LISTS]
    names = (path.relative_to(root).as_posix() for path in (*folders, *lists))
    return sorted((name for name in names if not name.startswith(".")), key=str.lower)


def find_source(data: str | None) -> Path:
    """Returns the path of a listed source. Raises ValueError where it is not listed, or has nothing to train on."""
    if data not in (found := list_sources()):
        there = ", ".join(found[:20]) + (" and more" if len(found) > 20 else "") if found else "nothing of the kind"
        raise ValueError(
            f"Train DLA: no data {data!r} in ComfyUI's input folder; of folders and lists there is: {there}. Put a "
            "folder of subjects or a .json list there and press R."
        )
    path = Path(folder_paths.get_input_directory()) / data
    if path.is_dir() and not any(caption for pattern in ("*.txt", "*/*.txt") for caption in path.glob(pattern)):
        raise ValueError(
            f"Train DLA: the folder {data!r} has no captions, expected SUBJECT/PICTURE.jpg and SUBJECT/PICTURE.txt in "
            "it. If it holds a .json list, choose that list instead of the folder."
        )
    return path


def fingerprint_source(data: str | None) -> str:
    """Returns sizes and times of a source's files, so that changed data are read again."""
    source = Path(folder_paths.get_input_directory()) / (data or "linked")
    found = [path for path in (source, *sorted(source.rglob("*"))) if path.is_file()]
    return str([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found])
