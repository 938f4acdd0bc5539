"""Checkpoints of a run: folders that are whole or not there, from which it resumes bit for bit.

    FOLDER/checkpoint-00000500/{dla,lora,optimizer}.safetensors, state.json

Random numbers need no state (see flow.generator), nor do the rates, which are functions of the step.
"""

import json
import os
import shutil
from dataclasses import fields
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..common.files import sync
from ..dla.aggregator import DualLayerAggregator
from ..dla.checkpoint import check_finite, load_dla, read_config, save_dla
from .dit.lora import LoRA
from .recipe import Recipe, RecipeError

PREFIX = "checkpoint-"
# Settings that a run keeps; the others may change when it is resumed.
FIXED = ("dla", "lora.rank", "lora.alpha", "training.stage", "training.seed", "training.optimizer")
FILES = ("dla.safetensors", "optimizer.safetensors", "state.json")


class CheckpointError(ValueError):
    """A checkpoint from which no run can be resumed; the text says which one and what to do."""

    def __init__(self, checkpoint: Path, problem: str):
        super().__init__(f"{checkpoint.parent.name}/{checkpoint.name}: {problem}")


def save(
    folder: Path, step: int, dla: DualLayerAggregator, lora: LoRA | None, moments: dict, state: dict, keep: int
) -> Path:
    """Writes the checkpoint of `step`, whole or not at all, and keeps the `keep` newest.

    `moments` is the state of the optimizer's state_dict, `state` what else the run needs to resume, as JSON can hold
    it. Raises ValueError for weights that are not finite; earlier checkpoints stay then.
    """
    final = folder / f"{PREFIX}{step:08d}"
    if final in checkpoints(folder):
        return final  # written before: it would be the same
    work = folder / f".{final.name}.part"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    save_dla(work / "dla.safetensors", dla)
    if lora is not None:
        check_finite(work / "lora.safetensors", lora.weights())
        lora.save(work / "lora.safetensors")
    tensors, rest = _pack(moments)
    save_file(tensors, work / "optimizer.safetensors")
    (work / "state.json").write_text(json.dumps({"step": step, "optimizer": rest, **state}), encoding="utf-8")
    for file in work.iterdir():
        sync(file)
    _sync_folder(work)
    if final.exists():  # files were taken out of it
        _remove(final)
    work.rename(final)
    _sync_folder(folder)
    for path in checkpoints(folder)[:-keep]:
        _remove(path)
    for path in folder.glob(f".{PREFIX}*"):  # unfinished ones of an earlier process
        shutil.rmtree(path, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Returns the whole checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if all((path / name).is_file() for name in FILES))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Reads the `state` that `save` got, and the step. Raises CheckpointError."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return {**state, "step": int(state["step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(checkpoint, f"state.json cannot be read ({error!r})") from None


def check_same_run(state: dict[str, Any], recipe: Recipe) -> None:
    """Raises RecipeError where a checkpoint's state is of a run with other FIXED settings."""
    begun = Recipe.from_dict(state["recipe"]).to_dict()  # options that are newer than the run have their defaults
    given = recipe.to_dict()
    for values in (begun, given):
        del values["dla"]["scores"]  # 0.1.0 did not record them: see begun_scores
    for key in FIXED:
        before, now = (reduce(getitem, key.split("."), values) for values in (begun, given))
        if before != now:
            raise RecipeError(
                f"Run '{recipe.run.name}' was begun with {key} = {before}, now it is {now}. Put it back to resume that "
                "run, or choose another name to begin a new one."
            )


def begun_scores(folder: Path) -> str | None:
    """Returns the `scores` of the DLA that a run in `folder` has begun with; None where there is none, or no matter.

    Raises CheckpointError where that DLA cannot be read.
    """
    found = checkpoints(folder)
    if not found:
        return None
    try:
        config = read_config(found[-1] / "dla.safetensors")
    except ValueError as error:
        raise _damaged(found[-1], str(error)) from None
    return config.scores if config.pooling == "softmax" and config.modalities != "last" else None


@torch.no_grad()
def restore(checkpoint: Path, dla: DualLayerAggregator, lora: LoRA | None) -> dict[int, dict[str, Any]]:
    """Loads the weights; returns the moments, as a state_dict of the optimizer has them under "state".

    Raises CheckpointError where a file is damaged, or the DLA has another config than the one that is trained now.
    """
    state = read_state(checkpoint)
    try:
        saved = load_dla(checkpoint / "dla.safetensors")
        moments = _unpack(load_file(checkpoint / "optimizer.safetensors"), state["optimizer"])
        if lora is not None:
            lora.load(checkpoint / "lora.safetensors")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(checkpoint, str(error)) from None
    for field in fields(saved.config):
        before, now = getattr(saved.config, field.name), getattr(dla.config, field.name)
        if before != now and field.name != "provenance":
            raise CheckpointError(
                checkpoint,
                f"its DLA has {field.name} {before}, the one to train has {now}. Put back the MLLM and the DLA that "
                "the run began with, or choose another run name to begin a new one.",
            )
    dla.load_state_dict(saved.state_dict())
    return moments


def _damaged(checkpoint: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        checkpoint, f"{problem}. Move this folder away to resume from the checkpoint before it, or to begin anew."
    )


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint; `checkpoints` does not list it any more, whatever ends the process meanwhile."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Waits until the names in a folder have reached the disk."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _pack(state: dict, path: str = "") -> tuple[dict[str, torch.Tensor], dict]:
    """An optimiser's state, which may be nested, as tensors by path and as JSON for the rest."""
    tensors, rest = {}, {}
    for name, value in state.items():
        if isinstance(value, dict):
            inner, numbers = _pack(value, f"{path}{name}/")
            tensors, rest = tensors | inner, rest | numbers
        elif isinstance(value, torch.Tensor):
            tensors[f"{path}{name}"] = value.detach().cpu().contiguous().clone()
        else:
            rest[f"{path}{name}"] = value
    return tensors, rest


def _unpack(tensors: dict[str, torch.Tensor], rest: dict) -> dict:
    state: dict = {}
    for path, value in {**tensors, **rest}.items():
        index, *names, last = path.split("/")
        entry = state.setdefault(int(index), {})
        for name in names:
            entry = entry.setdefault(name, {})
        entry[last] = value
    return state
