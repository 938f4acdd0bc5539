"""A rendered subject whose angles are known: the sign conventions of the axes, and exact metrics from an oracle."""

import asyncio
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
from subject_dla.nodes import SubjectExtension

RENDER = Path(__file__).parents[1] / "small" / "render.py"
VIEWS = [(0, 0), (90, 0), (33, 24), (200, -20), (359, 10), (1, 12)]
SHARE = 0.35 / 1.1 * 256  # px from the middle to the ball before the face, seen from the side


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


class Oracle:
    """Knows the pictures that were rendered; of others (the floor's) it knows nothing."""

    name = "oracle.safetensors"

    def __init__(self, pictures: dict[tuple, torch.Tensor]):
        self.pictures = pictures

    def estimate(self, images, masks=None):
        rows = []
        for image in images:
            found = [view for view, known in self.pictures.items() if torch.equal(known, image[..., :3])]
            rows.append((*found[0], 0.9) if found else (0.0, 0.0, 0.0))
        azimuth, polar, confidence = torch.tensor(rows, dtype=torch.float32).unbind(-1)
        return Angles(azimuth, polar, torch.zeros_like(azimuth), confidence)


def test_an_oracle_gives_exact_metrics(renders, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    pictures = {}
    for view in VIEWS:
        with Image.open(renders / f"{view[0]}_{view[1]}.png") as picture:
            pictures[view] = torch.from_numpy(numpy.asarray(picture.convert("RGB"), dtype=numpy.float32) / 255)
    node = {node.__name__: node for node in asyncio.run(SubjectExtension().get_node_list())}["SubjectCopyPasteReport"]
    references = torch.stack([pictures[view] for view in ((0, 0), (90, 0), (359, 10))])
    outputs = torch.stack([pictures[view] for view in ((33, 24), (90, 0), (1, 12))])
    found = node.execute([Oracle(pictures)], [references], [outputs], [0.5], ["report"])
    metrics = json.loads(found.result[2])["figures"]["outputs"]
    assert metrics["azimuth"]["mean"] == pytest.approx((33 + 0 + 2) / 3, abs=1e-4)  # 359 and 1 differ by 2
    assert metrics["polar"]["mean"] == pytest.approx((24 + 0 + 2) / 3, abs=1e-4)
    assert found.result[3] == ["azimuth 33, polar 24", "azimuth 0, polar 0", "azimuth 2, polar 2"]
    assert metrics["average_recall"]["mean"] == pytest.approx(2 / 3, abs=1e-6)
