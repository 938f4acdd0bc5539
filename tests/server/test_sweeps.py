"""A sweep through the queue of a real server: one job, a picture per setting, one labelled sheet."""

import io

import numpy
from PIL import Image
from subject_dla.tests.small.prompts import of_type, run

SWEEP = {
    "preset": "paper", "clock": "steps", "tau1": "0.25, 0.5", "tau2": "0.75", "combine": "grid",
    "mllm_strengths": "1", "vae_strengths": "1", "controls": True,
}  # fmt: skip


def fetch(server, outputs: dict, node: str) -> Image.Image:
    (image,) = outputs[node]["images"]
    return Image.open(io.BytesIO(server.client.fetch(image))).convert("RGB")


def test_four_settings_become_one_sheet(server, prompt):
    decode = next(key for key, node in prompt.items() if node["class_type"] == "VAEDecode")
    save = next(key for key, node in prompt.items() if node["class_type"] == "SaveImage")
    prompt["100"] = {"class_type": "SubjectThresholdSweep", "inputs": SWEEP}
    of_type(prompt, "SubjectStagedSampler")["stages"] = ["100", 0]
    sheet = {"images": [decode, 0], "labels": ["100", 1], "columns": 2, "side": 128, "title": "thresholds"}
    prompt["101"] = {"class_type": "SubjectContactSheet", "inputs": sheet}
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
    """The sweep over layers of one modality, and the weights beside it."""
    decode = next(key for key, node in prompt.items() if node["class_type"] == "VAEDecode")
    features, dla = (
        of_type(prompt, "SubjectAggregateLayers")["features"],
        of_type(prompt, "SubjectAggregateLayers")["dla"],
    )
    picture = of_type(prompt, "SubjectEncode")["image_2"]
    sweep = {"features": features, "modalities": "image", "actions": "zero", "groups": "0-2; late"}
    prompt["100"] = {"class_type": "SubjectAblationSweep", "inputs": sweep}
    of_type(prompt, "SubjectAggregateLayers")["features"] = ["100", 0]
    weights = {"features": features, "dla": dla, "image": picture, "image_number": 2, "layer": -1}
    prompt["101"] = {"class_type": "SubjectLayerWeights", "inputs": weights}
    prompt["102"] = {
        "class_type": "SubjectContactSheet",
        "inputs": {"images": [decode, 0], "labels": ["100", 1], "side": 128},
    }
    of_type(prompt, "SaveImage")["images"] = ["102", 0]
    outputs = run(server, prompt)
    assert len(outputs["101"]["images"]) == 2 and "image, " in outputs["101"]["text"][0]
    pixels = numpy.asarray(fetch(server, outputs, "102")).astype(int)
    places = [(12 + 140 * (i % 2), 16 + 172 * (i // 2)) for i in range(3)]
    untouched, early, late = (pixels[y : y + 128, x : x + 128] for x, y in places)
    assert (untouched == early).all()  # a new DLA reads the last layer alone
    assert abs(untouched - late).mean() > 0.05
