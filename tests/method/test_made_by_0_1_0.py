"""Recipes and a DLA that 0.1.0 made are read as they were then (a run of 0.1.0: tests/host/test_training_run.py)."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from subject_dla.dla import Features, MLLMInfo, aggregate, load_dla
from subject_dla.training.recipe import Recipe, read_toml

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "0.1.0"
RECIPES = sorted((FIXTURES / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_read(path):
    values = read_toml(path.read_text(encoding="utf-8"), path.name)
    recipe = Recipe.from_dict(values).to_dict()
    assert len(values) > 2
    for section, entries in values.items():
        for name, value in entries.items():
            assert recipe[section][name] in (value, tuple(value) if isinstance(value, list) else value), (section, name)


def test_the_template_has_the_defaults_of_then():
    values = read_toml((FIXTURES / "recipes" / "template.toml").read_text(encoding="utf-8"))
    assert Recipe.from_dict(values) == Recipe() and sum(map(len, values.values())) > 60
    assert set(values) == {section.name for section in fields(Recipe)}


def test_a_dla_gives_the_context_of_then():
    dla = load_dla(FIXTURES / "dla.safetensors")
    then = load_file(FIXTURES / "context.safetensors")
    info = MLLMInfo("small", "qwen2_5_vl", 3, 32)
    assert dla.config.mllm == info and (dla.config.context_width, dla.config.heads) == (48, 4)
    assert dla.config.provenance == {"training": "none: made by 0.1.0"}
    hidden, modality, index = then["hidden_states"], then["modality"], then["image_index"]
    mask = torch.ones(modality.shape, dtype=torch.bool)
    with torch.no_grad():
        found = aggregate(Features(hidden, (0, 1, 2, 3), modality, index, mask, info, prefix=(2,)), dla)
    torch.testing.assert_close(found.tokens, then["tokens"])
    assert torch.equal(found.attention_mask, then["attention_mask"])
