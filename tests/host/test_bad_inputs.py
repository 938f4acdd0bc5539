"""Bad inputs: each ends in a result or in an error of ours that names node, input, value and way out."""

import json
import logging
import os
import shutil
from functools import partial

import folder_paths
import pytest
import torch
from subject_dla.common.drawing.sheet import sheet_of_batches
from subject_dla.common.files import DataError, name_problem, path_problem
from subject_dla.common.images import cut_off
from subject_dla.loaders import folders
from subject_dla.loaders.preprocessing import DINO, preprocess
from subject_dla.loaders.reference_latents import cut_hints
from subject_dla.nodes.encode import SubjectAddIdentity, SubjectPromptList
from subject_dla.nodes.files import report_path, save_reports
from subject_dla.nodes.sample import SubjectStagedSampler
from subject_dla.nodes.sweep import SubjectContactSheet
from subject_dla.tests.small.dit import tiny
from subject_dla.tests.small.training import paint_subjects
from subject_dla.training import models
from subject_dla.training.data.dataset import read_data
from subject_dla.training.inputs import find_source
from subject_dla.training.recipe import Recipe, RecipeError

IMAGE, MASK = torch.full((1, 32, 32, 3), 0.5), torch.ones(1, 32, 32)


def test_drawn_inputs_of_every_node_end_in_a_result_or_an_error_of_ours(tmp_path):
    pytest.importorskip("hypothesis", reason="a requirement of the tests: tools/environment.py")
    from subject_dla.tools.faults.bad_inputs import try_all

    tried = dict(try_all(tmp_path, times=0.15))
    assert len(tried) > 150 and [f"{case}: {problem}" for case, problem in tried.items() if problem] == []


class Fake:
    """Has whatever is asked for."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Fake()


def add_identity(**changes):
    good = {"conditioning": [[torch.zeros(1, 4, 8), {}]], "model": Fake(), "vae": Fake(), "image": IMAGE}
    SubjectAddIdentity.execute(**good | {"strength": 1.0, "size": 0, "placement": "auto"} | changes)


NAN = torch.full((1, 4, 8), float("nan"))


def references(latents):
    return {"conditioning": [[torch.zeros(1, 4, 8), {"reference_latents": latents}]]}


@pytest.mark.parametrize("changes, words", [
    ({"model": None}, ["model is missing", "diffusion model", "Load Diffusion Model"]),
    ({"vae": "text"}, ["vae is 'text'", "VAE"]),
    ({"image": torch.zeros(1, 0, 64, 3)}, ["image is of shape (1, 0, 64, 3)", "sides of 1"]),
    ({"image": torch.zeros(0, 64, 64, 3)}, ["image is of shape (0, 64, 64, 3)"]),
    ({"image": torch.zeros(1, 64, 64, 3, dtype=torch.uint8)}, ["image is of torch.uint8", "0 to 1", "255"]),
    ({"mask": torch.full((1, 32, 32), float("nan"))}, ["mask is", "1024 values are NaN"]),
    ({"mask": torch.zeros(1, 0, 8)}, ["mask is of shape (1, 0, 8)"]),
    ({"region": [MASK]}, ["region is list", "MASK"]),
    ({"conditioning": []}, ["conditioning is empty", "one entry"]),
    ({"conditioning": [[torch.zeros(4, 8), {}]]}, ["entry 1: tokens is of shape (4, 8)"]),
    ({"conditioning": [[NAN, {}]]}, ["entry 1: tokens", "32 values are NaN"]),
    (references([None]), ["conditioning: entry 1: reference_latents", "holds NoneType"]),
    (references(torch.zeros(1, 16, 8, 8)), ["conditioning: entry 1: reference_latents", "is Tensor, expected a list"]),
    (references([torch.zeros(1, 16, 8, 8, dtype=torch.int32)]), ["entry 1: reference_latents", "holds torch.int32"]),
    (references([torch.zeros(1, 16, 0, 8)]), ["entry 1: reference_latents is of shape (1, 16, 0, 8)"]),
    (references([NAN[None]]), ["entry 1: reference_latents is", "32 values are NaN"]),
    ({"strength": float("nan")}, ["strength is nan", "0.0 to 2.0"]),
    ({"strength": 1e308}, ["strength is 1e+308", "0.0 to 2.0"]),
    ({"size": 10**12}, ["size is 1e+12", "0 to 4096"]),
    ({"size": "7"}, ["size is '7'", "whole number"]),
    ({"placement": 7}, ["placement is 7", "a text"]),
    ({"stages": True}, ["stages is True", "schedule"]),
])  # fmt: skip
def test_an_input_that_another_node_gives_is_named_with_value_and_way_out(changes, words):
    with pytest.raises(ValueError) as error:
        add_identity(**changes)
    text = str(error.value)
    assert text.startswith("Add Identity: ") and all(word in text for word in words), text
    assert text.endswith(("connected there.", "Divide by 255 first?", "there).", "that node.")), text


@pytest.mark.parametrize("prompts, words", [
    (None, "prompts is missing"), ("a\0b", "character 2 is NUL"), ("ab\ud800", "character 3"), (["x"],
    "prompts is list"),
])  # fmt: skip
def test_texts_are_texts(prompts, words):
    with pytest.raises(ValueError, match=f"^Prompt List: .*{words}"):
        SubjectPromptList.execute(prompts=prompts, prefix="x")


@pytest.mark.parametrize("latent, words", [
    ({}, "latent_image is dict"), ({"samples": None}, "samples is NoneType"),
    ({"samples": torch.zeros(1, 16, 0, 8)}, r"samples is of shape \(1, 16, 0, 8\)"),
    ({"samples": NAN[None]}, "32 values are NaN"),
    ({"samples": torch.zeros(1, 4, 8, 8), "noise_mask": torch.full((1, 8, 8), 1e30)},
    "noise_mask is of values from 1e"),
    ({"samples": torch.zeros(1, 4, 8, 8), "batch_index": [-1]}, "batch_index is list"),
])  # fmt: skip
def test_latents_that_cannot_be_sampled_are_refused(latent, words):
    positive = [[torch.zeros(1, 4, 8), {}]]
    with pytest.raises(ValueError, match=f"^Staged Sampler: latent_image.*{words}|^Staged Sampler: {words}"):
        SubjectStagedSampler.execute(Fake(), positive, latent, Fake(), 0, 4, 1.0, "euler", "simple", 1.0)


def test_nodes_that_take_lists_refuse_empty_ones():
    with pytest.raises(ValueError, match="^Contact Sheet: images holds no picture, expected a list of at least one"):
        SubjectContactSheet.execute(images=[])
    with pytest.raises(ValueError, match="^Contact Sheet: images is a list with an empty entry"):
        SubjectContactSheet.execute(images=[IMAGE, None])


def test_a_sheet_says_which_pictures_are_broken(caplog):
    pictures = torch.cat([IMAGE, IMAGE / 0 * 0, IMAGE * 255])
    with caplog.at_level(logging.WARNING):
        assert bool(sheet_of_batches([pictures]).isfinite().all())
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2 and "picture 2 of images holds values that are NaN" in texts[0]
    assert "picture 3 of images has values from 128 to 128" in texts[1]
    with pytest.raises(ValueError, match=r"A picture of a sheet is \(8, 8, 2\), expected \(height, width, 3\)"):
        sheet_of_batches([torch.zeros(1, 8, 8, 2)])


HOSTILE = [
    "../x", "a/../../x", "/etc/x", "C:\\x", "C:x", "\\\\host\\x", "\\x", "..\\x", "..", "...", ".. /x", ". ./x",
    "CONIN$", "lpt²", "a\0b", "a\nb", "a\x1b[31m",
    "CON",
    "nul.txt", "a/aux/b", "COM1", "lpt9.x", "a" * 300, "a/" + "b" * 5000, "\u202etxt", "/".join(["a"] * 600),
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_in_the_folders_that_the_user_configured(name, tmp_path, monkeypatch):
    assert path_problem(name)
    for kind in ("input", "output"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{kind}_directory", lambda kind=kind: str(tmp_path / kind))
    with pytest.raises(ValueError, match="filename_prefix is .*outside the output folder: expected a name in it"):
        report_path(name)
    with pytest.raises(ValueError) as error:
        find_source(name)
    assert len(str(error.value)) < 500
    for kind in ("mllm", "dla", "orientation"):
        with pytest.raises(ValueError) as error:
            folders.find(kind, name)
        assert len(str(error.value)) < 1000
    with pytest.raises(ValueError, match="models/loras has no"):
        models.find_lora(name)
    with pytest.raises(RecipeError, match="run.name is "):
        Recipe.from_dict({"run": {"name": name}})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["input", "output"]


@pytest.mark.parametrize("name", [
    "CON.safetensors", "nul", "a/aux.safetensors", "COM1.safetensors", "lpt\u00b2.safetensors", "CONIN$.safetensors",
    "x.safetensors:evil.safetensors", "x.safetensors.", "a /x.safetensors",
])  # fmt: skip
def test_names_that_windows_takes_for_other_files_are_refused_there(name, tmp_path, monkeypatch):
    assert name_problem(name, windows=False) == ""
    assert "Windows" in name_problem(name, windows=True)
    monkeypatch.setattr(folders, "name_problem", partial(name_problem, windows=True))
    monkeypatch.setattr(models, "name_problem", partial(name_problem, windows=True))
    for kind in ("mllm", "dla", "orientation"):
        with pytest.raises(ValueError, match=f"is no name in models/{kind}: it holds .* Windows .* Choose a"):
            folders.find(kind, name)
    with pytest.raises(ValueError, match="models/loras has no "):
        models.find_lora(name)


@pytest.mark.parametrize("name", ["report", "a/b", "üñí/狐", "a b", "%year%/x", "a.b", "console", "x-👩\u200d🚀"])
def test_other_names_are_taken(name, tmp_path, monkeypatch):
    assert path_problem(name) == ""
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    save_reports(report_path(name), json="{}")
    (made,) = tmp_path.rglob("*.json")
    assert made.read_text() == "{}" and made.name.endswith("_00001_.json")


def test_links_in_the_output_folder_are_followed_as_the_host_does(tmp_path, monkeypatch):
    (tmp_path / "output").mkdir()
    (tmp_path / "disk").mkdir()
    try:
        os.symlink(tmp_path / "disk", tmp_path / "output" / "link")
    except OSError:
        pytest.skip("this system makes no links")
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    if getattr(folder_paths, "is_within_directory", None):  # later hosts refuse them
        with pytest.raises(ValueError, match="'link/x', where nothing can be written .*outside the output folder"):
            report_path("link/x")
        return
    save_reports(report_path("link/x"), json="{}")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["x_00001_.json"]


def test_links_in_the_input_folder_are_followed_but_not_out_of_a_lists_folder(tmp_path, monkeypatch):
    """The rule of SECURITY.md: a folder of subjects may be made of links, a list names what is below its own folder."""
    away = paint_subjects(tmp_path / "away", 2)
    there, root = min(away.iterdir()), tmp_path / "input"
    (root / "linked").mkdir(parents=True)
    try:
        os.symlink(away, root / "folder")
        os.symlink(there, root / "linked" / "fox")
    except OSError:
        pytest.skip("this system makes no links")
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(root))
    for name in ("folder", "linked"):
        data = read_data(find_source(name), validation=0.0)
        assert len(data.training) > 0 and data.problems == ()
    pictures = sorted(path.name for path in there.iterdir() if path.suffix != ".txt")[:2]
    entry = {"prompt": "a fox", "image_paths": [f"fox/{pictures[0]}"], "image_tgt_path": f"fox/{pictures[1]}"}
    (root / "linked" / "list.json").write_text(json.dumps([entry]), encoding="utf-8")
    with pytest.raises(DataError, match=rf"'fox/{pictures[1]}' leads out of {root / 'linked'}, expected a picture in"):
        read_data(find_source("linked/list.json"))
    os.remove(root / "linked" / "fox")
    shutil.copytree(there, root / "linked" / "fox")
    os.symlink(root / "linked", root / "again")  # the list's own folder may be reached by a link
    assert len(read_data(find_source("again/list.json"), validation=0.0).training) == 1


def test_a_report_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="filename_prefix is 'file/x', where nothing can be written"):
        report_path("file/x")
    with pytest.raises(ValueError, match="x_00001_.json cannot be written"):
        save_reports(tmp_path / "gone" / "x_00001_", json="{}")


@pytest.mark.parametrize("size, kept, share", [
    ((5600, 28), (512, 16), "84%"), ((69, 1542), (16, 512), "30%"), ((64, 64), (64, 64), ""), ((1000, 1010), (992,
    1008), ""),
])  # fmt: skip
def test_a_cut_is_told_with_its_share(size, kept, share):
    text = cut_off(*size, *kept)
    assert text.startswith(f"{share} of the picture ({size[0]} x {size[1]} px) is cut off") if share else text == ""


def test_add_identity_and_the_published_preprocessing_say_what_they_cut_off(caplog):
    model = tiny("flux")
    pictures = {"image_1": torch.zeros(1, 28, 5600, 3), "image_2": None, "image_3": torch.zeros(2, 64, 64, 3)}
    (hint,) = cut_hints(model, pictures)
    assert hint.startswith("image_1: 84% of the picture (5600 x 28 px) is cut off at its edges to fit 512 x 16.")
    with caplog.at_level(logging.WARNING):
        preprocess(torch.zeros(64, 96, 3), DINO)
        assert not caplog.records
        preprocess(torch.zeros(64, 640, 3), DINO)
    (record,) = caplog.records
    assert "92% of the picture (640 x 64 px) is cut off" in record.getMessage()
