"""Workflows in API format, made small, and their way through a server's queue."""

import json
from pathlib import Path

from ...tools.comfy_client import workflow

SMALL_RUN = """data = {reference_size = 64, mllm_image_size = 56, encode_ahead = 2, pairs_per_target = 1}
run = {samples = 1, sample_steps = 2, validation_examples = 2}"""


def two_references(object_info: dict) -> dict:
    """A workflow with two references on the demo's family, small."""
    saved = Path(__file__).parents[1] / "server" / "two_references.json"
    prompt = workflow.to_api(json.loads(saved.read_text(encoding="utf-8")), object_info)
    shrink(prompt)
    return prompt


def shrink(prompt: dict) -> None:
    """Sizes and step counts for a processor: same nodes, same links."""
    # whose references stay at a megapixel
    steps = 1 if any(node["class_type"] == "TextEncodeQwenImageEditPlus" for node in prompt.values()) else 4
    for node in prompt.values():
        inputs = node["inputs"]
        for name, small in (("width", 128), ("height", 128), ("steps", steps)):
            if isinstance(inputs.get(name), int):
                inputs[name] = small
        if node["class_type"] in ("SubjectAddIdentity", "SubjectConditioning"):
            inputs["size"] = 128
        if node["class_type"] == "ImageScaleToTotalPixels":
            inputs["megapixels"] = 0.02
        if node["class_type"] == "SubjectEncodeQwenImage21":
            inputs["resolution"] = 128
        if node["class_type"] == "SubjectTrainDLA":
            inputs |= {"resolution": 64, "accumulate": 1, "lora_rank": 4, "options": SMALL_RUN}


def make_node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def key_of(prompt: dict, kind: str) -> str:
    """Of the first node of a class type."""
    return next(key for key, node in prompt.items() if node["class_type"] == kind)


def of_type(prompt: dict, kind: str) -> dict:
    """Inputs of the first node of a class type."""
    return prompt[key_of(prompt, kind)]["inputs"]


def run(server, prompt: dict, progress=None) -> dict:
    client = server.client
    return client.wait(client.queue(prompt), prompt, progress=progress)
