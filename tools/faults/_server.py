"""A real server on the demo's family of models, and pictures that settings draw on it."""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...common.bootstrap import ROOT
from ...demo.family.layout import MODELS
from ...demo.run import IMAGES, WORKFLOW
from ..comfy_client import workflow
from ..comfy_client.client import Client, WorkflowError, failure
from ..comfy_client.server import PACK, Server, device

INJECT = Path(__file__).with_name("inject")  # a custom node pack: faults at chosen calls in the server


def small_server(base: Path, *, models: tuple[Path, ...] = (), arguments: tuple[str, ...] = ()) -> Server:
    """A server of one thread with this pack, the family and the faults that `inject` brings about.

    Args:
        base: Its folder.
        models: Further folders of models, before the family's.
        arguments: More of the host's command line.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    packs = {"inject": INJECT, PACK: ROOT}
    comfyui = Path(os.environ["COMFYUI_PATH"])
    return Server(comfyui, base, packs=packs, models=[*models, MODELS], arguments=[*device(), *arguments])


def upload_pictures(client: Client) -> list[str]:
    """Gives a server the demo's pictures; their names."""
    return [client.upload(path) for path in sorted(IMAGES.glob("*.*g"))]


class Settings(NamedTuple):
    """What one picture of the demo's workflow depends on."""

    subject: str = "toy-1.png"
    prompt: str = "the duck on sand, seen from the right from slightly above"
    preset: str = "paper"
    clock: str = "flow_time_resolution"
    tau1: float = 0.95
    tau2: float = 0.85
    strength: float = 1.0
    width: int = 112
    height: int = 112
    batch_size: int = 1
    steps: int = 6
    cfg: float = 2.5
    sampler_name: str = "euler"
    seed: int = 7


def graph(settings: Settings, object_info: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The demo's workflow in API format with these settings, saved under `name`."""
    prompt = workflow.put_in(workflow.to_api(workflow.read(WORKFLOW), object_info), [settings.subject], settings.prompt)
    values = {
        "SubjectStageSchedule": ("preset", "clock", "tau1", "tau2"),
        "SubjectAddIdentity": ("strength",),
        "EmptySD3LatentImage": ("width", "height", "batch_size"),
        "SubjectStagedSampler": ("steps", "cfg", "sampler_name", "seed"),
    }
    for node in prompt.values():
        node["inputs"] |= {key: getattr(settings, key) for key in values.get(node["class_type"], ())}
        if node["class_type"] == "SaveImage":
            node["inputs"]["filename_prefix"] = name
    return prompt


def wait(client: Client, job: str, prompt: Mapping[str, Any], seconds: float = 300) -> dict[str, Any]:
    """The job's entry in the server's history once it has ended in any way. Raises HostError, TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (entry := client.get(f"/history/{job}").get(job)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"job {job} has not ended after {seconds:g} s\n{client.log_tail()}")
        time.sleep(0.02)
    return dict(entry)


def pictures(client: Client, outputs: Mapping[str, Any]) -> list[str]:
    """A checksum of each saved picture's size and pixels, in their order."""
    from PIL import Image

    found = []
    for output in outputs.values():
        for image in output.get("images", []):
            if image["type"] == "output":
                picture = Image.open(io.BytesIO(client.fetch(image))).convert("RGB")
                found.append(hashlib.sha256(str(picture.size).encode() + picture.tobytes()).hexdigest())
    return found


def draw(client: Client, prompt: Mapping[str, Any]) -> list[str]:
    """Runs a workflow; the checksums of its pictures. Raises WorkflowError, HostError."""
    entry = wait(client, client.queue(dict(prompt)), prompt)
    if problem := failure(entry, dict(prompt), {}):
        raise WorkflowError(problem)
    return pictures(client, entry["outputs"])
