"""Checkpoints of a run: folders that are whole or not there, from which it resumes bit for bit.

    FOLDER/checkpoint-00000500/{dla,lora,optimizer}.safetensors, state.json

state.json has a checksum of each other file and of itself; 0.1.0's had none. A damaged checkpoint is put aside, and
the one before it is taken.

Random numbers need no state (see flow.generator), nor do the rates, which are functions of the step.
"""

import hashlib
import json
import math
import os
import re
import reprlib
import shutil
from collections.abc import Callable
from dataclasses import fields
from functools import reduce
from itertools import count
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from ..common.files import file_problem, sync
from ..common.safetensors_header import read_header
from ..common.untrusted_json import read_json
from ..dla.aggregator import DualLayerAggregator
from ..dla.checkpoint import check_finite, load_dla, read_config, save_dla
from ..dla.config import DLAConfig
from .dit.lora import LoRA
from .recipe import Recipe, RecipeError
from .reporting.losses import is_loss

PREFIX = "checkpoint-"
# Settings that a run keeps; the others may change when it is resumed.
FIXED = ("dla", "lora.rank", "lora.alpha", "training.stage", "training.seed", "training.optimizer")
FILES = ("dla.safetensors", "optimizer.safetensors", "state.json")
LONGEST = 2**29  # bytes of a state.json; the losses of a million steps have 20 MB
# What a run resumes from, beside the weights, in state.json.
ENTRIES: dict[str, type] = {
    "step": int, "losses": list, "validation": dict, "identity": str, "recipe": dict, "mllm": str, "family": str,
    "data": dict, "optimizer": dict,
}  # fmt: skip
T = TypeVar("T")
NAMES = {int: "a whole number", list: "a list", dict: "an object", str: "text"}


class CheckpointError(ValueError):
    """A checkpoint from which no run can be resumed; the text says which one and what to do."""

    def __init__(self, checkpoint: Path, problem: str):
        super().__init__(f"{checkpoint.parent.name}/{checkpoint.name}: {problem}")
        self.checkpoint = checkpoint


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are damaged, missing, or of another one."""

    def __init__(self, checkpoint: Path, problem: str):
        way_out = "Move this folder away to resume from the checkpoint before it, or to begin anew."
        problem = problem if len(problem) < 1000 else f"{problem[:1000]} ..."
        super().__init__(checkpoint, f"{problem.rstrip('.')}. {way_out}")
        self.problem = problem


class Resumed(NamedTuple):
    """What a run resumes from."""

    checkpoint: Path
    state: dict[str, Any]  # that `save` got, and the step
    moments: dict[int, dict[str, Any]]  # as a state_dict of the optimizer has them under "state"
    problems: tuple[str, ...]  # a line for each newer checkpoint, which is damaged and was put aside


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
    state = {"step": step, "optimizer": rest, **state}
    state["files"] = {file.name: _content(file) for file in sorted(work.iterdir())}
    state = json.loads(json.dumps(state))  # keys are texts, as when it is read
    (work / "state.json").write_text(json.dumps({**state, "checksum": _checksum(state)}), encoding="utf-8")
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
    file = checkpoint / "state.json"
    try:
        state = read_json(file, longest=LONGEST)
    except ValueError as error:
        raise DamagedCheckpointError(checkpoint, str(error).replace(str(file), file.name)) from None
    checksum = state.pop("checksum", None)
    if problem := _state_problem(checkpoint, state):
        raise DamagedCheckpointError(checkpoint, f"state.json: {problem}")
    if (checksum is not None or "files" in state) and checksum != _checksum(state):
        raise DamagedCheckpointError(checkpoint, "state.json was changed or damaged: its checksum is another one")
    return state


def newest_state(folder: Path) -> dict[str, Any] | None:
    """Reads the state of the newest checkpoint of which it can be read; None where there is none.

    Raises CheckpointError where there are checkpoints, and none can be read.
    """
    return _first(folder, read_state)


def resume(folder: Path, check: Callable[[dict], object], *trained: Any) -> Resumed | None:
    """Loads the newest checkpoint that is whole, and puts those aside that are newer; None where there is none.

    Args:
        folder: Of the run.
        check: Gets a checkpoint's state and raises where it is of another run, before its weights are read.
        trained: DLA, LoRA and optimizer, see `restore`.

    Raises CheckpointError where there are checkpoints and none is whole, or the DLA has another config.
    """
    problems: list[DamagedCheckpointError] = []
    for checkpoint in reversed(_folders(folder)):
        try:
            state = read_state(checkpoint)
            check(state)
            moments = restore(checkpoint, *trained)
        except DamagedCheckpointError as error:
            problems.append(error)
            continue
        lines = tuple(_put_aside(folder, error, checkpoint.name) for error in problems)
        return Resumed(checkpoint, state, moments, lines)
    if problems:
        raise problems[0]
    return None


def check_same_run(state: dict[str, Any], recipe: Recipe) -> None:
    """Raises RecipeError where a checkpoint's state is of a run with other FIXED settings."""
    try:
        begun = Recipe.from_dict(state["recipe"]).to_dict()  # options that are newer than the run have their defaults
    except RecipeError as error:
        raise RecipeError(
            f"Run '{recipe.run.name}' was begun with settings that cannot be read ({error}) Resume it with the version "
            "of this pack that began it, or choose another name to begin a new one."
        ) from None
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

    def read(checkpoint: Path) -> DLAConfig:
        try:
            return read_config(checkpoint / "dla.safetensors")
        except ValueError as error:
            raise DamagedCheckpointError(checkpoint, str(error)) from None

    config = _first(folder, read)
    if config is None:
        return None
    return config.scores if config.pooling == "softmax" and config.modalities != "last" else None


@torch.no_grad()
def restore(
    checkpoint: Path, dla: DualLayerAggregator, lora: LoRA | None, optimizer: Optimizer
) -> dict[int, dict[str, Any]]:
    """Loads the weights; returns the moments, as a state_dict of the `optimizer` has them under "state".

    Raises CheckpointError where a file is damaged, or the DLA has another config than the one that is trained now.
    """
    state = read_state(checkpoint)
    try:
        for name, content in state.get("files", {}).items():
            path = checkpoint / Path(str(name)).name
            if problem := file_problem(path):
                raise ValueError(f"{path.name} {problem}")
            if path.stat().st_size != content["bytes"] or _content(path) != content:
                raise ValueError(f"{path.name} was changed or damaged: its checksum is not the one in state.json")
        saved = load_dla(checkpoint / "dla.safetensors")
        read_header(checkpoint / "optimizer.safetensors")
        moments = _unpack(load_file(checkpoint / "optimizer.safetensors"), state["optimizer"])
    except MemoryError as error:  # it may be whole
        raise CheckpointError(checkpoint, f"its files do not fit into memory ({error}). Free some.") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(checkpoint, str(error)) from None
    for field in fields(saved.config):
        before, now = getattr(saved.config, field.name), getattr(dla.config, field.name)
        if before != now and field.name != "provenance":
            raise CheckpointError(
                checkpoint,
                f"its DLA has {field.name} {before}, the one to train has {now}. Put back the MLLM and the DLA that "
                "the run began with, or choose another run name to begin a new one.",
            )
    if lora is not None:
        try:
            lora.load(checkpoint / "lora.safetensors")
        except ValueError as error:
            raise DamagedCheckpointError(checkpoint, str(error)) from None
    if problem := _moments_problem(moments, optimizer):
        raise DamagedCheckpointError(checkpoint, f"optimizer.safetensors: {problem}")
    dla.load_state_dict(saved.state_dict())
    return moments


def _folders(folder: Path) -> list[Path]:
    """Every checkpoint, oldest first, also where files of it are missing."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d{{8,}}", path.name))


def _first(folder: Path, read: Callable[[Path], T]) -> T | None:
    """What `read` makes of the newest checkpoint for which it raises no DamagedCheckpointError."""
    first = None
    for checkpoint in reversed(_folders(folder)):
        try:
            return read(checkpoint)
        except DamagedCheckpointError as error:
            first = first or error
    if first:
        raise first
    return None


def _put_aside(folder: Path, error: DamagedCheckpointError, instead: str) -> str:
    """Renames a damaged checkpoint, so that the run can save that step again; a line that says so."""
    name = str(error.checkpoint.name)
    aside = next(path for n in count() if not (path := folder / f"damaged{n or ''}-{name}").exists())
    error.checkpoint.rename(aside)
    return f"{name} is damaged ({error.problem}), so {instead} is taken. It was renamed to {aside.name}."


def _content(file: Path) -> dict[str, Any]:
    found = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(2**20):
            found.update(part)
    return {"bytes": file.stat().st_size, "sha256": found.hexdigest()}


def _checksum(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _state_problem(checkpoint: Path, state: dict) -> str:
    """Why nothing can resume from a state; "" where a run can."""
    for name, kind in ENTRIES.items():
        if type(state.get(name)) is not kind:
            found = f"is {reprlib.repr(state[name])}" if name in state else "is missing"
            return f"{name} {found}, expected {NAMES[kind]}"
    step, losses = state["step"], state["losses"]
    if step < 1 or checkpoint.name != f"{PREFIX}{step:08d}":
        return f"step is {step}, expected the {checkpoint.name.removeprefix(PREFIX).lstrip('0')} of the folder's name"
    if len(losses) != step:
        return f"losses has {len(losses):,} entries, expected one for each of {step:,} steps"
    for number, loss in enumerate(losses, 1):
        if type(loss) not in (int, float) or not math.isfinite(loss):
            return f"losses has {reprlib.repr(loss)} at step {number}, expected a finite number"
    if type(state["data"].get("fingerprint")) is not str:
        return "data has no fingerprint, expected text"
    for at, rows in state["validation"].items():
        if not at.isdecimal() or len(at) > 9 or not isinstance(rows, list) or not all(map(is_loss, rows)):
            return f"validation has {reprlib.repr(rows)} at step {at:.20}, expected a list of losses"
    return ""


def _moments_problem(moments: dict, optimizer: Optimizer) -> str:
    """Why an optimizer cannot go on from these moments; "" where it can."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if more := sorted(set(moments) - set(range(len(parameters)))):
        return f"has an entry {more[0]}, expected those of {len(parameters)} parameters"
    needed = ("step", "exp_avg", "exp_avg_sq") if isinstance(optimizer, torch.optim.AdamW) else ("step",)
    for index, parameter in enumerate(parameters):
        values = moments.get(index, {})
        for name in (*needed, *values):
            entry, value = f"{index}/{name}", values.get(name)
            if value is None:
                return f"{entry} is missing"
            if isinstance(value, dict) and name not in needed:  # bitsandbytes nests what it quantises
                if not _is_finite(value):
                    return f"{entry} has values that are NaN or infinite"
                continue
            if not isinstance(value, (int, float, torch.Tensor)):
                return f"{entry} is {reprlib.repr(value)}, expected a number"
            numbers = value if isinstance(value, torch.Tensor) else torch.tensor(value)
            shape = tuple(parameter.shape)
            if name.startswith("exp_avg") and (tuple(numbers.shape) != shape or not numbers.is_floating_point()):
                return f"{entry} is {numbers.dtype} of shape {tuple(numbers.shape)}, expected floats of shape {shape}"
            if not bool(numbers.isfinite().all()):
                return f"{entry} has values that are NaN or infinite"
            if name == "step" and isinstance(value, torch.Tensor) and not value.is_floating_point():
                return f"{entry} is {value.dtype}, expected a float"
            if name in ("step", "exp_avg_sq") and (
                name == "step" and numbers.numel() != 1 or bool((numbers < 0).any())
            ):
                return f"{entry} is below 0 or no number"
    return ""


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, torch.Tensor) or bool(value.isfinite().all())


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
            if not isinstance(entry, dict):
                raise ValueError(f"optimizer.safetensors: {path} is inside of {name}, which is a tensor")
        entry[last] = value
    return state
