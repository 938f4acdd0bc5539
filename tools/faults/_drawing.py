"""Faults in a running server while it draws a picture."""

import os
import shutil
from pathlib import Path

from ...demo.family.layout import MODELS, NAMES
from ...tests.small.prompts import of_type
from ..comfy_client.client import Client, WorkflowError, failure
from ._faults import Faults, inject, until
from ._server import Settings, draw, graph, pictures, wait

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
ENCODER = "comfy.taesd.taesd:TAESD.encode"
SECOND_WAYS = {  # where memory runs out and the prompt ends well
    "the VAE's encoder: the host encodes tiles": ENCODER,
    "the VAE's decoder: the host decodes tiles": "comfy.taesd.taesd:TAESD.decode",
    "pooling layers: ours are smaller chunks": ".dla.aggregator:DualLayerAggregator.forward",
}
OTHERS = ("toy-2.png", "coffee.jpg", "chelsea.jpg")


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


def lost_drawing(
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
        until(lambda: client.get("/faults")["comfy.model_base:BaseModel.apply_model"]["done"])
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
