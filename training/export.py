"""A run's finished files: the DLA where Load DLA finds it, the LoRA where the host's own loader does."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.dtypes import DTYPES
from ..common.safetensors_header import read_header
from ..common.untrusted_json import parse_json
from ..dla.aggregator import DualLayerAggregator
from ..dla.checkpoint import read_config, save_dla
from .dit.lora import LoRA
from .paths import RunPaths
from .recipe import Recipe
from .reporting.progress import History

RUN_KEY = "subject_dla_run"


def export(paths: RunPaths, dla: DualLayerAggregator, lora: LoRA | None, dtype: str, made: dict[str, Any]) -> None:
    """Writes DLA and LoRA as they are now, each atomically, in a dtype of DTYPES, with their provenance `made`."""
    dla = copy.deepcopy(dla).to("cpu", DTYPES[dtype])
    dla.config = replace(dla.config, provenance=made)
    paths.dla.parent.mkdir(parents=True, exist_ok=True)
    save_dla(paths.dla, dla)
    if paths.lora is not None and lora is not None:
        paths.lora.parent.mkdir(parents=True, exist_ok=True)
        lora.save(paths.lora, DTYPES[dtype], {RUN_KEY: json.dumps(made)})


def check_free(paths: RunPaths, identity: str) -> None:
    """Raises ValueError where a target file was not made by the run of this identity, before anything is trained."""
    for path in filter(None, (paths.dla, paths.lora)):
        if path.exists() and _owner(path) != identity:
            raise ValueError(
                f"{path.parent.name}/{path.name} is there already and was not made by this run, so it would be lost. "
                "Choose another name for the run, or move that file."
            )


def provenance(recipe: Recipe, history: History, family: str, examples: int) -> dict[str, Any]:
    """Returns what a finished file says of its training; folders of the user's machine are left out."""
    settings = recipe.to_dict()
    for name in ("source", "validation_source"):
        settings["data"][name] = Path(settings["data"][name]).name
    last = history.losses[-50:]
    out: dict[str, Any] = {"stage": recipe.training.stage, "steps": history.step, "dit": family, "examples": examples}
    out["loss"] = round(sum(last) / max(1, len(last)), 6)
    if history.validation:
        rows = history.validation[max(history.validation)]
        out["held_out_loss"] = {f"{row.condition}, {row.bin}": round(row.mean, 6) for row in rows}
    return {**out, "run": history.identity, "recipe": settings}


def _owner(path: Path) -> str | None:
    """Identity of the run that made a file; None for other files."""
    try:
        metadata = read_header(path).metadata
        made = parse_json(metadata[RUN_KEY]) if RUN_KEY in metadata else read_config(path).provenance
        return made.get("run")
    except (OSError, ValueError, AttributeError):  # damaged, or of another kind
        return None
