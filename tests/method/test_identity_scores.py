"""Identity metrics against cosines worked out by hand, and against a sum written as the papers write it."""

import json
from math import cos, isnan, nan, radians, sin
from statistics import stdev

import pytest
import torch
from subject_dla.evaluation import identity
from subject_dla.evaluation.identity import IdentityError, image_metric, reference_metric, text_metric
from subject_dla.loaders.preprocessing import DINO, clip_preprocessing, preprocess


def at(*degrees):
    """Embeddings in a plane: the cosine of two is that of the angle between them. Lengths differ on purpose."""
    return torch.tensor([[(1 + i) * cos(radians(a)), (1 + i) * sin(radians(a))] for i, a in enumerate(degrees)])


def test_cosines_of_known_angles_with_every_reference_of_the_subject_alone():
    metric = image_metric("DINO-I", at(0, 90, 45), at(0, 60, 90), ["cat", "dog", "cat"], ["cat", "cat", "dog"])
    expected = {(0, 0): 1, (0, 1): 0.5, (1, 2): 1, (2, 0): cos(radians(45)), (2, 1): cos(radians(15))}
    assert {(i, j): value for i, j, value in metric.pairs} == pytest.approx(expected, abs=1e-7)
    per_output = [0.75, 1, (cos(radians(45)) + cos(radians(15))) / 2]
    assert metric.per_output == pytest.approx(per_output, abs=1e-7)
    assert metric.mean == pytest.approx(sum(per_output) / 3, abs=1e-7)
    assert metric.by_subject == pytest.approx({"cat": (per_output[0] + per_output[2]) / 2, "dog": 1}, abs=1e-7)
    deviation = stdev(per_output)
    assert metric.mean - metric.low == pytest.approx(4.302652729911275 * deviation / 3**0.5, rel=1e-6)  # Student's t
    assert metric.high == 1  # a cosine cannot be more


def test_opposite_orthogonal_and_identical():
    metric = image_metric("CLIP-I", at(0), at(180, 90, 0, 0))
    assert [value for *_, value in metric.pairs] == pytest.approx([-1, 0, 1, 1], abs=1e-7)
    assert metric.mean == pytest.approx(0.25, abs=1e-7) and isnan(metric.low) and isnan(metric.high)
    same = torch.randn(5, 384, generator=torch.Generator().manual_seed(0))
    metric = image_metric("DINO-I", same, same.flip(0), list("abcde"), list("edcba"))
    assert metric.per_output == pytest.approx([1] * 5, abs=1e-12) and max(metric.per_output) <= 1


def test_order_of_outputs_and_references_is_of_no_account():
    generator = torch.Generator().manual_seed(1)
    outputs, references = (torch.randn(n, 64, generator=generator) for n in (12, 7))
    shown, known = list("aabbccaabbcc"), list("abcabca")
    metric = image_metric("DINO-I", outputs, references, shown, known)
    cosines = torch.cosine_similarity(outputs[:, None].double(), references[None].double(), dim=-1)
    matching = torch.tensor([[subject == other for other in known] for subject in shown])
    expected = [row[own].mean().item() for row, own in zip(cosines, matching)]
    assert metric.per_output == pytest.approx(expected, abs=1e-12)
    turn, swap = torch.randperm(12, generator=generator), torch.randperm(7, generator=generator)
    other = image_metric("DINO-I", outputs[turn], references[swap], [shown[i] for i in turn], [known[i] for i in swap])
    assert other.per_output == pytest.approx([metric.per_output[i] for i in turn], abs=1e-12)
    assert (other.mean, other.low, other.high) == pytest.approx((metric.mean, metric.low, metric.high), abs=1e-12)
    assert other.by_subject == pytest.approx(metric.by_subject, abs=1e-12)


def test_an_output_meets_its_own_prompt_alone():
    metric = text_metric("CLIP-T", at(0, 30, 60), at(60, 0), prompts=[1, 1, 0])
    assert metric.per_output == pytest.approx([1, cos(radians(30)), 1], abs=1e-7)
    assert [pair[:2] for pair in metric.pairs] == [(0, 1), (1, 1), (2, 0)]
    assert text_metric("CLIP-T", at(0, 30), at(0, 90)).per_output == pytest.approx([1, 0.5], abs=1e-7)


def test_references_among_themselves_leave_out_the_picture_itself():
    metric = reference_metric("DINO-I", at(0, 60, 10), ["a", "a", "b"])
    assert metric.per_output == pytest.approx([0.5, 0.5], abs=1e-7) and metric.name == "DINO-I, references"
    assert [pair[:2] for pair in metric.pairs] == [(0, 1), (1, 0)]
    assert reference_metric("DINO-I", at(0, 60), ["a", "b"]) is None


@pytest.mark.parametrize("make, words", [
    (lambda: image_metric("DINO-I", at(0, 9), at(0), ["cat", "dgo"], ["cat"]), ["output 2", "dgo", "cat"]),
    (lambda: image_metric("DINO-I", at(0), at(0), ["cat", "dog"], ["cat"]), ["2 subject labels", "1 pictures"]),
    (lambda: image_metric("DINO-I", at(0), torch.ones(2, 3)), ["2 and 3 wide"]),
    (lambda: image_metric("DINO-I", at(0), torch.zeros(1, 2)), ["DINO-I", "number 1", "length 0.0"]),
    (lambda: image_metric("DINO-I", torch.full((1, 2), nan), at(0)), ["number 1 of the outputs", "nan"]),
    (lambda: text_metric("CLIP-T", at(0, 1), at(0), [0]), ["2 outputs", "1 prompts"]),
    (lambda: text_metric("CLIP-T", at(0), at(0), [1]), ["1 text embeddings"]),
])  # fmt: skip
def test_what_gives_no_metric_is_refused(make, words):
    with pytest.raises(IdentityError) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_report_names_the_backbone_beside_every_metric_and_warns_of_copying():
    about = {"backbone": {"name": "DINO ViT-S/16", "file": "dino.safetensors"}, "preprocessing": str(DINO)}
    metrics = [
        image_metric("DINO-I", at(0, 10), at(0, 20), ["cat", "dog"], ["cat", "dog"], **about),
        image_metric("CLIP-I", at(0), at(60), backbone={"name": "CLIP ViT-B/32", "file": None}),
    ]
    text = identity.text_report(metrics, ["a note."])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert ["DINO-I", "0.9924", "0.8959 to 1.0000", "2", "2", "DINO ViT-S/16, dino.safetensors"] in rows
    assert ["CLIP-I", "0.5000", "unknown (one picture)", "1", "1", "CLIP ViT-B/32, file not known"] in rows
    assert ["cat", "1.0000"] in rows and ["dog", "0.9848"] in rows
    assert "copying" in text and "copy-paste" in text and "256 px" in text and "a note." in text
    read = json.loads(identity.json_report(metrics, ["a note."], prompts=["é"]))
    assert read["figures"][0]["pairs"][0] == [0, 0, pytest.approx(1)] and read["prompts"] == ["é"]
    assert read["figures"][1]["low"] is None and read["figures"][1]["backbone"]["name"] == "CLIP ViT-B/32"
    assert any("copying" in note for note in read["notes"]) and "a note." in read["notes"]


@pytest.mark.parametrize("height, width", [(300, 400), (401, 299), (100, 90), (256, 256), (224, 224)])
@pytest.mark.parametrize("how", [DINO, clip_preprocessing(224)], ids=["dino", "clip"])
def test_pictures_are_prepared_as_published(height, width, how):
    """Against Pillow's resize and crop, as torchvision's Resize and CenterCrop do them on picture files."""
    from PIL import Image

    generator = torch.Generator().manual_seed(height)
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    image = (smooth[0].permute(1, 2, 0) * 255).round() / 255
    found = preprocess(image, how)
    short = min(height, width)
    size = (how.resize * width // short, how.resize * height // short)
    file = Image.fromarray((image * 255).round().byte().numpy()).resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - how.crop) / 2) for side in size)
    file = file.crop((left, top, left + how.crop, top + how.crop))
    back = found * torch.tensor(how.std)[:, None, None] + torch.tensor(how.mean)[:, None, None]
    expected = torch.frombuffer(bytearray(file.tobytes()), dtype=torch.uint8).reshape(how.crop, how.crop, 3)
    assert found.shape == (3, how.crop, how.crop)
    assert (back * 255 - expected.permute(2, 0, 1)).abs().max() <= 1.01  # Pillow rounds twice, once per direction
