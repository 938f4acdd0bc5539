"""The harness of `nox -s faults`: what it calls clear, and that its damages are damages."""

import importlib
import json
import os
import pickle
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from subject_dla.common.safetensors_header import read_header
from subject_dla.sampling.stages import preset
from subject_dla.tools.faults._child import Case, run, try_all, unclear
from subject_dla.tools.faults._damage import code_ran, damages, in_folder, malicious_pickle
from subject_dla.tools.faults._table import TABLE
from subject_dla.tools.faults.long_run import BLOCK, settings
from subject_dla.tools.tables import main

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX alone")


def fail(error):
    raise error


def allocate():
    bytearray(2**28)[::4096] = b"x" * 2**16


@pytest.mark.parametrize(
    "work, verdict",
    [
        (lambda: fail(ValueError("weights.safetensors is damaged")), ""),
        (lambda: fail(ValueError("something is damaged")), "names no file"),
        (lambda: fail(KeyError("weights.safetensors")), "bare KeyError"),
        (lambda: None, "was taken without a word"),
        (lambda: time.sleep(30), "no end after 0.5 s"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "the process died"),
        (lambda: subprocess.run(["/bin/true"]), "ran subprocess.Popen"),
        (allocate, "took 0.2 GB"),
        (lambda: bytearray(2**40), "bare MemoryError"),
    ],
)
def test_an_end_is_clear_or_not(tmp_path, work, verdict):
    torch.set_num_threads(1)
    case = Case("case", tmp_path / "weights.safetensors", work)
    seconds = 0.5 if verdict.startswith("no end") else 20
    found = unclear(case, run(work, seconds, 2**27), seconds, 2**27)
    assert found.startswith(verdict) and bool(found) == bool(verdict), found
    if verdict == "was taken without a word":
        assert unclear(case._replace(may_pass=True), run(work)) == ""


def test_cases_are_counted(tmp_path):
    clear = Case("clear", tmp_path / "a.json", lambda: fail(ValueError("a.json: no list")))
    found = try_all([clear, clear._replace(name="odd", work=lambda: [][0])], "bad_files")
    assert (found["bad_files_tried"], found["bad_files_clear"]) == (2, 1)
    assert found["bad_files_unclear"][0].startswith("odd: bare IndexError")
    with pytest.raises(SystemExit, match="No case's name holds other"):  # not 0 of 0 clear
        try_all([clear], "bad_files", ["other"])


def test_a_malicious_pickle_is_seen():
    assert not code_ran()
    pickle.loads(malicious_pickle())  # noqa: S301
    assert code_ran() and not code_ran()


def test_the_long_runs_settings_cost_the_same_in_each_block_and_are_the_same_each_time():
    drawn = settings(3 * BLOCK)
    assert drawn == settings(3 * BLOCK) and drawn[:BLOCK] == settings(BLOCK) and drawn != settings(3 * BLOCK, seed=1)
    costs = [sorted((s.width, s.height, s.batch_size, s.steps, s.cfg) for s in drawn[at : at + BLOCK])
             for at in range(0, 3 * BLOCK, BLOCK)]  # fmt: skip
    assert costs[0] == costs[1] == costs[2] and len(set(drawn)) == 3 * BLOCK
    for one in drawn:
        preset(one.preset, one.clock, one.tau1, one.tau2)  # raises for a schedule that is none


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model" / "model.safetensors"
    path.parent.mkdir()
    save_file({"a.weight": torch.rand(4, 6), "b.bias": torch.rand(6)}, path, {"config": json.dumps({"width": 4})})
    (path.parent / "config.json").write_text("{}")
    return path


def test_each_damage_changes_the_file_and_is_named_once(weights, tmp_path):
    names = []
    for number, damage in enumerate(damages(weights)):
        bad = tmp_path / f"{number}.safetensors"
        damage.write(weights, bad)
        same = bad.is_file() and not bad.is_symlink() and bad.stat().st_size == weights.stat().st_size
        assert not same or bad.read_bytes() != weights.read_bytes(), damage.name
        names.append(damage.name)
        if damage.name == "one NaN in a.weight":
            assert load_file(bad)["a.weight"].isnan().sum() == 1
        if damage.name == "metadata config: width is NaN":
            assert read_header(bad).metadata == {"config": '{"width": NaN}'}
        if not bad.is_dir():
            bad.unlink()
    assert len(names) == len(set(names)) > 100


def test_a_folder_is_copied_with_one_file_damaged(weights, tmp_path):
    original = weights.read_bytes()
    found = 0
    for _, copy, bad in in_folder(weights.parent, "config.json", tmp_path / "out"):
        assert bad.parent == copy and (copy / "model.safetensors").read_bytes() == original
        found += 1
    assert found > 25 and not any((tmp_path / "out").iterdir()) and weights.read_bytes() == original


@pytest.mark.parametrize("name", TABLE.names)
def test_help_says_what_a_kind_of_fault_is_before_anything_starts(capsys, name):
    file = importlib.import_module(f"subject_dla.tools.faults.{name}")
    with pytest.raises(SystemExit) as ended:
        file.main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and shown.startswith(f"usage: nox -s faults -- {name} ") and "[]" not in shown
    assert file.__doc__.strip() in shown and "JSON object" in shown
    with pytest.raises(SystemExit) as ended:
        main(TABLE, ["--help"])
    assert ended.value.code is None and f"  {name:20} {file.__doc__.splitlines()[0]}" in capsys.readouterr().out
