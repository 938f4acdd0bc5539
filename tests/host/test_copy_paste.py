"""Copy-Paste Report, with orientation models that know the angles: drawn into the pictures, or a rendered subject's."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import folder_paths
import numpy
import pytest
import torch
from PIL import Image
from subject_dla.evaluation.orientation_overlay import axes
from subject_dla.loaders.orient_anything.network import Angles
from subject_dla.nodes.copy_paste import SubjectCopyPasteReport

RENDER = Path(__file__).parents[1] / "small" / "render.py"
VIEWS = [(0, 0), (90, 0), (33, 24), (200, -20), (359, 10), (1, 12)]
SHARE = 0.35 / 1.1 * 256  # px from the middle to the ball before the face, seen from the side


def picture(azimuth, polar=0.0, confidence=0.9, side=200):
    """(1, side, side, 3): a spot whose position gives the angles; it is mirrored and cropped with the picture."""
    image = torch.zeros(1, side, side, 3)
    x, y = side * (0.5 + ((azimuth + 180) % 360 - 180) / 360), side * (0.5 - polar / 180)
    image[:, round(y) - 1 : round(y) + 1, round(x) - 1 : round(x) + 1] = 1.0
    image[..., 2] = confidence
    return image


class Oracle:
    name = "oracle.safetensors"

    def estimate(self, images, masks=None):
        self.images, self.masks = images, masks
        angles = [self.read(image) for image in images]
        azimuth, polar, confidence = torch.tensor(angles, dtype=torch.float32).unbind(-1)
        return Angles(azimuth, polar, torch.zeros_like(azimuth), confidence)

    @staticmethod
    def read(image):
        spot = image[..., 0].double()
        rows, columns = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in spot.shape)
        x, y = (spot.sum(0) * columns).sum() / spot.sum(), (spot.sum(1) * rows).sum() / spot.sum()
        return float(360 * (x - 0.5)) % 360, float(180 * (0.5 - y)), float(image[..., 2].mean())


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))

    def run(references, images, threshold=0.5, prefix="copy_paste/report", oracle=None, **masks):
        found = SubjectCopyPasteReport.execute([oracle or Oracle()], references, images, [threshold], [prefix], **masks)
        text, plot, content, captions = found.result
        assert len(captions) == sum(len(batch) for batch in images)
        return text, plot, json.loads(content), found.ui, captions

    return run


def test_known_angles_give_the_metrics_and_the_floor_that_follow_from_them(report, tmp_path):
    references = torch.cat([picture(0), picture(90, 9), picture(-90, -18)])
    images = [torch.cat([picture(9), picture(90, 27)]), picture(108, -18)]  # a list of batches, as a queue gives
    text, plot, content, shown, _ = report([references], images)
    metrics = content["figures"]
    assert metrics["outputs"]["azimuth"]["mean"] == pytest.approx((9 + 0 + 162) / 3, abs=1e-3)
    assert metrics["outputs"]["polar"]["mean"] == pytest.approx((0 + 18 + 0) / 3, abs=1e-3)
    recalls = [metrics["outputs"][f"recall@{k}"]["mean"] for k in (5, 10, 15, 20)]
    assert recalls == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3])
    assert metrics["outputs"] == metrics["outputs, ungated"] and content["coverage"]["mean"] == 1
    # cropped to 0.9 about the middle, a spot is 1/0.9 times as far from it
    assert metrics["floor"]["azimuth"]["mean"] == pytest.approx((0 + 10 + 10) / 3, abs=0.05)
    assert metrics["floor"]["polar"]["mean"] == pytest.approx((0 + 1 + 2) / 3, abs=0.05)
    assert "oracle.safetensors" in text and "57.0" in text and plot.ndim == 4 and plot.shape[-1] == 3
    assert 0 <= float(plot.min()) and float(plot.max()) <= 1
    assert shown["text"] == (text,) and len(shown["images"]) == 1

    report([references], images)
    saved = sorted(path.name for path in (tmp_path / "output" / "copy_paste").iterdir())
    assert saved == [f"report_0000{n}_.{kind}" for n in (1, 2) for kind in ("csv", "json")]
    assert json.loads((tmp_path / "output" / "copy_paste" / saved[1]).read_text()) == content
    lines = list(csv.DictReader((tmp_path / "output" / "copy_paste" / saved[0]).open(newline="")))
    assert [line["set"] for line in lines] == ["outputs"] * 3 + ["floor"] * 3
    assert [float(line["azimuth_difference"]) for line in lines[:3]] == pytest.approx([9, 0, 162], abs=1e-3)


def test_one_reference_serves_all_images_of_any_size(report):
    content = report([picture(-9)], [picture(9), picture(27, side=400)])[2]
    assert content["figures"]["outputs"]["azimuth"]["mean"] == pytest.approx((18 + 36) / 2, abs=1e-3)
    assert content["figures"]["floor"]["pairs"] == 1


def test_without_any_front_the_report_says_so_and_what_to_do(report):
    text, _, content, *_ = report([picture(0, confidence=0.3)], [picture(90), picture(0)])
    assert content["coverage"]["mean"] == 0 and content["figures"]["outputs"]["azimuth"]["mean"] is None
    assert content["figures"]["outputs, ungated"]["azimuth"]["mean"] == pytest.approx(45)
    assert "NaN" in text and "no front" in text and "Lower the threshold" in text
    assert report([picture(0, confidence=0.3)], [picture(90), picture(0)], threshold=0.25)[2]["coverage"]["mean"] == 1


def test_masks_go_with_their_pictures_and_are_mirrored_with_them(report):
    oracle, mask = Oracle(), torch.zeros(1, 200, 200)
    mask[:, 80:120, 10:70] = 1  # beside the middle: the crop moves there, as far as the picture goes
    report([picture(-108)], [picture(0), picture(9)], oracle=oracle, reference_masks=[mask])
    original, changed, *outputs = oracle.masks
    assert outputs == [None, None] and torch.equal(original, mask[0])
    assert changed.shape == oracle.images[1].shape[:2] == (135, 135)
    columns = (changed > 0.5).any(0).nonzero().flatten()
    assert [int(columns[0]), int(columns[-1]) + 1] == pytest.approx([0.75 * (180 - 70), 0.75 * (180 - 10)], abs=1)
    report([picture(0)], [picture(0)], oracle=oracle)
    assert oracle.masks is None
    cut_out = torch.cat([picture(-108), mask[..., None]], dim=-1)
    report([cut_out], [picture(0), picture(9)], oracle=oracle)
    assert torch.equal(oracle.masks[0], mask[0]) and torch.equal(oracle.masks[1], changed)
    report([picture(0)], [picture(0), picture(9)], oracle=oracle, masks=[mask])
    assert oracle.masks[:2] == [None, None] and all(torch.equal(found, mask[0]) for found in oracle.masks[2:])


@pytest.mark.parametrize(("references", "images", "masks", "message"), [
    ([torch.cat([picture(0)] * 2)], [torch.cat([picture(0)] * 3)], {}, "references holds 2 pictures and images 3"),
    ([torch.zeros(1, 64, 64, 2)], [picture(0)], {}, r"references: .*\(1, 64, 64, 2\), expected"),
    ([picture(0)], [], {}, "images holds no picture"),
    ([picture(0)], [picture(0) / 0], {}, "images: Picture 1 of 1.*NaN"),
    ([picture(0)], [picture(0)], {"masks": [torch.ones(2, 200, 200)]}, "masks holds 2 masks, images 1 pictures"),
])  # fmt: skip
def test_what_does_not_fit_together_is_named(report, references, images, masks, message):
    with pytest.raises(ValueError, match=message):
        report(references, images, **masks)


def test_files_stay_in_the_output_folder(report, tmp_path):
    with pytest.raises(Exception, match="outside the output folder"):
        report([picture(0)], [picture(0)], prefix="../elsewhere")
    assert not list(tmp_path.rglob("elsewhere*"))


@pytest.fixture(scope="module")
def renders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("renders")
    views = [f"{azimuth}:{polar}" for azimuth, polar in VIEWS]
    done = subprocess.run([sys.executable, RENDER, folder, *views], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("view", VIEWS)
def test_the_front_axis_points_at_the_face(renders, view):
    with Image.open(renders / f"{view[0]}_{view[1]}_front.png") as picture:
        pixels = numpy.asarray(picture.convert("RGB")).astype(int)
    rows, columns = ((pixels[..., 0] > 200) & (pixels[..., 1:].max(-1) < 60)).nonzero()
    assert len(rows) > 50
    right, up, _ = axes(*view, 0.0)[0].tolist()
    assert columns.mean() + 0.5 - 128 == pytest.approx(SHARE * right, abs=2)
    assert 128 - rows.mean() - 0.5 == pytest.approx(SHARE * up, abs=2)


class RenderedOracle(Oracle):
    """Knows the pictures that were rendered; of others (the floor's) it knows nothing."""

    def __init__(self, pictures: dict[tuple, torch.Tensor]):
        self.pictures = pictures

    def read(self, image):
        found = [view for view, known in self.pictures.items() if torch.equal(known, image[..., :3])]
        return (*found[0], 0.9) if found else (0.0, 0.0, 0.0)


def test_an_oracle_gives_exact_metrics(renders, report):
    pictures = {}
    for view in VIEWS:
        with Image.open(renders / f"{view[0]}_{view[1]}.png") as rendered:
            pictures[view] = torch.from_numpy(numpy.asarray(rendered.convert("RGB"), dtype=numpy.float32) / 255)
    references = torch.stack([pictures[view] for view in ((0, 0), (90, 0), (359, 10))])
    outputs = torch.stack([pictures[view] for view in ((33, 24), (90, 0), (1, 12))])
    _, _, content, _, captions = report([references], [outputs], oracle=RenderedOracle(pictures))
    metrics = content["figures"]["outputs"]
    assert metrics["azimuth"]["mean"] == pytest.approx((33 + 0 + 2) / 3, abs=1e-4)  # 359 and 1 differ by 2
    assert metrics["polar"]["mean"] == pytest.approx((24 + 0 + 2) / 3, abs=1e-4)
    assert captions == ["azimuth 33, polar 24", "azimuth 0, polar 0", "azimuth 2, polar 2"]
    assert metrics["average_recall"]["mean"] == pytest.approx(2 / 3, abs=1e-6)
