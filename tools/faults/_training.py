"""Faults in a running server while it trains."""

import hashlib
import shutil
from typing import Any

from ...demo.family.layout import NAMES
from ...tests.small.prompts import make_node
from ..comfy_client.client import Client, HostError, WorkflowError, failure
from ..comfy_client.server import Server
from ._faults import Faults, inject, until
from ._server import wait

TRAINING = {
    "reading the data": (".training.build:build", 1),
    "encoding with the MLLM": (".training.data.feature_cache:FeatureSource._encode", 2),
    "encoding with the VAE": (".training.data.latent_cache:LatentCache._encode", 2),
    "the first step": (".training.step:TrainingStep.forward", 1),
    "a later step": (".training.step:TrainingStep.forward", 4),
    "validating": (".training.run:_Run._validate", 2),
    "drawing samples": (".training.run:_Run._sample", 2),
    "saving a checkpoint": (".training.checkpoints:save", 3),
    "writing the finished files": (".training.export:export", 2),
}
# Where a run is while it saves: before, between and after the files of a checkpoint, its report and what is finished.
SAVING = {
    "the first checkpoint's DLA": (".dla.checkpoint:save_dla", 1),
    "the third checkpoint's DLA": (".dla.checkpoint:save_dla", 5),
    "its optimizer's state": ("safetensors.torch:save_file", 9),
    "flushing its files": (".common.files:sync", 12),
    "its last file flushed": (".common.files:sync", 14),
    "removing the oldest": (".training.checkpoints:_remove", 1),
    "the finished DLA": (".training.export:export", 2),
    "the losses' table": (".training.reporting.losses:write_table", 2),
    "a plot or a sheet of samples": (".training.run:_Run._show", 4),
    "the cache of features": (".common.files:save_tensors", 3),
}
STEPS = 6
OPTIONS = """
dla.heads = 4
data = {reference_size = 64, mllm_image_size = 56, pairs_per_target = 1, validation = 0.25}
training = {warmup = 0, optimizer = "adamw"}
lora.learning_rate = 0.01
run = {dtype = "fp32", save_every = 1, validate_every = 3, sample_every = 3, sample_steps = 2, samples = 1}
"""


def training(name: str, steps: int = STEPS) -> dict[str, Any]:
    """A small run of the second training stage with a LoRA, in API format."""
    files = {"diffusion_model": "diffusion_models", "vae": "vae", "mllm": "mllm", "dla": "dla"}
    pipeline = {key: NAMES[kind] for key, kind in files.items()}
    settings = {
        "model": ["1", 0], "vae": ["1", 1], "mllm": ["1", 2], "data": "subjects", "name": name,
        "stage": "2: MLLM and VAE tokens", "steps": steps, "learning_rate": 1e-3, "resolution": 64, "batch_size": 2,
        "accumulate": 1, "lora_rank": 4, "seed": 3, "options": OPTIONS,
    }  # fmt: skip
    return {
        "1": make_node("SubjectLoadPipeline", **pipeline, weight_dtype="default", mllm_weight_dtype="default"),
        "2": make_node("SubjectTrainDLA", **settings),
    }


def wait_for(client: Client, prompt: dict[str, Any]) -> dict[str, Any]:
    """Runs a job to its good end. Raises WorkflowError."""
    entry = wait(client, client.queue(prompt), prompt)
    if problem := failure(entry, prompt, {}):
        raise WorkflowError(problem)
    return entry


def finished(server: Server, name: str) -> dict[str, str]:
    """Checksums of a run's finished weights, and of its losses."""
    from safetensors.torch import load_file

    found = {}
    for kind in ("dla", "loras"):
        state = hashlib.sha256()
        for key, value in sorted(load_file(server.base / "models" / kind / f"{name}.safetensors").items()):
            state.update(key.encode() + value.contiguous().numpy().tobytes())
        found[kind] = state.hexdigest()
    run = server.base / "output" / "subject_dla" / "runs" / name
    for file in ("loss.csv", "validation.csv"):
        found[file] = hashlib.sha256((run / file).read_bytes()).hexdigest()
    found["samples"] = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(run.glob("samples/*.jpg")))).hexdigest()
    return found


def _whole(faults: Faults, server: Server) -> dict[str, str]:
    """Checksums of the finished files of a training run that is left alone."""
    if not faults.run_left_alone:
        wait_for(server.client, training("whole"))
        faults.run_left_alone = finished(server, "whole")
    return faults.run_left_alone


def lost_training(faults: Faults, server: Server, at: str, call: int, do: str) -> str:
    """What a run loses by a fault at one of its calls, or "": it is queued again and must end as one left alone."""
    expected, client = _whole(faults, server), server.client
    name = f"run-{faults.tried}"
    shutil.rmtree(server.base / "output" / "subject_dla" / "cache", ignore_errors=True)
    inject(client, at, call, do)
    job = client.queue(training(name))
    entry = wait(client, job, {})
    done = client.get("/faults")[at]["done"]
    inject(client, at)
    problem = failure(entry, {}, {})
    if done != 1:
        return f"never got to call {call} of {at}"
    if do == "interrupt" and problem and "interrupted" not in problem:
        return f"did not end as interrupted: {problem}"
    if do == "disk" and "space" not in problem:
        return f"does not say that the disk is full: {problem or 'no error'}"
    return _resumed(server, name, expected)


def _resumed(server: Server, name: str, expected: dict[str, str]) -> str:
    """What is lost of a run when it is queued again, or ""."""
    prompt = training(name)
    prompt["2"]["inputs"]["options"] += "# once more\n"  # the host would not run the very same job twice
    try:
        wait_for(server.client, prompt)
    except WorkflowError as error:
        return f"cannot be resumed: {error}"
    found = finished(server, name)
    if differing := [key for key in expected if found[key] != expected[key]]:
        return f"other {', '.join(differing)} than of a run that was left alone"
    run = server.base / "output" / "subject_dla" / "runs" / name
    left = sorted(path.name for path in run.rglob("*") if path.name.startswith(".") or path.suffix == ".part")
    return f"leaves {', '.join(left)}" if left else ""


def disk(faults: Faults) -> None:
    """No space left on the disk at each file that a run saves; afterwards there is space again."""
    with faults.server() as server:
        for name, (at, call) in SAVING.items():
            if "removing" not in name:
                faults.note("disk", name, lost_training(faults, server, at, call, "disk"))


def kills(faults: Faults) -> None:
    """The server killed (SIGKILL) at each file that a run saves; another one on the same folder resumes."""
    with faults.server() as server:
        expected = _whole(faults, server)
    for name, (at, call) in SAVING.items():
        with faults.server() as server:
            base = server.base
            inject(server.client, at, call, "kill")
            try:
                entry = wait(server.client, server.client.queue(training("killed")), {}, seconds=120)
                faults.note("kill", name, f"was not killed: {failure(entry, {}, {}) or 'call not reached'}")
                continue
            except (HostError, OSError):
                pass  # it is gone
        with faults.server(base=base) as server:
            faults.note("kill", name, _resumed(server, "killed", expected))


def two_runs(faults: Faults) -> None:
    """Two servers train runs of one name in one output folder: the second is refused, naming the first."""
    with faults.server() as first:
        expected = _whole(faults, first)
        base = faults.work / "second"
        base.mkdir()
        (base / "output").symlink_to(first.base / "output", target_is_directory=True)
        with faults.server(base=base) as second:
            inject(first.client, TRAINING["a later step"][0], 2, "wait")
            job = first.client.queue(training("twice"))
            until(lambda: first.client.get("/faults")[TRAINING["a later step"][0]]["done"])
            try:
                wait_for(second.client, training("twice"))
                problem = "the second was not refused"
            except WorkflowError as error:
                text = str(error)
                clear = "'twice' is being trained by process" in text
                problem = "" if clear else f"the second was refused without naming the first: {text}"
            inject(first.client, TRAINING["a later step"][0])
            entry = wait(first.client, job, {})
            problem = problem or failure(entry, {}, {})
        if not problem and finished(first, "twice") != expected:
            problem = "the first ended otherwise than one that was left alone"
        faults.note("two-runs", "the second of one name", problem)
