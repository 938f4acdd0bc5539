"""Checkpoints of a run: whole or not there, whatever happens; damaged ones are named."""

import os
import subprocess
import sys

import pytest
import torch
from subject_dla.common import bootstrap
from subject_dla.tests.small.killed import Trained
from subject_dla.training.checkpoints import CheckpointError, checkpoints, read_state


def test_comes_back_bit_for_bit_and_the_newest_stay(tmp_path):
    trained = Trained()
    for step in range(1, 5):
        trained.fill(step / 7)
        assert trained.save(tmp_path, step).name == f"checkpoint-{step:08d}"
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["3", "4"] and len(list(tmp_path.iterdir())) == 2
    other = Trained()
    assert other.restore(checkpoints(tmp_path)[-1]) == 4
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters, other.parameters))
    before, after = (t.optimizer.state_dict()["state"] for t in (trained, other))
    assert before.keys() == after.keys()
    for index, values in before.items():
        assert values.keys() == after[index].keys() >= {"exp_avg", "exp_avg_sq", "step"}
        for name, value in values.items():
            assert torch.equal(value, after[index][name]) and value.dtype == after[index][name].dtype
    assert read_state(checkpoints(tmp_path)[-1])["losses"] == [0.1] * 4


def test_rates_are_the_recipes_not_the_checkpoints(tmp_path):
    trained, other = Trained(0.5), Trained()
    checkpoint = trained.save(tmp_path, 1)
    for group in other.optimizer.param_groups:
        group.update(lr=7.0, base=7.0, weight_decay=0.25)
    other.restore(checkpoint)
    assert [(g["lr"], g["base"], g["weight_decay"]) for g in other.optimizer.param_groups] == [(7.0, 7.0, 0.25)]


@pytest.mark.parametrize("name", ["dla.safetensors", "lora.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut off", "empty", "garbage", "another's"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_left(tmp_path, name, damage):
    trained = Trained()
    for step in (1, 2):
        trained.fill(step)
        newest = trained.save(tmp_path, step)
    whole = (newest / name).read_bytes()
    another = newest / ("optimizer.safetensors" if name.startswith("dla") else "dla.safetensors")
    other = b"[1]" if name == "state.json" else another.read_bytes()
    damaged = {"cut off": whole[:-9], "empty": b"", "garbage": b"\xff" * len(whole), "another's": other}
    (newest / name).write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=f"{tmp_path.name}/{newest.name}: .* Move this folder away"):
        Trained().restore(newest)
    newest.rename(tmp_path / "away")
    other = Trained()
    assert other.restore(checkpoints(tmp_path)[-1]) == 1 and other.values() == {1.0}


def test_a_checkpoint_of_another_dla_or_lora_is_refused_by_name(tmp_path):
    checkpoint = Trained(1.0).save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="has mllm small .*width 32.*, the one to train has small .*width 64"):
        Trained(width=64).restore(checkpoint)
    with pytest.raises(CheckpointError, match="rank 4"):
        Trained(rank=4).restore(checkpoint)


def test_what_others_left_behind_is_no_checkpoint_and_in_nobodys_way(tmp_path):
    trained = Trained(1.0)
    trained.save(tmp_path, 1)
    for name in ("checkpoint-00000002", ".checkpoint-00000002.part", ".checkpoint-00000001.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-00000002" / "state.json").write_text('{"step": 2}')  # the other files were taken out
    (tmp_path / ".checkpoint-00000002.part" / "dla.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoint-notes.txt").write_text("mine")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000001"]
    trained.fill(2.0)
    trained.save(tmp_path, 2)
    assert trained.restore(checkpoints(tmp_path)[-1]) == 2
    names = ["checkpoint-00000001", "checkpoint-00000002", "checkpoint-notes.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    trained.fill(3.0)
    trained.save(tmp_path, 2)  # the same step again: this run has been here
    assert Trained().restore(checkpoints(tmp_path)[-1]) == 2


@pytest.mark.parametrize("part", ["dla", "lora"])
def test_weights_that_are_not_finite_never_become_a_checkpoint(tmp_path, part):
    trained = Trained(1.0)
    trained.save(tmp_path, 1, keep=1)
    next(getattr(trained, part).parameters()).data.view(-1)[3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        trained.save(tmp_path, 2, keep=1)
    other = Trained()
    assert other.restore(checkpoints(tmp_path)[-1]) == 1 and other.values() == {1.0}


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_killed_at_any_moment_the_checkpoints_are_whole(tmp_path):
    command = [sys.executable, bootstrap.__file__, "tests.small.killed", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    steps, parts = map(int, done.stdout.split())
    assert steps > 10 and parts > 5  # it was saving when it was killed
