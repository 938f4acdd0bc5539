"""Runs on shards, and on so many pictures that damage is found when they are drawn: resumed bit for bit."""

import io
import tarfile

import pytest
import torch
from subject_dla.tests.host.test_training_run import Stop, Workspace, assert_equal, stop_at
from subject_dla.training.data import index
from subject_dla.training.data.dataset import read_data

STEPS = 6


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("runs"))


def whole_and_resumed(workspace, name, source):
    """The ends of a run, and of one that was stopped at every step, and what the latter said."""
    said = []

    def run(part, *steps):
        stop = stop_at(*steps)

        def callback(progress):
            said.append(progress.text)
            stop(progress)

        settings = {"data": {"source": str(source), "validation": 0.2}, "cache": f"cache-{part}"}
        return workspace.train(part, callback, **settings)

    result = run(name)
    for step in range(1, STEPS):
        with pytest.raises(Stop):
            run(f"{name}-parts", step)
    run(f"{name}-parts")
    return workspace.end(name), workspace.end(f"{name}-parts"), said, result


def test_a_run_on_shards_is_resumed_and_is_the_run_on_their_folder(workspace, tmp_path):
    for number, folders in enumerate((slice(0, 2), slice(2, None))):
        with tarfile.open(tmp_path / f"s-{number:06d}.tar", "w") as tar:
            for folder in sorted(workspace.data.iterdir())[folders]:
                for path in sorted(folder.iterdir()):
                    info = tarfile.TarInfo(f"{folder.name}/{path.name}")
                    info.size = path.stat().st_size
                    tar.addfile(info, io.BytesIO(path.read_bytes()))
    shards, parts, _, _ = whole_and_resumed(workspace, "shards", tmp_path / "s-{000000..000001}.tar")
    assert_equal(parts, shards)
    folder, _, _, _ = whole_and_resumed(workspace, "folder", workspace.data)
    assert shards[1] == folder[1]
    assert all(
        torch.equal(value, folder[0]["dla.safetensors"][key]) for key, value in shards[0]["dla.safetensors"].items()
    )


def test_a_damaged_picture_that_is_drawn_is_said_and_another_takes_its_place(workspace, monkeypatch):
    monkeypatch.setattr(index, "DECODED", 1)
    whole, parts, said, result = whole_and_resumed(workspace, "many", workspace.data)
    assert_equal(parts, whole)
    assert not result.problems
    path = read_data(workspace.data, validation=0.2, pairs_per_target=1).training[0].target
    path.write_bytes(path.read_bytes()[:-60])  # in its pixels: the header stays
    whole, parts, said, result = whole_and_resumed(workspace, "damaged", workspace.data)
    assert_equal(parts, whole)
    assert any("takes its place" in text and path.name in text for text in said)
    assert any(f"{path.name} cannot be read" in problem for problem in result.problems)
