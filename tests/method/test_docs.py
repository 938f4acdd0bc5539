"""The documents say what the code says: names, files, folders, settings, memory, families, the README's results."""

import ast
import json
import re
from functools import cache
from itertools import product
from types import SimpleNamespace

import pytest
from PIL import Image
from subject_dla.loaders import backbones
from subject_dla.loaders.mllm import encoders
from subject_dla.tests.method.test_layout import BELOW, ROOT
from subject_dla.tests.small import families_table
from subject_dla.training import recipe
from subject_dla.training.dit import flops, memory

TEXT, TRAINING, BACKBONES, EVIDENCE = (
    (ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in ("architecture", "training", "backbones", "evidence")
)
WALKS = TEXT.split("## Four walks through the code")[1].split("\n## ")[0].split("\n### ")[1:]


@cache
def names(path: str) -> set[str]:
    """Of a file's functions, classes and methods, these as Class.method."""
    found = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            found |= {f"{node.name}.{inner.name}" for inner in ast.iter_child_nodes(node) if hasattr(inner, "name")}
    return found


def test_every_name_exists():
    references = re.findall(r"`([\w/]+\.py):([\w.]+)`", TEXT)
    assert len(references) > 30
    assert [f"{path}:{name}" for path, name in references if name not in names(path)] == []
    files = re.findall(r"`([\w/]+\.(?:py|md|toml))`", TEXT)
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_a_walk_has_at_most_eight_steps_which_all_name_code():
    assert len(WALKS) == 4
    for walk in WALKS:
        steps = re.split(r"^\d+\. ", walk, flags=re.MULTILINE)[1:]
        assert 1 < len(steps) <= 8 and all(re.search(r"\.py:\w", step) for step in steps), walk


def test_the_table_has_every_folder_of_the_layout():
    folders = set(re.findall(r"^\| `(\w+)/` \|", TEXT, flags=re.MULTILINE))
    assert {name for name in BELOW if "/" not in name} <= folders


def test_the_readmes_results_are_the_evidences():
    cells = re.findall(r"\d\.\d{3} \(\d\.\d{3}–\d\.\d{3}\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(cells) == 12 and all(cell in EVIDENCE for cell in cells)


def test_links_lead_to_files():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text("utf-8"))]
    assert len(links) > 10 and [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_settings_memory_and_families():
    training = memory.fits(), flops.compare(), recipe.template()
    for page, text in (*((TRAINING, text) for text in training), (BACKBONES, backbones.table())):
        assert text.strip() in page, f"this is missing or has changed:\n{text}"


def test_help_of_train_dla():
    text, help_page = ((ROOT / name).read_text("utf-8") for name in ("docs/nodes.md", "web/docs/SubjectTrainDLA.md"))
    assert all(backbones.titles(backbones.TRAINED) in " ".join(page.split()) for page in (text, help_page))
    for backbone in backbones.TRAINED:
        steps = memory.steps_of(backbone, 512, 0)
        peak = " / ".join(f"{steps[weight, 'adamw', True].total / memory.GIB:.0f}" for weight in (2, 1))
        assert f"{backbone.training.release} {peak}" in text
    shown = re.findall(r"^([a-z]+)\.([a-z_]+) = ", text, re.MULTILINE)
    groups = dict(re.findall(r"^\[([a-z]+)\]\n(.+?)(?:\n\n|\Z)", recipe.template(), re.MULTILINE | re.DOTALL))
    assert len(shown) > 4 and all(f"\n{name} = " in f"\n{groups[part]}" for part, name in shown)


def test_families_by_host():
    hosts, cells = families_table.read_page(), {*product(families_table.ROWS.values(), families_table.COLUMNS)}
    assert "ComfyUI 0.3.75" in hosts
    for host, found in hosts.items():
        assert found.keys() == cells, f"{host}: nox -s tests -- --long -m shows --write-docs"
        assert {word for cell in found.values() for word in cell.split("; ")} <= {*families_table.WORDS}
    assert [cell for cell in cells if all(found[cell] == "not run" for found in hosts.values())] == []


@pytest.mark.parametrize("change, long, words", [
    ({}, True, ""),
    ({("FLUX.1", "trains"): {"refused"}}, True, "not found: FLUX.1: trains: run"),
    ({("FLUX.1", "trains"): {"refused"}}, False, "not found: FLUX.1: trains: run"),
    ({("FLUX.1", "trains"): set()}, True, "says anything of FLUX.1: trains"),
    ({("FLUX.1", "trains"): set()}, False, ""),  # its tests are left out
])  # fmt: skip
def test_a_run_of_all_tests_finds_what_the_page_says(change, long, words):
    option = {"keyword": "", "markexpr": "", "collectonly": False, "write_docs": False, "host_title": "0.3.75"}
    option["long"] = long
    config = SimpleNamespace(args=[str(ROOT / "tests")], option=SimpleNamespace(**option))
    plugin = families_table.FamiliesTable(config)
    plugin.found |= {cell: {word} for cell, word in families_table.read_page()["ComfyUI 0.3.75"].items()} | change
    finish = plugin.pytest_sessionfinish(0)
    next(finish)
    with pytest.raises(pytest.exit.Exception if words else StopIteration, match=words or None):
        next(finish)


def test_text_encoders():
    text = (ROOT / "docs" / "nodes.md").read_text("utf-8")
    assert encoders.table() in text, f"this is missing or has changed:\n{encoders.table()}"
    assert re.search(r"\| Gemma 4 +\| any other +\| E2B, E4B +\|", text)  # larger ones read text alone


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes(path):
    read = recipe.Recipe.from_dict(recipe.read_toml(path.read_text(encoding="utf-8"), path.name))
    assert read.run.name and read.data.source and read.models.diffusion_model


def test_pictures_of_the_gallery_bring_their_graphs_back():
    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    shown = re.findall(r'<img src="([^"]+)"', page)
    pictures = [ROOT / "docs" / name for name in shown if "/gallery/" in name]
    assert len(pictures) > 30 and len(set(pictures)) == len(pictures)
    assert all((ROOT / "docs" / name).is_file() for name in shown)
    assert sorted(pictures) == sorted((ROOT / "docs" / "images" / "gallery").iterdir())
    for path in pictures:
        with Image.open(path) as picture:
            graph, prompt = json.loads(picture.text.get("workflow", "{}")), json.loads(picture.text["prompt"])
        classes = {node["class_type"] for node in prompt.values()}
        assert {"SaveImage", "SubjectStagedSampler"} <= classes
        assert not graph or classes <= {node["type"] for node in graph["nodes"]}
