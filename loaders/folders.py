"""The pack's own model folders, `models/mllm`, `models/dla` and `models/orientation`, among the host's.

Also in every folder that extra_model_paths.yaml gives for these names. Behind all of them are the folders of the demo's
models, so that the workflow `demo` runs in a plain install.
"""

import logging
import os
import shutil
from pathlib import Path

import folder_paths

from ..common.bootstrap import ROOT
from ..common.files import listed, name_problem

EXTENSIONS = {"mllm": {".safetensors"}, "dla": {".safetensors"}, "orientation": {".safetensors", ".pt"}}
FILES = {"dla": "DLA", "orientation": "orientation"}  # kinds that are single files, and their names in messages
DEMO_PICTURE = "toy-1.png"  # the reference of the workflow `demo`


def register() -> None:
    """Makes these folders known to the host; may be called again.

    Folders that its YAML names for them stay, and stay first where it says so; the extensions are set here, since the
    host would list every file under a new name. The demo's folders come last: a user's file of the same name is taken,
    and whatever saves models into a kind's first folder never chooses them.
    """
    for kind, extensions in EXTENSIONS.items():
        folder_paths.add_model_folder_path(kind, os.path.join(folder_paths.models_dir, kind))
        paths, _ = folder_paths.folder_names_and_paths[kind]
        folder_paths.folder_names_and_paths[kind] = (paths, set(extensions))
    for folder in sorted(path for path in (ROOT / "demo" / "models").glob("*") if path.is_dir()):
        folder_paths.add_model_folder_path(folder.name, str(folder))
        paths, _ = folder_paths.folder_names_and_paths[folder.name]
        paths.append(paths.pop(paths.index(str(folder))))  # also where others came after a first call


def copy_demo_picture() -> None:
    """Puts the demo's reference into the host's input folder, unless a file of that name is there.

    The host's Load Image reads that folder alone, and its editor marks as missing what was not in it at the start.
    """
    path = Path(folder_paths.get_input_directory()) / DEMO_PICTURE
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "demo" / "images" / DEMO_PICTURE, path)
    except OSError as error:
        logging.warning("Subject DLA: the workflow `demo` lacks its picture: %s", error)
    else:
        logging.info("Subject DLA: copied the demo's picture to %s", path)


def mllm_names() -> list[str]:
    """Names, with forward slashes and sorted, of the Hugging Face folders in any of `roots`.

    Those are the ones with a config.json, also one level deeper, as the owner/name that a download may leave.
    """
    found = set()
    for root in map(Path, roots("mllm")):
        for config in (*root.glob("*/config.json"), *root.glob("*/*/config.json")):
            name = config.parent.relative_to(root)
            if name.parts[0].startswith(".") or (config.parent.parent / "config.json").is_file():
                continue  # a download cache, or a part of the model above
            found.add(name.as_posix())
    return sorted(found, key=str.lower)


def files(kind: str) -> list[str]:
    """Files of a kind as the host lists them: names relative to `models/{kind}`, sorted."""
    return [name for name in folder_paths.get_filename_list(kind) if not name_problem(name)] if roots(kind) else []


def find(kind: str, name: str) -> Path:
    """The file or folder `name` of one of these kinds, in the first configured folder that has it.

    Raises ValueError where it leads out of these folders (absolute, or with ".."), is none on this system, or is not
    there.
    """
    problem = name_problem(name) if isinstance(name, str) and name else "is no text"
    if problem:
        raise ValueError(f"{name!r:.100} is no name in models/{kind}: it {problem}. Choose a file or folder in there.")
    if kind in FILES and Path(name).suffix.lower() not in EXTENSIONS[kind]:
        extensions = " or ".join(sorted(EXTENSIONS[kind], reverse=True))
        raise ValueError(f"{name!r:.100} is no {FILES[kind]} file: expected the extension {extensions}.")
    for root in roots(kind):
        if _exists(Path(root) / name):
            return Path(root) / name
    there = files(kind) if kind in FILES else mllm_names()
    raise ValueError(
        f"models/{kind} has no {name!r:.100}; it holds {listed(there)}. "
        f"Put it into {' or '.join(roots(kind)) or 'a folder that register() makes known'} and refresh."
    )


def _exists(path: Path) -> bool:
    """Whether something is there; what is no path on this system is not."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with NUL
        return False


def roots(kind: str) -> list[str]:
    """The folders in which files of a kind are looked for, first one first."""
    return list(folder_paths.folder_names_and_paths.get(kind, ([], set()))[0])
