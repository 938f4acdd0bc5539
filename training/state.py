"""Checkpoints of a run: folders that are whole or not there, from which it goes on bit for bit.

    FOLDER/checkpoint-00000500/{dla,lora,optimizer}.safetensors, state.json

Random numbers need no state (see flow.generator), nor do the rates, which are functions of the step.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..dla.checkpoint import load_dla, save_dla
from ..dla.files import sync
from .lora import LoRA

PREFIX = "checkpoint-"


def save(folder: Path, step: int, dla, lora: LoRA | None, optimizer, facts: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of `step`; a kill at any moment leaves it out or leaves it whole. The `keep` newest stay."""
    final = folder / f"{PREFIX}{step:08d}"
    if final in checkpoints(folder):
        return final  # this run has been here: it would be the same
    work = folder / f".{final.name}.part"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    save_dla(work / "dla.safetensors", dla)
    if lora is not None:
        lora.save(work / "lora.safetensors")
    tensors, numbers = _pack(optimizer.state_dict())
    save_file(tensors, work / "optimizer.safetensors")
    (work / "state.json").write_text(json.dumps({"step": step, "optimizer": numbers, **facts}), encoding="utf-8")
    for file in work.iterdir():
        sync(file)
    work.rename(final)
    if os.name == "posix":  # the rename itself
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    for path in [*checkpoints(folder)[:-keep], *folder.glob(f".{PREFIX}*")]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Whole ones, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / "state.json").is_file())


def read_facts(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


@torch.no_grad()
def restore(checkpoint: Path, dla, lora: LoRA | None, optimizer) -> int:
    """Puts everything back; returns the step. Raises ValueError where the file is damaged or of another shape."""
    facts = read_facts(checkpoint)
    dla.load_state_dict(load_dla(checkpoint / "dla.safetensors").state_dict())
    if lora is not None:
        lora.load(checkpoint / "lora.safetensors")
    optimizer.load_state_dict(_unpack(load_file(checkpoint / "optimizer.safetensors"), facts["optimizer"]))
    return facts["step"]


def _pack(state: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """An optimiser's state as tensors by name, and as JSON for the rest."""
    tensors, rest = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous().clone()
            else:
                rest[f"{index}.{name}"] = value
    return tensors, {"groups": state["param_groups"], "rest": rest}


def _unpack(tensors: dict[str, torch.Tensor], numbers: dict) -> dict:
    state: dict[int, dict] = {}
    for key, value in {**tensors, **numbers["rest"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": numbers["groups"]}
