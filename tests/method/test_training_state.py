"""Checkpoints of a run: whole or not there, whatever happens; damaged ones are named."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from subject_dla.common import bootstrap
from subject_dla.tests.small.killed import Trained
from subject_dla.training.checkpoints import CheckpointError, checkpoints, newest_state, read_state, resume


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


def change_state(checkpoint, change):
    """Changes a state.json as somebody does who also mends its checksum, or has 0.1.0's without any."""
    file = checkpoint / "state.json"
    state = json.loads(file.read_text())
    del state["checksum"], state["files"]
    change(state)
    file.write_text(json.dumps(state))


STATES = {
    "step is -1, expected the 1 of the folder's name": lambda s: s.update(step=-1),
    "step is 7, expected the 1": lambda s: s.update(step=7),
    "step is '1', expected a whole number": lambda s: s.update(step="1"),
    "step is True, expected a whole number": lambda s: s.update(step=True),
    "losses is 'low', expected a list": lambda s: s.update(losses="low"),
    "losses has 'low' at step 1, expected a finite number": lambda s: s.update(losses=["low"]),
    "losses has 2 entries, expected one for each of 1 steps": lambda s: s.update(losses=[1, 2]),
    "losses is missing": lambda s: s.pop("losses"),
    "state.json is not JSON (it holds the number NaN)": lambda s: s.update(losses=[float("nan")]),
    "identity is 3, expected text": lambda s: s.update(identity=3),
    "validation has [1] at step 0, expected a list of losses": lambda s: s.update(validation={"0": [1]}),
    "data has no fingerprint": lambda s: s.update(data={}),
    "optimizer is missing": lambda s: s.pop("optimizer"),
}


@pytest.mark.parametrize("text", STATES)
def test_a_state_that_no_run_can_resume_from_names_its_entry(tmp_path, text):
    checkpoint = Trained(1.0).save(tmp_path, 1)
    change_state(checkpoint, lambda state: None)
    assert Trained().restore(checkpoint) == 1  # 0.1.0's, without checksums
    change = STATES[text]
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=re.escape(text)):
        Trained().restore(checkpoint)


MOMENTS = {
    "0/exp_avg is missing": lambda t: t.pop("0/exp_avg"),
    "3/step is missing": lambda t: [t.pop(name) for name in list(t) if name.startswith("3/")],
    "1/exp_avg_sq has values that are NaN": lambda t: t["1/exp_avg_sq"].view(-1)[:1].fill_(float("inf")),
    "1/exp_avg_sq is below 0": lambda t: t["1/exp_avg_sq"].view(-1)[:1].fill_(-1),
    "2/step is below 0": lambda t: t["2/step"].fill_(-1),
    "0/exp_avg is torch.float32 of shape (1,), expected floats": lambda t: t.update({"0/exp_avg": torch.zeros(1)}),
    "0/exp_avg is torch.int8 of": lambda t: t.update({"0/exp_avg": t["0/exp_avg"].to(torch.int8)}),
    "has an entry 99": lambda t: t.update({"99/step": torch.tensor(1.0)}),
}


@pytest.mark.parametrize("text", MOMENTS)
def test_moments_that_no_optimizer_can_use_name_their_entry(tmp_path, text):
    checkpoint = Trained(1.0).save(tmp_path, 1)
    change_state(checkpoint, lambda state: None)
    tensors = load_file(checkpoint / "optimizer.safetensors")
    MOMENTS[text](tensors)
    save_file(tensors, checkpoint / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(f"optimizer.safetensors: {text}")):
        Trained().restore(checkpoint)


@pytest.mark.parametrize("name", ["dla.safetensors", "lora.safetensors", "optimizer.safetensors", "state.json"])
def test_any_flipped_bit_is_noticed(tmp_path, name):
    checkpoint = Trained(1.0).save(tmp_path, 1)
    whole = (checkpoint / name).read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        (checkpoint / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=checkpoint.name):
            Trained().restore(checkpoint)


@pytest.mark.parametrize("damage", ["missing", "cut off", "pipe", "nothing left"])
def test_the_checkpoint_before_a_damaged_one_is_taken_and_said(tmp_path, damage):
    trained = Trained()
    for step in (1, 2):
        trained.fill(step)
        newest = trained.save(tmp_path, step)
    file = newest / "lora.safetensors"
    data = file.read_bytes()
    file.unlink()
    if damage == "cut off":
        file.write_bytes(data[:-1])
    elif damage == "pipe":
        os.mkfifo(file)
    elif damage == "nothing left":
        [path.unlink() for path in newest.iterdir()]
    other = Trained()
    found = resume(tmp_path, lambda state: None, other.dla, other.lora, other.optimizer)
    assert found.checkpoint.name == "checkpoint-00000001" and found.state["step"] == 1
    (line,) = found.problems
    assert line.startswith("checkpoint-00000002 is damaged (") and "so checkpoint-00000001 is taken" in line
    assert (tmp_path / "damaged-checkpoint-00000002").is_dir() and not newest.exists()
    trained.save(tmp_path, 2)  # the run comes here again
    assert Trained().restore(newest) == 2


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    newest = Trained(1.0).save(tmp_path, 1)
    (newest / "optimizer.safetensors").unlink()
    other = Trained()
    with pytest.raises(CheckpointError, match="checkpoint-00000001: optimizer.safetensors does not exist. Move this"):
        resume(tmp_path, lambda state: None, other.dla, other.lora, other.optimizer)
    (newest / "state.json").unlink()
    with pytest.raises(CheckpointError, match="checkpoint-00000001: state.json does not exist. Move this"):
        newest_state(tmp_path)
    assert newest.is_dir()


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
