"""Faults brought about inside a running server: interrupts, no memory, kills, a full disk, models replaced, others.

    nox -s faults -- injected [interrupt memory kill disk replaced two-runs clients leaks]

Each is done to the demo's family on a real server. Afterwards the same prompt must give, pixel for pixel, what a server
gives to which nothing was done, and a training run must end, bit for bit, with the weights of a run that was left
alone. Last line: one JSON object.
"""

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...common.console import say
from ...demo.family.layout import MODELS, NAMES
from ...tests.small.prompts import make_node, of_type
from ...tests.small.training import paint_subjects
from ..comfy_client.client import Client, HostError, WorkflowError, failure
from ..comfy_client.server import Server
from ._server import Settings, draw, graph, pictures, small_server, upload_pictures, wait

# Phases of a prompt: place, its call. They are done in this order.
DRAWING = {
    "loading the DLA": (".loaders.dla:load_dla", 1),
    "loading the MLLM": (".loaders.mllm.huggingface:load_folder", 1),
    "loading the DiT": (".loaders.dit:load_dit", 1),
    "encoding with the MLLM": (".loaders.mllm.huggingface:TransformersMLLM.run", 1),
    "encoding the negative prompt": (".loaders.mllm.huggingface:TransformersMLLM.run", 2),
    "pooling layers": (".dla.aggregator:DualLayerAggregator.forward", 1),
    "encoding with the VAE": ("comfy.sd:VAE.encode", 1),
    "the first step": ("comfy.model_base:BaseModel.apply_model", 1),
    "a later step": ("comfy.model_base:BaseModel.apply_model", 4),
    "the last step": ("comfy.model_base:BaseModel.apply_model", 6),
    "decoding": ("comfy.sd:VAE.decode", 1),
    "saving": ("nodes:SaveImage.save_images", 1),
}
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
ENCODER = "comfy.taesd.taesd:TAESD.encode"
SECOND_WAYS = {  # where memory runs out and the prompt ends well
    "the VAE's encoder: the host encodes tiles": ENCODER,
    "the VAE's decoder: the host decodes tiles": "comfy.taesd.taesd:TAESD.decode",
    "pooling layers: ours are smaller chunks": ".dla.aggregator:DualLayerAggregator.forward",
}
OTHERS = ("toy-2.png", "coffee.jpg", "chelsea.jpg")


def main(argv: list[str]) -> None:
    """Tries them and prints one JSON object. `argv`: the command line without the file's name."""
    kinds: dict[str, Callable[[Faults], None]] = {
        "leaks": leaks, "interrupt": interrupts, "memory": memory, "replaced": replaced, "clients": clients,
        "disk": disk, "kill": kills, "two-runs": two_runs,
    }  # fmt: skip
    parser = argparse.ArgumentParser(prog="nox -s faults -- injected", description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="*", choices=[[], *kinds], help="some of them (default: all)")
    wanted = parser.parse_args(argv).kinds or list(kinds)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        faults = Faults(Path(work))
        for kind in wanted:
            say(f"{kind} ...")
            kinds[kind](faults)
    result = {
        "faults_tried": faults.tried,
        "faults_lost": len(faults.lost),
        "leaks_between_prompts": len(faults.leaks),
        "faults_kinds": faults.kinds,
        "faults_problems": faults.lost + faults.leaks,
        "device": "cpu",
    }
    print(json.dumps(result))


class Faults:
    """Counts what was tried and lost; starts servers, each with a folder of its own."""

    def __init__(self, work: Path):
        self.work, self.tried, self.servers = work, 0, 0
        self.lost: list[str] = []
        self.leaks: list[str] = []
        self.kinds: dict[str, int] = {}
        self._whole: dict[str, str] = {}
        self._alone: dict[tuple[Settings, str], list[str]] = {}

    def note(self, kind: str, name: str, problem: str, leak: bool = False) -> None:
        """Counts a fault; `problem` is what was lost by it, or ""."""
        self.tried += 1
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        say(f"  {kind}, {name}: {problem or 'nothing lost'}")
        if problem:
            (self.leaks if leak else self.lost).append(f"{kind}, {name}: {problem}")

    @contextmanager
    def server(self, base: Path | None = None, models: tuple[Path, ...] = ()) -> Iterator[Server]:
        """A server with the pictures, and subjects to train on, in a new folder or the same as before."""
        self.servers += 1
        base = base or self.work / f"server-{self.servers}"
        with small_server(base, models=models) as server:
            upload_pictures(server.client)
            if not (base / "input" / "subjects").exists():
                paint_subjects(base / "input" / "subjects", subjects=4)
            yield server

    def alone(self, settings: Settings, dla: Path | None = None) -> list[str]:
        """The pictures that settings give on a server that draws nothing else; `dla`: a file in place of the demo's."""
        key = settings, str(dla)
        if key not in self._alone:
            models = () if dla is None else (dla.parents[1],)
            with self.server(models=models) as server:
                prompt = graph(settings, server.client.object_info(), "alone")
                if dla is not None:
                    of_type(prompt, "SubjectLoadPipeline")["dla"] = dla.name
                self._alone[key] = draw(server.client, prompt)
        return self._alone[key]

    def whole(self, server: Server) -> dict[str, str]:
        """Checksums of the finished files of a training run that was left alone."""
        if not self._whole:
            wait_for(server.client, training("whole"))
            self._whole = finished(server, "whole")
        return self._whole


# Drawing.


def leaks(faults: Faults) -> None:
    """Prompts with different references, texts and schedules in turn: each as it is alone."""
    base = Settings()
    turns = [base, *(base._replace(subject=name) for name in OTHERS)]
    turns += [base._replace(prompt="the boat at night", cfg=1.0), base._replace(preset="both", strength=0.5)]
    with faults.server() as server:
        info = server.client.object_info()
        for number, settings in enumerate([*turns, *turns[::-1]]):
            found = draw(server.client, graph(settings, info, f"turn-{number}"))
            same = found == faults.alone(settings)
            problem = "" if same else "another picture than alone"
            faults.note("leaks", f"turn {number}, {settings.subject}, {settings.prompt}", problem, leak=True)


def interrupts(faults: Faults) -> None:
    """The stop button at every phase of a prompt and of a training run."""
    with faults.server() as server:
        client, info = server.client, server.client.object_info()
        for name, (at, call) in DRAWING.items():
            faults.note("interrupt", name, _drawing(faults, client, info, at, call, "interrupt"))
        for name, (at, call) in TRAINING.items():
            faults.note("interrupt", f"training, {name}", _training(faults, server, at, call, "interrupt"))


def memory(faults: Faults) -> None:
    """No memory at each allocation that matters: the host's and our second way, or an error and then as before."""
    with faults.server() as server:
        client, info = server.client, server.client.object_info()
        for name, (at, call) in DRAWING.items():
            if name not in ("saving", "pooling layers"):
                faults.note("memory", name, _drawing(faults, client, info, at, call, "memory"))
        for name, at in SECOND_WAYS.items():
            faults.note("memory", name, _drawing(faults, client, info, at, 1, "memory", ends_well=True))
        for name in ("encoding with the MLLM", "encoding with the VAE", "a later step", "validating"):
            at, call = TRAINING[name]
            faults.note("memory", f"training, {name}", _training(faults, server, at, call, "memory"))


def _drawing(
    faults: Faults, client: Client, info: dict, at: str, call: int, do: str, *, ends_well: bool = False
) -> str:
    """What is lost by a fault at a call of a prompt's, or ""."""
    settings = Settings()
    expected = faults.alone(settings)
    client.post("/faults/forget", b"{}", "application/json")
    inject(client, at, call, do)
    prompt = graph(settings, info, "hit")
    entry = wait(client, client.queue(prompt), prompt)
    done = client.get("/faults")[at]["done"]
    inject(client, at)
    problem = failure(entry, prompt, {})
    if done != 1:
        return f"never got to call {call} of {at}"
    if problem and ends_well:
        return f"no second way: {problem}"
    if not problem and at == ENCODER:  # tiles have seams: the host's picture is another
        client.post("/faults/forget", b"{}", "application/json")
    elif not problem and pictures(client, entry["outputs"]) != expected:
        return "ended without an error, with another picture"
    if problem and do == "interrupt" and "interrupted" not in problem:
        return f"did not end as interrupted: {problem}"
    if draw(client, graph(settings, info, "after")) != expected:
        return "the same prompt afterwards: another picture"
    return ""


def clients(faults: Faults) -> None:
    """Two clients at once, each with its own references: each gets its own pictures, as they are alone."""
    base = Settings()
    sides = ([base, base._replace(prompt="the boat at night", cfg=1.0)], [base._replace(subject=n) for n in OTHERS])
    with faults.server() as server:
        both = [server.client, Client(server.address)]
        info, jobs = server.client.object_info(), []
        for round in range(3):
            for number, (client, side) in enumerate(zip(both, sides)):
                settings = side[round % len(side)]
                prompt = graph(settings, info, f"client-{number}-{round}")
                jobs.append((number, client, settings, prompt, client.queue(prompt)))
        for number, client, settings, prompt, job in jobs:
            entry = wait(client, job, prompt)
            problem = failure(entry, prompt, {})
            if not problem and pictures(client, entry["outputs"]) != faults.alone(settings):
                problem = "another picture than alone"
            faults.note("clients", f"client {number}, {settings.subject}", problem)


def replaced(faults: Faults) -> None:
    """A model's file replaced under a running server: the next prompt draws with the new one."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    first, second = (faults.work / "dlas" / name / "dla" / f"{name}.safetensors" for name in ("first", "second"))
    for path in (first, second):
        path.parent.mkdir(parents=True, exist_ok=True)
    source = MODELS / "dla" / NAMES["dla"]
    shutil.copyfile(source, first)
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    save_file({key: value * 1.25 for key, value in load_file(source).items()}, second, metadata)
    settings, folder = Settings(), faults.work / "swapped"
    swapped = folder / "dla" / "swapped.safetensors"
    swapped.parent.mkdir(parents=True)
    expected = {path: faults.alone(settings, path) for path in (first, second)}
    if expected[first] == expected[second]:
        faults.note("replaced", "the DLA", "the two files draw the same, so nothing can be seen")
    shutil.copyfile(first, swapped)
    with faults.server(models=(folder,)) as server:
        client = server.client
        info = client.object_info()
        prompt = graph(settings, info, "swap")
        of_type(prompt, "SubjectLoadPipeline")["dla"] = swapped.name

        def drawn(path: Path, how: str) -> None:
            for node in prompt.values():
                if node["class_type"] == "SaveImage":
                    node["inputs"]["filename_prefix"] = f"swap {how}"
            try:
                problem = "" if draw(client, prompt) == expected[path] else "not the file's picture"
            except WorkflowError as error:
                problem = str(error)
            faults.note("replaced", how, problem)

        drawn(first, "before")
        work = swapped.with_suffix(".new")
        shutil.copyfile(second, work)
        os.replace(work, swapped)
        drawn(second, "the DLA, by another file")
        stat = swapped.stat()
        shutil.copyfile(first, swapped)
        drawn(first, "the DLA, overwritten in place")
        shutil.copyfile(second, swapped)
        os.utime(swapped, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        drawn(second, "the DLA, overwritten with a time stamp a nanosecond later")
        inject(client, "comfy.model_base:BaseModel.apply_model", 2, "wait")
        other = graph(settings._replace(seed=8), info, "swap while it runs")
        of_type(other, "SubjectLoadPipeline")["dla"] = swapped.name
        job = client.queue(other)
        _until(lambda: client.get("/faults")["comfy.model_base:BaseModel.apply_model"]["done"])
        work.write_bytes(first.read_bytes())
        os.replace(work, swapped)
        inject(client, "comfy.model_base:BaseModel.apply_model")
        entry = wait(client, job, other)
        same = pictures(client, entry["outputs"]) == faults.alone(settings._replace(seed=8), second)
        problem = failure(entry, other, {}) or ("" if same else "not the picture of the file that it began with")
        faults.note("replaced", "the DLA, while a prompt runs", problem)
        drawn(first, "the DLA, after that prompt")
        swapped.write_bytes(first.read_bytes()[:1000])
        try:
            draw(client, prompt)
            problem = "a file that is cut off was taken"
        except WorkflowError as error:
            problem = "" if swapped.name in str(error) and "cut off" in str(error) else str(error)
        faults.note("replaced", "the DLA, by one that is cut off", problem)
        shutil.copyfile(second, swapped)
        drawn(second, "the DLA, whole again")


# Training.


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


def _training(faults: Faults, server: Server, at: str, call: int, do: str) -> str:
    """What a run loses by a fault at one of its calls, or "": it is queued again and must end as one left alone."""
    expected, client = faults.whole(server), server.client
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
                faults.note("disk", name, _training(faults, server, at, call, "disk"))


def kills(faults: Faults) -> None:
    """The server killed (SIGKILL) at each file that a run saves; another one on the same folder resumes."""
    with faults.server() as server:
        expected = faults.whole(server)
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
        expected = faults.whole(first)
        base = faults.work / "second"
        base.mkdir()
        (base / "output").symlink_to(first.base / "output", target_is_directory=True)
        with faults.server(base=base) as second:
            inject(first.client, TRAINING["a later step"][0], 2, "wait")
            job = first.client.queue(training("twice"))
            _until(lambda: first.client.get("/faults")[TRAINING["a later step"][0]]["done"])
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


# Small parts.


def inject(client: Client, at: str, call: int = 0, do: str = "") -> None:
    """Chooses what happens at a call of a function in the server (see `inject/`); call 0: nothing more."""
    client.post("/faults", json.dumps({"at": at, "call": call, "do": do}).encode(), "application/json")


def _until(happened: Callable[[], object], seconds: float = 120) -> None:
    import time

    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing after {seconds:g} s")
        time.sleep(0.05)
