"""The models that a recipe names, through the host's loaders and this pack's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.files import listed, name_problem
from ..loaders import folders
from ..loaders.dit import load_dit
from ..loaders.host import load_clip, load_dual_clip
from ..loaders.mllm import load_mllm, mllm_from_clip
from ..loaders.mllm.base import MLLM
from ..loaders.vae import load_vae
from .recipe import Models, Recipe, RecipeError


@dataclass
class TrainingModels:
    """The models that a run trains with, and the files that it starts from."""

    model: Any  # the host's MODEL
    vae: Any  # the host's VAE
    mllm: MLLM
    clip: Any = None  # the host's CLIP for the pooled vector; None = zeros
    start_dla: Path | None = None
    start_lora: Path | None = None


def load_models(recipe: Recipe) -> TrainingModels:
    """Loads the models of the recipe's [models]. Raises ValueError for a file that is missing or does not fit."""
    models = recipe.models
    for name in ("diffusion_model", "vae"):
        if not getattr(models, name):
            raise RecipeError(f"models.{name} is empty, expected {Models.__dataclass_fields__[name].metadata['help']}.")
    if bool(models.mllm) == bool(models.text_encoder):
        raise RecipeError(
            "Expected one of models.mllm and models.text_encoder, the MLLM as a folder or as a CLIP file."
        )
    if bool(models.clip) != bool(models.t5):
        raise RecipeError(
            "models.clip and models.t5 belong together (the host's Load CLIP for FLUX), expected both or none."
        )
    dit = load_dit(models.diffusion_model, models.weight_dtype)
    if models.mllm:
        mllm = load_mllm(models.mllm, models.mllm_weight_dtype)
    else:
        clip = load_clip(models.text_encoder, models.text_encoder_type)
        mllm = mllm_from_clip(clip, models.text_encoder)
    pooled = load_dual_clip(models.clip, models.t5, "flux") if models.clip else None
    return TrainingModels(dit, load_vae(models.vae), mllm, pooled, *start_files(recipe))


def start_files(recipe: Recipe) -> tuple[Path | None, Path | None]:
    """Finds the files of the DLA and the LoRA that a run starts from. Raises ValueError where they are missing."""
    run = recipe.run
    dla = folders.find("dla", run.start_dla) if run.start_dla else None
    lora = find_lora(run.start_lora) if run.start_lora else None
    if lora and not recipe.lora.rank:
        raise RecipeError(f"run.start_lora is {run.start_lora!r}, but lora.rank is 0. Set the rank of that LoRA.")
    return dla, lora


def find_lora(name: str) -> Path:
    """Finds a file under models/loras. Raises ValueError where it is missing."""
    import folder_paths

    path = None if name_problem(name) else folder_paths.get_full_path("loras", name)
    if path is None:
        there = listed(folder_paths.get_filename_list("loras"))
        raise ValueError(
            f"models/loras has no {name!r:.100}; it holds: {there}. Put the LoRA there and press R to refresh."
        )
    return Path(path)
