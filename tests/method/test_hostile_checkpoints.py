"""Checkpoints and caches without checksums, as 0.1.0 wrote them, in which something else stands."""

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from subject_dla.tests.small.killed import Trained
from subject_dla.training.checkpoints import DamagedCheckpointError, _moments_problem, check_same_run, resume
from subject_dla.training.data.dataset import read_data
from subject_dla.training.recipe import Recipe, RecipeError


def begun(folder, **entries):
    checkpoint = Trained(0.5).save(folder, 1)
    state = json.loads((checkpoint / "state.json").read_text())
    del state["files"], state["checksum"]
    for name, value in entries.items():
        state[name] = state[name] | value
    (checkpoint / "state.json").write_text(json.dumps(state))


def resumed(folder):
    new = Trained()
    check = lambda state: check_same_run(state, Recipe())  # noqa: E731
    return resume(folder, check, new.dla, new.lora, new.optimizer)


@pytest.mark.parametrize("recipe", [{"evil": {}}, {"training": {"steps": "x"}}, {"training": [1]}, {"run": {"new": 1}}])
def test_a_recipe_that_cannot_be_read_is_told_with_the_run(tmp_path, recipe):
    begun(tmp_path / "run", recipe=recipe)
    with pytest.raises(RecipeError, match="Run 'my-dla' was begun with settings that cannot be read .* or choose"):
        resumed(tmp_path / "run")


def test_a_recipe_without_sections_has_their_defaults(tmp_path):
    begun(tmp_path / "run")
    assert resumed(tmp_path / "run").state["recipe"] == {}


@pytest.mark.parametrize(("entries", "words"), [
    ({"optimizer": {"0/more": "text"}}, "0/more is 'text', expected a number"),
    ({"optimizer": {"0/step/a": 1}}, "0/step/a is inside of step"),
    ({"optimizer": {"0/more": [1]}}, r"0/more is \[1\], expected a number"),
    ({"validation": {"9" * 5000: []}}, "validation has"),
])  # fmt: skip
def test_what_no_run_goes_on_from_is_named(tmp_path, entries, words):
    begun(tmp_path / "run", **entries)
    with pytest.raises(DamagedCheckpointError, match=f"run/checkpoint-00000001: .*{words}"):
        resumed(tmp_path / "run")


def test_nested_moments_are_taken_where_they_are_finite():
    """As bitsandbytes' 8 bit optimizers have them."""
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    moments = {0: {"step": 1, "state": {"absmax": torch.ones(2), "code": "nf4"}}}
    assert not _moments_problem(moments, optimizer)
    moments[0]["state"]["absmax"][1] = float("nan")
    assert "0/state has values that are NaN" in _moments_problem(moments, optimizer)


@pytest.mark.parametrize("column", ["target", "subject", "reference_ends", "paths.ends"])
def test_an_index_without_a_checksum_is_made_again(tmp_path, column):
    for number in range(4):
        (tmp_path / "data" / "fox").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / "data" / "fox" / f"{number}.png")
        (tmp_path / "data" / "fox" / f"{number}.txt").write_text(f"fox {number}")
    expected = [*read_data(tmp_path / "data", cache=tmp_path / "cache", validation=0.0).training]
    for file in (tmp_path / "cache").iterdir():
        with safe_open(file, "pt") as opened:
            facts, columns = opened.metadata(), {name: opened.get_tensor(name).clone() for name in opened.keys()}
        if column in columns:
            columns[column].fill_(99)
        save_file(columns, file, {name: text for name, text in facts.items() if name != "check"})
    assert [*read_data(tmp_path / "data", cache=tmp_path / "cache", validation=0.0).training] == expected
