"""A real server with the pack in it, on tiny models, for the whole session of tests."""

import json
import os
from pathlib import Path

import pytest
from subject_dla.demo import run as demo
from subject_dla.demo.family.layout import CONTEXT_WIDTH, MODELS, NAMES
from subject_dla.dla import DLAConfig, DualLayerAggregator, MLLMInfo, save_dla
from subject_dla.tools.comfy_client import workflow
from subject_dla.tools.comfy_client.server import Server

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = Path(__file__).with_name("two_references.json")
SMALL_RUN = """
data.reference_size = 64
data.mllm_image_size = 56
data.encode_ahead = 2
data.pairs_per_target = 1
run.samples = 1
run.sample_steps = 2
run.validation_examples = 2
"""


@pytest.fixture(scope="session")
def comfyui() -> Path:
    folder = Path(os.environ.get("COMFYUI_PATH", ""))
    assert (folder / "main.py").is_file(), (
        f"COMFYUI_PATH is {str(folder)!r}, expected a ComfyUI checkout; `nox -s tests` sets it"
    )
    return folder


@pytest.fixture(scope="session")
def family() -> Path:
    """The demo's models."""
    return MODELS


@pytest.fixture(scope="session")
def new_dlas(tmp_path_factory) -> Path:
    """A models folder with untrained DLAs for the family: one that fits, one whose tokens are too narrow."""
    folder = tmp_path_factory.mktemp("new") / "models"
    (folder / "dla").mkdir(parents=True)
    info = MLLMInfo(NAMES["mllm"], "qwen2_5_vl", 8, CONTEXT_WIDTH)
    for name, width in (("new", CONTEXT_WIDTH), ("narrow", 64)):
        config = DLAConfig(info, width, "flux", heads=4, provenance={"training": "none: a new DLA"})
        save_dla(folder / "dla" / f"{name}.safetensors", DualLayerAggregator(config))
    return folder


@pytest.fixture(scope="session")
def server(comfyui, family, new_dlas, tmp_path_factory):
    models = [family, new_dlas]
    with Server(comfyui, tmp_path_factory.mktemp("host"), models=models, arguments=demo.device()) as running:
        for image in demo.IMAGES.glob("*.*g"):
            running.client.upload(image)
        yield running


@pytest.fixture(scope="session")
def object_info(server) -> dict:
    return server.client.object_info()


@pytest.fixture
def prompt(object_info) -> dict:
    """A workflow with two references on the demo's family, in API format, small."""
    found = workflow.to_api(json.loads(WORKFLOW.read_text()), object_info)
    shrink(found)
    return found


def shrink(prompt: dict) -> None:
    """Sizes and step counts for a processor: same nodes, same links."""
    for node in prompt.values():
        inputs = node["inputs"]
        for name in ("width", "height"):
            if isinstance(inputs.get(name), int):
                inputs[name] = 128
        if isinstance(inputs.get("steps"), int):
            inputs["steps"] = 4
        if node["class_type"] == "SubjectAddIdentity":
            inputs["size"] = 128
        if node["class_type"] == "SubjectTrainDLA":
            inputs |= {"resolution": 64, "accumulate": 1, "lora_rank": 4, "options": SMALL_RUN}


def of_type(prompt: dict, kind: str) -> dict:
    """Inputs of the first node of a class type."""
    return next(node["inputs"] for node in prompt.values() if node["class_type"] == kind)


def run(server, prompt: dict) -> dict:
    client = server.client
    return client.wait(client.queue(prompt), prompt)
