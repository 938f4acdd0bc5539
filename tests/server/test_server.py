"""The pack in a real server: it loads, its main job and sweeps run, wrong input is named before or in the queue."""

import io

import numpy
import pytest
from PIL import Image
from subject_dla.tests.small.prompts import key_of, make_node, of_type, run
from subject_dla.tools.comfy_client.client import WorkflowError

NODES = {
    "SubjectLoadMLLM", "SubjectMLLMFromCLIP", "SubjectLoadDLA", "SubjectLoadPipeline", "SubjectEncode",
    "SubjectAggregateLayers", "SubjectAddIdentity", "SubjectStageSchedule", "SubjectStageKeyframe",
    "SubjectStagePreview", "SubjectStagedGuider", "SubjectStagedSampler",
}  # fmt: skip
SWEEP = {
    "preset": "paper", "clock": "steps", "tau1": "0.25, 0.5", "tau2": "0.75", "combine": "grid",
    "mllm_strengths": "1", "vae_strengths": "1", "controls": True,
}  # fmt: skip
FRAME = {"mllm_strength": 1.0, "vae_strength": 1.0, "blend": "hold", "clock": "flow_time"}


def test_every_node_is_there(server, object_info):
    """Ids are in users' saved workflows: none may vanish."""
    assert NODES <= set(object_info)
    assert all(object_info[name]["python_module"].startswith("custom_nodes.") for name in NODES)


def fetch(server, outputs: dict, node: str) -> Image.Image:
    (image,) = outputs[node]["images"]
    return Image.open(io.BytesIO(server.client.fetch(image))).convert("RGB")


def test_same_seed_same_picture_and_the_references_matter(server, prompt):
    pictures = []
    for seed, strength in [(1, 1.0), (1, 1.0), (1, 0.0)]:
        of_type(prompt, "SubjectStagedSampler")["seed"] = seed
        for node in prompt.values():
            if node["class_type"] == "SubjectAddIdentity":
                node["inputs"]["strength"] = strength
        # a node with the same inputs would not run again
        of_type(prompt, "SaveImage")["filename_prefix"] = f"same{len(pictures)}"
        pictures.append(fetch(server, run(server, prompt), key_of(prompt, "SaveImage")))
    assert pictures[0].size == (128, 128)
    assert len(pictures[0].getcolors(2**24)) > 100
    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert pictures[0].tobytes() != pictures[2].tobytes()


def test_a_keyframe_chain_and_a_preview(server, prompt):
    sampler = of_type(prompt, "SubjectStagedSampler")
    frame = FRAME | {"vae_strength": 0.0, "blend": "linear", "clock": "steps"}
    preview = {"stages": ["101", 0], "sigmas": ["102", 0], "latent": sampler["latent_image"]}
    prompt |= {
        "100": make_node("SubjectStageKeyframe", **frame | {"start": 0.0}),
        "101": make_node("SubjectStageKeyframe", **frame | {"start": 0.5, "vae_strength": 1.0, "previous": ["100", 0]}),
        "102": make_node("BasicScheduler", model=sampler["model"], scheduler="simple", steps=4, denoise=1.0),
        "103": make_node("SubjectStagePreview", model=sampler["model"], **preview),
    }
    sampler["stages"] = ["101", 0]
    outputs = run(server, prompt)
    assert outputs["103"]["images"]


def test_four_settings_become_one_sheet(server, prompt):
    decode, save = (key_of(prompt, kind) for kind in ("VAEDecode", "SaveImage"))
    prompt["100"] = make_node("SubjectThresholdSweep", **SWEEP)
    of_type(prompt, "SubjectStagedSampler")["stages"] = ["100", 0]
    sheet = {"images": [decode, 0], "labels": ["100", 1], "columns": 2, "side": 128, "title": "thresholds"}
    prompt["101"] = make_node("SubjectContactSheet", **sheet)
    of_type(prompt, "SaveImage").update(images=["101", 0], filename_prefix="sheet")
    outputs = run(server, prompt)
    saved = fetch(server, outputs, save)
    assert saved.tobytes() == fetch(server, outputs, "101").tobytes()  # the preview in the node
    assert saved.width == 768 and 380 < saved.height < 440  # a label may take two lines
    pixels = numpy.asarray(saved).astype(int)
    row = 128 + 20 + 24
    places = [(12 + 140 * (i % 2), 12 + 44 + 4 + row * (i // 2)) for i in range(4)]
    pictures = [pixels[y : y + 128, x : x + 128] for x, y in places]
    for picture in pictures:
        assert len(numpy.unique(picture.reshape(-1, 3), axis=0)) > 100
        assert ((picture == (252, 252, 253)).all(-1)).mean() < 0.01  # whole, and where it should be
    for i, picture in enumerate(pictures):
        for other in pictures[:i]:
            assert abs(picture - other).mean() > 0.05  # no two settings gave the same


def test_layer_roles_in_one_job(server, prompt):
    aggregate, picture = of_type(prompt, "SubjectAggregateLayers"), of_type(prompt, "SubjectEncode")["image_2"]
    features, dla = aggregate["features"], aggregate["dla"]
    sweep = {"features": features, "modalities": "image", "actions": "zero", "groups": "0-2; late"}
    prompt["100"], aggregate["features"] = make_node("SubjectAblationSweep", **sweep), ["100", 0]
    weights = {"features": features, "dla": dla, "image": picture, "image_number": 2, "layer": -1}
    prompt["101"] = make_node("SubjectLayerWeights", **weights)
    images = [key_of(prompt, "VAEDecode"), 0]
    prompt["102"] = make_node("SubjectContactSheet", images=images, labels=["100", 1], side=128)
    of_type(prompt, "SaveImage")["images"] = ["102", 0]
    outputs = run(server, prompt)
    assert len(outputs["101"]["images"]) == 2 and "image, " in outputs["101"]["text"][0]
    pixels = numpy.asarray(fetch(server, outputs, "102")).astype(int)
    places = [(12 + 140 * (i % 2), 16 + 172 * (i // 2)) for i in range(3)]
    untouched, early, late = (pixels[y : y + 128, x : x + 128] for x, y in places)
    assert (untouched == early).all()  # a new DLA reads the last layer alone
    assert abs(untouched - late).mean() > 0.05


EMPTY = {"width": 64, "height": 64, "batch_size": 1, "color": 0}
WRONG = {  # case: (type of the changed node, its inputs, words of the error, nodes to add)
    "no such MLLM": ("SubjectLoadPipeline", {"mllm": "not-there"}, ["not-there", "demo-qwen2.5-vl"]),
    "no such DLA": ("SubjectLoadPipeline", {"dla": "not-there.safetensors"}, ["not-there.safetensors"]),
    "eleven images": (  # ten, and image_2
        "SubjectEncode", {"image_1": ["100", 0]}, ["11", "10"], make_node("EmptyImage", **EMPTY | {"batch_size": 10})),
    "one pixel": (
        "SubjectEncode", {"image_1": ["100", 0]}, ["image_1", "1 x 1"],
        make_node("EmptyImage", **EMPTY | {"width": 1, "height": 1})),
    "DLA of another width": ("SubjectLoadPipeline", {"dla": "narrow.safetensors"}, ["64", "128", "DLA"]),
    "stages out of order": (
        "SubjectStagedSampler", {"stages": ["101", 0]}, ["0.9", "0.5"],
        make_node("SubjectStageKeyframe", **FRAME, start=0.5),
        make_node("SubjectStageKeyframe", **FRAME, start=0.9, previous=["100", 0])),
    "strength above two": ("SubjectAddIdentity", {"strength": 2.5}, ["strength"]),
}  # fmt: skip


def test_a_kontext_file_with_unos_placement_is_reported(server, prompt):
    of_type(prompt, "SubjectLoadPipeline")["diffusion_model"] = "demo-kontext.safetensors"
    for placement in ("Kontext", "auto"):
        for node in prompt.values():
            if node["class_type"] == "SubjectAddIdentity":
                node["inputs"]["placement"] = placement
        assert run(server, prompt)
        said = server.log.read_text(encoding="utf-8").count("'demo-kontext.safetensors' is for offset")
        assert said == (0 if placement == "Kontext" else 2)  # of each reference's node


def test_an_empty_prompt_is_encoded(server, prompt):
    of_type(prompt, "SubjectEncode")["prompt"] = ""
    outputs = run(server, prompt)
    assert (
        len(numpy.unique(numpy.asarray(fetch(server, outputs, key_of(prompt, "SaveImage"))).reshape(-1, 3), axis=0))
        > 100
    )


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(server, prompt, case):
    kind, inputs, words, *added = WRONG[case]
    of_type(prompt, kind).update(inputs)
    prompt |= {str(number): more for number, more in enumerate(added, 100)}
    with pytest.raises(WorkflowError) as problem:
        run(server, prompt)
    assert all(word.lower() in str(problem.value).lower() for word in words), problem.value
