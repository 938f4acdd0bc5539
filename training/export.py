"""A run's finished files: the DLA where Load DLA finds it, the LoRA where the host's own loader does."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..dla.checkpoint import DLACheckpointError, read_config, save_dla

RUN_KEY = "subject_dla_run"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(run) -> tuple[Path, Path | None]:
    """Writes DLA and LoRA of a Run as they are now; atomic each."""
    dla_path, lora_path = places(run)
    dtype = DTYPES[run.recipe.run.dtype]
    dla = copy.deepcopy(run.dla).to("cpu", dtype)
    dla.config = replace(dla.config, provenance=provenance(run))
    dla_path.parent.mkdir(parents=True, exist_ok=True)
    save_dla(dla_path, dla)
    if lora_path is not None:
        lora_path.parent.mkdir(parents=True, exist_ok=True)
        run.lora.save(lora_path, dtype, {RUN_KEY: json.dumps(provenance(run))})
    return dla_path, lora_path


def places(run) -> tuple[Path, Path | None]:
    dla, lora = (folder / f"{run.recipe.run.name}.safetensors" for folder in run.places)
    return dla, lora if run.recipe.lora.rank else None


def check_free(run) -> None:
    """Raises ValueError where a file of this name belongs to somebody else, before anything is trained. run: a Run, or
    anything with the recipe, places and identity of one."""
    dla, lora = places(run)
    for path in filter(None, (dla, lora)):
        if path.exists() and _owner(path) != run.identity:
            raise ValueError(
                f"{path.parent.name}/{path.name} is there already and was not made by this run, so it would be lost. "
                "Choose another name for the run, or move that file."
            )


def _owner(path: Path) -> str | None:
    try:
        metadata = _metadata(path) or {}
        made = json.loads(metadata[RUN_KEY]) if RUN_KEY in metadata else read_config(path).provenance
        return made.get("run")
    except (DLACheckpointError, SafetensorError, OSError, ValueError, AttributeError):
        return None


def _metadata(path: Path) -> dict | None:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def provenance(run) -> dict:
    """What a finished file says of its training; folders of the user's machine are left out."""
    recipe = run.recipe.to_dict()
    for name in ("source", "validation_source"):
        recipe["data"][name] = Path(recipe["data"][name]).name
    out = {
        "stage": run.recipe.training.stage,
        "steps": run.step,
        "dit": run.backbone.family.name,
        "examples": len(run.data.training),
        "loss": round(sum(run.losses[-50:]) / max(1, len(run.losses[-50:])), 6),
    }
    if run.validation:
        rows = run.validation[max(run.validation)]
        out["held_out_loss"] = {f"{row.condition}, {row.stage}": round(row.mean, 6) for row in rows}
    return {**out, "run": run.identity, "recipe": recipe}
