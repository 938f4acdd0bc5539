"""Combos of files: what there is to choose, a clear word when the choice is gone, a fingerprint of what is on disk."""

import textwrap
from pathlib import Path
from unicodedata import category

import folder_paths

from ..common.files import listed, path_problem, save_text
from ..loaders import folders
from . import queued_graph
from .marks import Marks
from .schema import NONE

KINDS = {
    "mllm": "a Hugging Face folder (config.json, tokenizer and *.safetensors)",
    "dla": "a .safetensors file made by this pack's training",
    "orientation": "an Orient Anything V1 file (.pt or .safetensors)",
    "diffusion_models": "the DiT's weights",
    "vae": "the VAE's weights",
    "loras": "a LoRA of the diffusion model",
}


def options(kind: str) -> list[str]:
    """The names a combo of that kind offers now."""
    return folders.mllm_names() if kind == "mllm" else folder_paths.get_filename_list(kind)


def missing(kind: str, name: str | None) -> str | None:
    """None where `name` can be loaded, else what is wrong and what to do. A linked input is known only later."""
    if not isinstance(name, str) or name in (found := options(kind)):
        return None
    there = listed(found)
    return f"models/{kind} has no {name!r:.100}; it holds: {there}. Put {KINDS[kind]} there and press R to refresh."


def check(**kinds: str) -> Marks:
    """The `validate_inputs` of a node whose inputs name files: each input whose file is missing is marked, with why.

    Args:
        kinds: Of file, by input.
    """

    def absent(node_id: str) -> dict[str, str | None]:
        given = queued_graph.queued(node_id)
        names = {name: given.get(name) for name in kinds}
        return {name: missing(kinds[name], None if value == NONE else value) for name, value in names.items()}

    return Marks(absent)


def require(**names: str | None) -> None:
    """Raises ValueError for files that are missing, also where their names came from other nodes."""
    if found := [text for kind, name in names.items() if (text := missing(kind, name))]:
        raise ValueError("\n".join(found))


def fingerprint(kind: str, name: str | None) -> str:
    """Size and time of the file, or of every file of the folder: a replaced file is read again."""
    roots = (Path(root) / name for root in folder_paths.get_folder_paths(kind)) if name else ()
    path = next((path for path in roots if path.exists()), None)
    if path is None:
        return str(name)
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [(file.name, file.stat() if file.exists() else file.lstat()) for file in found]  # a link may lead nowhere
    return str([(name, status.st_size, status.st_mtime_ns) for name, status in found])


def file_names(texts: list[str], prefix: str = "") -> list[str]:
    """For each text `prefix`, its number and a slug of it in any script: `subject/02-a-duck-on-sand`."""
    width = max(2, len(str(len(texts))))
    words = ("".join(c if category(c)[0] in "LMN" else " " for c in text[:200].lower()).split() for text in texts)
    slugs = (textwrap.shorten(" ".join(w[:40] for w in found), 40, placeholder="").replace(" ", "-") for found in words)
    return [prefix + "-".join(filter(None, [f"{n:0{width}}", slug])) for n, slug in enumerate(slugs, 1)]


def report_path(prefix: str) -> Path:
    """Where the next report goes, without extension: in the host's output folder, numbered as its Save Image does.

    Made before a node's work begins. Links in that folder are followed where the host does: older ones do.

    Raises:
        ValueError: For a prefix that leads out of the output folder, or is no path on every system.
    """
    root = Path(folder_paths.get_output_directory())
    if problem := path_problem(prefix):
        raise ValueError(
            f"filename_prefix is {prefix!r:.100}, which {problem}. Reports are not written "
            "outside the output folder: expected a name in it, with folders or without, such as reports/fox."
        )
    try:
        folder, name, counter, *_ = folder_paths.get_save_image_path(prefix, str(root))
    except Exception as error:  # the host's own for a link that leads out, else the system's
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0].strip("* ")
        raise ValueError(f"filename_prefix is {prefix!r:.100}, where nothing can be written ({reason}).") from error
    return Path(folder) / f"{name}_{counter:05}_"


def save_reports(path: Path, **contents: str) -> None:
    """Writes texts beside each other; `contents` by extension. Raises ValueError where that cannot be done."""
    for extension, content in contents.items():
        file = path.with_name(f"{path.name}.{extension}")
        try:
            save_text(file, content)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"{file} cannot be written ({reason}). Free space or choose another folder.") from error
