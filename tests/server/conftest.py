"""A real server with the pack in it, on tiny models, for the whole session of tests."""

import shutil
from pathlib import Path

import pytest
from subject_dla.demo import run as demo
from subject_dla.demo.family.layout import CONTEXT_WIDTH, MODELS, NAMES
from subject_dla.dla import DLAConfig, DualLayerAggregator, MLLMInfo, save_dla
from subject_dla.tests.small.prompts import two_references
from subject_dla.tools.comfy_client.server import Server


@pytest.fixture(scope="session")
def new_dlas(tmp_path_factory) -> Path:
    """A models folder with untrained DLAs for the family: one that fits, one whose tokens are too narrow; and its DiT
    under a name that says Kontext."""
    folder = tmp_path_factory.mktemp("new") / "models"
    (folder / "diffusion_models").mkdir(parents=True)
    shutil.copy(
        MODELS / "diffusion_models" / NAMES["diffusion_models"],
        folder / "diffusion_models" / "demo-kontext.safetensors",
    )
    (folder / "dla").mkdir(parents=True)
    info = MLLMInfo(NAMES["mllm"], "qwen2_5_vl", 8, CONTEXT_WIDTH)
    for name, width in (("new", CONTEXT_WIDTH), ("narrow", 64)):
        config = DLAConfig(info, width, "flux", heads=4, provenance={"training": "none: a new DLA"})
        save_dla(folder / "dla" / f"{name}.safetensors", DualLayerAggregator(config))
    return folder


@pytest.fixture(scope="session")
def server(comfyui, new_dlas, tmp_path_factory):
    models = [MODELS, new_dlas]
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
    return two_references(object_info)
