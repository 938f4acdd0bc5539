"""Settings of a run, its flow times and random numbers."""

import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from subject_dla.dla import MLLMInfo
from subject_dla.training.flow import FlowTimes, generator, losses, noisy, weight
from subject_dla.training.recipe import Recipe, RecipeError, read_toml, template

BAD = {
    "training.steps": [True, 1.0, "10", None, -1, 10**9, float("inf")], "training.batch_size": [0, False, [1]],
    "training.learning_rate": ["1e-4", True, -1e-9, 1.5, float("nan"), None], "training.stage": [0, 3, 1.0],
    "training.mllm_only": [1.01, -0.01, "half"], "training.checkpointing": [1, "true", 0.0],
    "training.optimizer": ["sgd", "", 1, ["adamw"]], "training.weighting": ["None", None],
    "training.seed": [-1, 2**63, 0.5], "lora.rank": [-1, 4097, 512.0], "data.source": [5, None, ["a"]],
    "data.validation": [1.0, -0.1, "0.1"], "data.resolution": [63, 4097, "512"],
    "dla.layer_subset": ["all", 3, {}], "run.keep": [0, 1001], "run.dtype": ["float32", "fp8"],
    "run.name": [
        "", " ", ".", "..", "a/b", "a\\b", "../a", "/a", "C:a", "a\0b", "a\nb", ".hidden", "ends.", " a", "a?", "a*",
        "<a>", 'a"b', "a|b", "\ud800", "n" * 101, "🦊" * 60, "CON", "nul.x", "lpt²", 5, None, True,
    ],
}  # fmt: skip


@pytest.mark.parametrize("setting, value", [(setting, value) for setting, values in BAD.items() for value in values])
def test_a_bad_setting_is_named_with_what_was_found_and_expected(setting, value):
    section, name = setting.split(".")
    with pytest.raises(RecipeError) as error:
        Recipe.from_dict({section: {name: value}})
    text = str(error.value)
    assert text.startswith(f"{setting} is {value!r}"[:200]) and "expected" in text and text.isprintable()


def test_what_is_no_setting_is_named_with_what_there_is():
    for values, words in (
        ({"train": {}}, ("[train]", "[training]")), ({"training": 5}, ("training is 5", "[training]")),
        ({"training": {"lr": 1}}, ("[training] has no 'lr'", "learning_rate")),
        ({"training": {"mllm_only": 0.7, "vae_only": 0.4}}, ("mllm_only 0.7", "vae_only 0.4", "at most 1")),
        ({"run": ["a"]}, ("run is ['a']", "[run]")),
    ):  # fmt: skip
        with pytest.raises(RecipeError) as error:
            Recipe.from_dict(values)
        assert all(word in str(error.value) for word in words), str(error.value)
    with pytest.raises(RecipeError, match=r"my\.toml: not TOML"):
        read_toml("[training\nsteps = 5", "my.toml")


def test_the_template_holds_every_default_and_its_meaning():
    values = read_toml(template())
    assert Recipe.from_dict(values) == Recipe()
    for section in fields(Recipe):
        assert list(values[section.name]) == [item.name for item in fields(section.default)]
    lines = [line for line in template().splitlines() if "=" in line]
    assert all("  # " in line for line in lines) and len(lines) > 60
    assert Recipe.from_dict(Recipe().to_dict()) == Recipe()


def test_good_values_at_the_bounds():
    name = "Fuchs 2 (rot), für's_Öl-1.5"
    training = {"seed": 2**63 - 1, "learning_rate": 0, "mllm_only": 0.3, "vae_only": 0.7, "stage": 2}
    run = {"name": name, "save_every": 10**9}
    recipe = Recipe.from_dict({"run": run, "training": training, "lora": {"rank": 512}})
    assert recipe.run.name == name and recipe.steps == 10_000
    assert recipe.shares == pytest.approx({"mllm": 0.3, "vae": 0.7, "both": 0.0})
    assert Recipe().shares == {"mllm": 1.0} and Recipe().steps == 25_000
    without = Recipe.from_dict({"training": {"stage": 2, "vae_only": 0.5}})  # nothing would learn in such a pass
    assert without.shares == pytest.approx({"mllm": 0.35, "vae": 0.0, "both": 0.65})


def test_a_dla_that_does_not_fit_the_mllm_is_a_bad_recipe():
    info = MLLMInfo("small", "qwen2_5_vl", 3, 256)
    subsets = ([0, 4], [1.5], [True], ["a"], [[1]], [2, 1])
    for values, word in (({"heads": 3}, "divisor"), *(({"layer_subset": subset}, "layer") for subset in subsets)):
        with pytest.raises(RecipeError, match=rf"\[dla\].*{word}"):
            Recipe.from_dict({"dla": values}).dla_config(info, 64, "flux")
    config = Recipe().dla_config(info, 64, "flux")
    assert (config.heads, config.blocks, config.layer_subset, config.context_width) == (2, 1, None, 64)


def test_a_node_gives_its_widgets_and_options_have_the_last_word():
    widgets = {"steps": 10, "learning_rate": 1e-3, "rank": 8, "resolution": 256}
    options = "training.steps = 20\n[lora]\nlearning_rate = 0.5"
    recipe = Recipe.from_widgets(Path("in") / "foxes", "fox", options, widgets)
    assert (recipe.training.steps, recipe.training.learning_rate) == (20, 1e-3)
    assert (recipe.lora.rank, recipe.lora.learning_rate, recipe.data.resolution) == (8, 0.5, 256)
    assert (recipe.data.source, recipe.run.name) == (str(Path("in") / "foxes"), "fox")
    paths = ('data.source = "/etc"', 'data.validation_source = "/etc"', 'models.vae = "x"')
    for options in (*paths, "steps = 5", "x.y = 1", "=", "training.lr = 1"):
        with pytest.raises(RecipeError):
            Recipe.from_widgets(Path("foxes"), "fox", options, widgets)


def test_streams_of_random_numbers_differ_and_come_again():
    before = torch.get_rng_state()
    keys = [(seed, stream, n) for seed in (0, 1, 2**63 - 1) for stream in (0, 1, 100) for n in range(300)]
    keys += [(0,), (0, 0), (0, 0, 0, 0), (0, 0, 0, 1)]
    drawn = {key: torch.randn(8, generator=generator(*key)) for key in keys}
    assert len({tuple(row.tolist()) for row in drawn.values()}) == len(keys)
    assert all(torch.equal(torch.randn(8, generator=generator(*p)), drawn[p]) for p in keys[::-50])
    table = torch.stack([drawn[key] for key in keys[:900]])
    assert table.mean().abs() < 0.05 and (table.std() - 1).abs() < 0.05
    for shift in (1, 2, 300):  # neighbouring keys and streams have nothing to do with each other
        assert (table[:-shift] * table[shift:]).mean().abs() < 0.05
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shift", [1.0, 3.0, math.exp(1.15), 0.5])
def test_flow_times_follow_their_distribution(shift):
    share = torch.linspace(0, 1, 1001)
    for times in ("logit_normal", "uniform"):
        t = FlowTimes(times, shift)(share)
        assert t.dtype == torch.float32 and 0 < t.min() and t.max() < 1 and bool((t.diff() > 0).all())
    inner = share[1:-1].double()
    t = FlowTimes("logit_normal", shift)(inner)  # the shift moves the mean of the logits by its logarithm
    torch.testing.assert_close(t.double().logit(), torch.special.ndtri(inner) + math.log(shift), atol=2e-4, rtol=1e-4)
    t = FlowTimes("uniform", shift)(inner)  # as the host's flux_time_shift
    torch.testing.assert_close(t.double(), shift / (shift + 1 / inner - 1), atol=1e-6, rtol=1e-5)


def test_noise_and_loss_agree_with_the_velocity():
    draw = torch.Generator().manual_seed(0)
    for shape in ((3, 4, 5, 6), (3, 4, 1, 5, 6)):
        clean, noise = (torch.randn(shape, generator=draw) for _ in range(2))
        t = torch.tensor([0.0, 0.25, 1.0])
        x = noisy(clean, noise, t)
        assert torch.equal(x[0], clean[0]) and torch.equal(x[2], noise[2])
        torch.testing.assert_close(x[1] + 0.75 * (noise - clean)[1], noise[1])  # the velocity leads to the noise
        assert torch.equal(losses(noise - clean, clean, noise), torch.zeros(3))
        off = losses((noise - clean) + torch.tensor([1.0, 2.0, 3.0]).reshape(3, *[1] * (len(shape) - 1)), clean, noise)
        torch.testing.assert_close(off, torch.tensor([1.0, 4.0, 9.0]))
    t = torch.tensor([0.25, 0.5, 1.0])
    assert torch.equal(weight(t, "none"), torch.ones(3)) and weight(t, "sigma_sqrt").tolist() == [16, 4, 1]
    torch.testing.assert_close(weight(t, "cosmap"), torch.tensor([3.2, 4.0, 2.0]) / math.pi)


@pytest.mark.parametrize("start", [["training"], ["-m", "training"]], ids=["path", "module"])
def test_the_script_starts_by_its_path_and_as_a_module(start):
    command, root = [sys.executable, *start, "--template"], Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout == template(), done.stderr


def test_a_recipe_file_may_be_utf_16_and_another_one_is_named(tmp_path):
    from subject_dla.training.__main__ import _read

    (tmp_path / "windows.toml").write_text(template(), encoding="utf-16")  # what PowerShell's > writes
    assert Recipe.from_dict(_read(tmp_path / "windows.toml", ["training.steps = 5"])).training.steps == 5
    (tmp_path / "broken.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(ValueError, match="broken.toml: cannot be read .*UTF-8"):
        _read(tmp_path / "broken.toml", [])


@pytest.mark.parametrize("path", [r"C:\data\cats", r"C:\Users\me", r"D:\temp\new", "\\\\server\\share"])
def test_a_windows_path_in_double_quotes_is_told_of_backslashes(path):
    text = f'[data]\nsource = "{path}"\n'
    if path.startswith("\\"):  # \\server is an escaped backslash, \s is none
        assert read_toml("[data]\nsource = '" + path + "'")["data"]["source"] == path
    with pytest.raises(RecipeError, match=r"backslash in double quotes .* 'C:\\data\\cats', \"C:/data/cats\" or"):
        Recipe.from_dict(read_toml(text))


def test_other_slips_in_toml_are_not_told_of_backslashes():
    with pytest.raises(RecipeError, match="not TOML") as caught:
        read_toml("[data]\nsource = cats")
    assert "backslash" not in str(caught.value)
