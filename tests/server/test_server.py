"""The pack in a real server: it loads, its main job runs, and wrong input is named in words before or in the queue."""

import io

import pytest
from PIL import Image
from subject_dla.tests.small.prompts import of_type, run
from subject_dla.tools.comfy_client.client import WorkflowError

NODES = {
    "SubjectLoadMLLM", "SubjectMLLMFromCLIP", "SubjectLoadDLA", "SubjectLoadPipeline", "SubjectEncode",
    "SubjectAggregateLayers", "SubjectAddIdentity",
    "SubjectStageSchedule", "SubjectStageKeyframe", "SubjectStagePreview", "SubjectStagedGuider",
    "SubjectStagedSampler",
}  # fmt: skip


def test_every_node_is_there(server, object_info):
    """Ids are in users' saved workflows: none may vanish. (That the pack imported was checked when the server
    started.)"""
    assert NODES <= set(object_info)
    assert all(object_info[name]["python_module"].startswith("custom_nodes.") for name in NODES)


def test_same_seed_same_picture_and_the_references_matter(server, prompt):
    pictures = []
    for seed, strength in [(1, 1.0), (1, 1.0), (1, 0.0)]:
        of_type(prompt, "SubjectStagedSampler")["seed"] = seed
        for node in prompt.values():
            if node["class_type"] == "SubjectAddIdentity":
                node["inputs"]["strength"] = strength
        of_type(prompt, "SaveImage")["filename_prefix"] = (
            f"same{len(pictures)}"  # a node with the same inputs would not run again
        )
        outputs = run(server, prompt)
        image = next(image for output in outputs.values() for image in output.get("images", []))
        pictures.append(Image.open(io.BytesIO(server.client.fetch(image))).convert("RGB"))
    assert pictures[0].size == (128, 128)
    assert len(pictures[0].getcolors(2**24)) > 100
    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert pictures[0].tobytes() != pictures[2].tobytes()


def test_a_keyframe_chain_and_a_preview(server, prompt):
    """Stages from keyframes through the queue, with the preview on the sampler's own sigmas."""
    sampler = of_type(prompt, "SubjectStagedSampler")
    frame = {"start": 1.0, "mllm_strength": 1.0, "vae_strength": 0.0, "blend": "linear", "clock": "steps"}
    prompt |= {
        "100": {"class_type": "SubjectStageKeyframe", "inputs": frame | {"start": 0.0}},
        "101": {
            "class_type": "SubjectStageKeyframe",
            "inputs": frame | {"start": 0.5, "vae_strength": 1.0, "previous": ["100", 0]},
        },
        "102": {
            "class_type": "BasicScheduler",
            "inputs": {"model": sampler["model"], "scheduler": "simple", "steps": 4, "denoise": 1.0},
        },
        "103": {
            "class_type": "SubjectStagePreview",
            "inputs": {
                "stages": ["101", 0],
                "model": sampler["model"],
                "sigmas": ["102", 0],
                "latent": sampler["latent_image"],
            },
        },
    }
    sampler["stages"] = ["101", 0]
    outputs = run(server, prompt)
    assert outputs["103"]["images"]


def change(kind, **inputs):
    """A prompt with some inputs of its first node of that type changed."""

    def apply(prompt):
        of_type(prompt, kind).update(inputs)

    return apply


def eleven_images(prompt):
    picture = of_type(prompt, "SubjectEncode")["image_1"]
    prompt["100"] = {"class_type": "RepeatImageBatch", "inputs": {"image": picture, "amount": 10}}
    of_type(prompt, "SubjectEncode")["image_1"] = ["100", 0]  # ten, and image_2


def one_pixel(prompt):
    prompt["100"] = {"class_type": "EmptyImage", "inputs": {"width": 1, "height": 1, "batch_size": 1, "color": 0}}
    of_type(prompt, "SubjectEncode")["image_1"] = ["100", 0]


def stages_out_of_order(prompt):
    frame = {"mllm_strength": 1.0, "vae_strength": 1.0, "blend": "hold", "clock": "flow_time"}
    prompt["100"] = {"class_type": "SubjectStageKeyframe", "inputs": frame | {"start": 0.5}}
    prompt["101"] = {"class_type": "SubjectStageKeyframe", "inputs": frame | {"start": 0.9, "previous": ["100", 0]}}
    of_type(prompt, "SubjectStagedSampler")["stages"] = ["101", 0]


WRONG = {
    "no such MLLM": (change("SubjectLoadPipeline", mllm="not-there"), ["not-there", "demo-qwen2.5-vl"]),
    "no such DLA": (change("SubjectLoadPipeline", dla="not-there.safetensors"), ["not-there.safetensors"]),
    "empty prompt": (change("SubjectEncode", prompt=""), ["Encode Subject", "prompt is empty"]),
    "eleven images": (eleven_images, ["11", "10"]),
    "one pixel": (one_pixel, ["image_1", "1 x 1"]),
    "DLA of another width": (change("SubjectLoadPipeline", dla="narrow.safetensors"), ["64", "128", "DLA"]),
    "stages out of order": (stages_out_of_order, ["0.9", "0.5"]),
    "strength above two": (change("SubjectAddIdentity", strength=2.5), ["strength"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(server, prompt, case):
    damage, words = WRONG[case]
    damage(prompt)
    with pytest.raises(WorkflowError) as problem:
        run(server, prompt)
    assert all(word.lower() in str(problem.value).lower() for word in words), problem.value
