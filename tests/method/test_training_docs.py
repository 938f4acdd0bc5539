"""The documents say what the code says."""

from pathlib import Path

import pytest
from subject_dla.loaders import backbones
from subject_dla.training import recipe
from subject_dla.training.dit import memory

ROOT = Path(__file__).resolve().parents[2]


def test_settings_and_memory():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert memory.fits().strip() in text
    assert recipe.template().strip() in text


def test_families():
    assert backbones.table() in (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes(path):
    read = recipe.Recipe.from_dict(recipe.read_toml(path.read_text(encoding="utf-8"), path.name))
    assert read.run.name and read.data.source and read.models.diffusion_model
