"""From the names in a recipe to what a run trains with, through the host's loaders and this pack's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..loaders import folders
from ..loaders.dit import load_dit
from ..loaders.host import load_clip, load_dual_clip, load_vae
from ..loaders.mllm import load_mllm, mllm_from_clip
from .recipe import Models, Recipe, RecipeError


@dataclass
class Parts:
    """What the run trains with: the host's MODEL, VAE and CLIP (None: no pooled vector), this pack's MLLM, and the
    files to go on from."""

    model: Any
    vae: Any
    mllm: Any
    clip: Any = None
    start_dla: Path | None = None
    start_lora: Path | None = None


def load_parts(recipe: Recipe) -> Parts:
    """Loads what [models] names. Raises ValueError for a file that is missing or does not fit."""
    models = recipe.models
    for name in ("diffusion_model", "vae"):
        if not getattr(models, name):
            raise RecipeError(f"models.{name} is empty, expected {_meaning(name)}.")
    if bool(models.mllm) == bool(models.text_encoder):
        raise RecipeError(
            "Expected one of models.mllm and models.text_encoder, the MLLM as a folder or as a CLIP file."
        )
    if bool(models.clip) != bool(models.t5):
        raise RecipeError(
            "models.clip and models.t5 go together (the host's Load CLIP for FLUX), expected both or none."
        )
    dit = load_dit(models.diffusion_model, models.weight_dtype)
    if models.mllm:
        mllm = load_mllm(models.mllm, models.mllm_weight_dtype)
    else:
        clip = load_clip(models.text_encoder, models.text_encoder_type)
        mllm = mllm_from_clip(clip, models.text_encoder)
    pooled = load_dual_clip(models.clip, models.t5, "flux") if models.clip else None
    return Parts(dit, load_vae(models.vae), mllm, pooled, *starts(recipe))


def starts(recipe: Recipe) -> tuple[Path | None, Path | None]:
    """Files of the DLA and the LoRA that a run goes on from. Raises ValueError where they are not there."""
    import folder_paths

    run = recipe.run
    dla = folders.find("dla", run.start_dla) if run.start_dla else None
    lora = folder_paths.get_full_path_or_raise("loras", run.start_lora) if run.start_lora else None
    if lora and not recipe.lora.rank:
        raise RecipeError(f"run.start_lora is {run.start_lora!r}, but lora.rank is 0. Set the rank of that LoRA.")
    return dla, Path(lora) if lora else None


def homes(output: Path | None = None) -> tuple[Path, Path, tuple[Path, Path]]:
    """Folders under the host's output folder (or `output`) for runs and for what is cached, and those of finished DLAs
    and LoRAs: the first that the host knows for each."""
    import folder_paths

    base = Path(output or folder_paths.get_output_directory()) / "subject_dla"
    first = tuple(Path(folder_paths.get_folder_paths(kind)[0]) for kind in ("dla", "loras"))
    return base / "runs", base / "cache", first


def _meaning(name: str) -> str:
    return Models.__dataclass_fields__[name].metadata["help"]
