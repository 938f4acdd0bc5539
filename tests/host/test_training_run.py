"""Runs of the small family: resumed bit for bit, ended at any point without loss, refused where they would do harm."""

import json
import logging
import math
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from subject_dla.dla import DLAConfig, DualLayerAggregator, MLLMInfo, load_dla, save_dla
from subject_dla.loaders.backbones import TRAINED
from subject_dla.loaders.dla import load_dla as load_node_dla
from subject_dla.loaders.host import load_vae
from subject_dla.loaders.mllm import load_mllm
from subject_dla.tests.host.test_parity import skip_what_the_host_lacks
from subject_dla.tests.small.dit import TinyVAE, tiny, tiny_flux
from subject_dla.tests.small.mllm import build_qwen25vl
from subject_dla.tests.small.training import paint_subjects, small_family, small_recipe
from subject_dla.training.build import make_optimizer
from subject_dla.training.checkpoints import CheckpointError, checkpoints, read_state
from subject_dla.training.data.batches import EMPTY
from subject_dla.training.dit.frozen import FrozenDiT
from subject_dla.training.export import RUN_KEY
from subject_dla.training.models import TrainingModels, load_models, start_files
from subject_dla.training.paths import RunPaths
from subject_dla.training.recipe import Recipe, RecipeError
from subject_dla.training.reporting.losses import read_table
from subject_dla.training.run import evaluate, train

STEPS = 6
STAGE_2 = {
    "training": {"stage": 2, "steps": STEPS, "accumulate": 2, "mllm_only": 0.3, "vae_only": 0.3, "drop_prompt": 0.3},
    "lora": {"rank": 2, "learning_rate": 1e-3}, "data": {"encode_ahead": 4},
}  # fmt: skip


class Stop(Exception):
    """What a run is ended by in these tests."""


class Workspace:
    """Models, data, and a folder in which runs are made."""

    def __init__(self, folder):
        self.folder = folder
        self.models, self.data = small_family(folder / "models"), paint_subjects(folder / "my subjects", 5)
        self.targets = (folder / "models" / "dla", folder / "models" / "loras")
        with torch.inference_mode():  # as nodes load them
            self.loaded = load_models(self.recipe("any"))
            build_qwen25vl(folder / "models/mllm/tiny", width=16, layers=2, heads=2, kv_heads=1, dtype=torch.float32)
            self.loaded.model, self.loaded.mllm = tiny_flux(24), load_mllm("tiny")

    def recipe(self, name, **changes):
        merged = {section: {**STAGE_2.get(section, {}), **changes.get(section, {})} for section in {*STAGE_2, *changes}}
        merged["run"] = {"name": name, **merged.get("run", {})}
        return Recipe.from_dict(small_recipe(self.models, self.data, **merged))

    def train(self, name, callback=lambda _: None, cache="cache", **changes):
        recipe = self.recipe(name, **changes)
        self.loaded.start_dla, self.loaded.start_lora = start_files(recipe)
        paths = RunPaths(self.folder / name, self.folder / cache, *self.files(name))
        with torch.inference_mode():  # as nodes run
            return train(recipe, self.loaded, paths, callback)

    def newest(self, name):
        return checkpoints(self.folder / name)[-1]

    def files(self, name):
        return [target / f"{name}.safetensors" for target in self.targets]

    def end(self, name):
        """All that a run leaves: weights, moments, losses, finished files."""
        tensors = {path.name: load_file(path) for path in self.newest(name).glob("*.safetensors")}
        tensors |= {str(path.parent.name): load_file(path) for path in self.files(name)}
        return tensors, read_state(self.newest(name))["losses"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(workspace):
    with passes() as seen:
        result = workspace.train("whole")
    assert len(seen) == STEPS * 2 and set(seen) == {"mllm", "vae", "both"}
    assert result.history.step == STEPS and len(result.history.losses) == STEPS
    return workspace.end("whole")


@contextmanager
def passes(act=lambda number, velocity: velocity):
    """The conditions of the passes through the DiT; `act` may change the velocity of pass `number`, or raise."""
    seen, real = [], FrozenDiT.velocity

    def velocity(self, noisy, t, context, references=(), **values):
        if torch.is_grad_enabled():
            seen.append("vae" if context is None else "both" if references else "mllm")
        out = real(self, noisy, t, context, references, **values)
        return act(len(seen), out) if torch.is_grad_enabled() else out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenDiT, "velocity", velocity)
        yield seen


def assert_equal(found, expected):
    (tensors, losses), (others, their_losses) = found, expected
    assert losses == their_losses
    assert tensors.keys() == others.keys()
    for name, weights in others.items():
        assert tensors[name].keys() == weights.keys()
        different = [key for key, value in weights.items() if not torch.equal(tensors[name][key], value)]
        assert not different, (name, different[:5])


def everything(*folders):
    paths = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in paths}


def stop_at(*steps):
    def callback(progress):
        if progress.seconds is not None and progress.step in steps:
            raise Stop

    return callback


@pytest.mark.parametrize("backbone", [
    pytest.param(one, marks=[pytest.mark.long] * (one.name in ("qwen_image", "omnigen2"))) for one in TRAINED
], ids=lambda backbone: backbone.name)  # fmt: skip
def test_a_run_of_each_family(workspace, monkeypatch, backbone):
    """With held-out losses and sample pictures, stopped and resumed as if it had not been; prompts differ in length."""
    skip_what_the_host_lacks(backbone.name)
    with torch.inference_mode():
        monkeypatch.setattr(workspace.loaded, "model", tiny(backbone.name))
    monkeypatch.setattr(workspace.loaded, "vae", TinyVAE(backbone))
    name, watch = f"of-{backbone.name}", {"validate_every": STEPS, "sample_every": STEPS}
    watch |= {"validation_examples": 1, "samples": 1, "sample_steps": 2}
    settings = {"run": watch, "cache": f"cache-{backbone.name}"}
    with passes() as seen:
        with pytest.raises(Stop):
            workspace.train(name, stop_at(2), **settings)
        begun, _ = workspace.end(name)
        result = workspace.train(name, **settings)
    assert set(seen) == {"mllm", "vae", "both"} and result.history.step == len(result.history.losses) == STEPS
    assert all(map(math.isfinite, result.history.losses))
    trained, _ = workspace.end(name)
    for part in ("dla.safetensors", "lora.safetensors"):
        assert any(not torch.equal(value, trained[part][key]) for key, value in begun[part].items())
    assert load_dla(workspace.files(name)[0]).config.dit == backbone.name
    assert len(list((workspace.folder / name / "samples").iterdir())) == 2
    workspace.train(f"whole-{backbone.name}", cache=settings["cache"])
    whole, losses = workspace.end(f"whole-{backbone.name}")
    assert losses == result.history.losses
    for part in ("dla.safetensors", "lora.safetensors", "optimizer.safetensors"):
        assert all(torch.equal(value, whole[part][key]) for key, value in trained[part].items())


def test_stopped_after_every_step_it_is_the_whole_run(workspace, whole):
    for step in range(1, STEPS):
        with pytest.raises(Stop):
            workspace.train("steps", stop_at(step))
        assert read_state(workspace.newest("steps"))["step"] == step
        for path in workspace.files("steps"):
            assert path.is_file()  # what there is may be used already
    workspace.train("steps")
    assert_equal(workspace.end("steps"), whole)
    assert len(checkpoints(workspace.folder / "steps")) == 2
    assert not list((workspace.folder / "steps").glob(".*"))


@pytest.mark.parametrize("part", [1, 2])
def test_stopped_in_the_middle_of_every_step_it_is_the_whole_run(workspace, whole, part):
    """By an error in the first or second pass of a step; features come from the disk, written by an earlier part."""

    def fail(number, velocity):
        if number == 2 * (step > 1) + part:
            raise Stop
        return velocity

    name, cache = f"middle-{part}", {"cache": f"cache-{part}", "data": {"cache_features": True}}
    for step in range(1, STEPS + 1):  # each part ends one step, but the first, and breaks off in the next
        with passes(fail), pytest.raises(Stop):
            workspace.train(name, **cache)
        found = checkpoints(workspace.folder / name)
        assert [read_state(path)["step"] for path in found[-1:]] == [step - 1] * (step > 1)
    workspace.train(name, **cache)
    assert_equal(workspace.end(name), whole)


def test_validation_and_samples_do_not_change_a_run(workspace, whole):
    pictures = []
    watch = {"validate_every": 1, "sample_every": 1, "save_every": 1, "keep": 1}
    watch |= {"validation_examples": 2, "samples": 1, "sample_steps": 1}
    torch.manual_seed(12345)
    result = workspace.train("watched", lambda progress: pictures.append(progress.picture), run=watch)
    assert_equal(workspace.end("watched"), whole)
    assert sorted(result.history.validation) == sorted(result.history.held_out) == list(range(STEPS + 1))
    for rows in result.history.validation.values():
        assert {row.condition for row in rows} == {"mllm", "vae", "both"}
    assert sum(picture is not None for picture in pictures) >= 3 * STEPS
    assert len(list((workspace.folder / "watched" / "samples").iterdir())) == STEPS + 1
    assert len(checkpoints(workspace.folder / "watched")) == 1
    again = workspace.train("watched", run=watch)  # it is done
    assert (again.history.losses, again.history.validation) == (result.history.losses, result.history.validation)


def test_stopped_in_validation_and_samples_it_is_the_whole_run(workspace, whole, monkeypatch):
    """Both come again; what was validated before is not validated twice."""
    calls, mark = [], workspace.folder / "validated" / "stopped"

    def counted(module, batches, count, processes):
        rows = evaluate(module, batches, count, processes)
        calls.append(0)
        if len(calls) in (2, 5):
            raise Stop
        return rows

    def callback(progress):
        if progress.picture is not None and progress.step == 3 and not mark.exists():
            mark.touch()
            raise Stop

    monkeypatch.setattr("subject_dla.training.run.evaluate", counted)
    watch = {"validate_every": 1, "validation_examples": 1, "sample_every": 3, "samples": 1, "sample_steps": 1}
    for _ in range(3):
        with pytest.raises(Stop):
            workspace.train("validated", callback, run=watch)
    result = workspace.train("validated", callback, run=watch)
    assert_equal(workspace.end("validated"), whole)
    assert sorted(result.history.validation) == list(range(STEPS + 1))
    once = workspace.train("validated-once", run=watch)
    assert result.history.validation == once.history.validation and result.history.held_out == once.history.held_out
    tables = [(workspace.folder / name / "validation.csv").read_text() for name in ("validated", "validated-once")]
    assert tables[0] == tables[1] and len(tables[0].splitlines()) == 1 + 9 * (STEPS + 1)


@pytest.mark.parametrize(("at", "value"), [(3, math.nan), (STEPS, math.nan), (STEPS, math.inf)])
def test_a_held_out_loss_that_is_no_number_is_said_and_in_no_file(workspace, whole, monkeypatch, at, value):
    said, step, name = [], [0], f"invalid-{at}-{value}"

    def broken(module, *given):
        rows = evaluate(module, *given)
        return [replace(rows[0], mean=value), *rows[1:]] if step[0] == at else rows

    def callback(progress):
        said.append(progress.text)
        step[0] = progress.step

    monkeypatch.setattr("subject_dla.training.run.evaluate", broken)
    result = workspace.train(name, callback, run={"validate_every": 3, "validation_examples": 1})
    assert_equal(workspace.end(name), whole)
    (text,) = (line for line in said if "held-out loss is" in line)
    assert text.startswith(f"left out: the validation of step {at}, whose held-out loss is {value} in 1 of 9 cells")
    assert text in result.text() and "bf16" in text
    assert sorted(result.history.validation) == [kept for kept in (0, 3, STEPS) if kept != at]
    assert sorted(read_table(workspace.folder / name / "validation.csv")) == sorted(result.history.validation)
    assert all(map(math.isfinite, load_dla(workspace.files(name)[0]).config.provenance["held_out_loss"].values()))


@pytest.mark.parametrize("file", [
    "validation.csv", *(pytest.param(name, marks=pytest.mark.long) for name in ("validation.png", "loss.csv")),
    "step-00000003.jpg",
])  # fmt: skip
def test_a_report_that_is_cut_off_comes_again(workspace, whole, monkeypatch, file):
    """A disk that is full, or a process that is killed, while one of a run's reports is written."""
    watch = {"validate_every": 3, "validation_examples": 1, "sample_every": 3, "samples": 1, "sample_steps": 1}
    written, replace, at = [], os.replace, 2 if file.startswith("validation") else 1  # of the two before and after

    def full(source, target):
        written.append(Path(target).name)
        if written[-1] == file and written.count(file) == at:
            raise OSError(28, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr("subject_dla.common.files.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        workspace.train(f"full-{file}", run=watch)
    workspace.train(f"full-{file}", run=watch)
    workspace.train("never-full", run=watch)
    assert_equal(workspace.end(f"full-{file}"), whole)
    assert written.count(file) > at and not list((workspace.folder / f"full-{file}").rglob(".*"))
    for name in ("validation.csv", "loss.csv", "samples/step-00000003.jpg"):
        first, second = ((workspace.folder / run / name).read_bytes() for run in (f"full-{file}", "never-full"))
        assert first == second, name


def draw_weights(model):
    """As the tests of 0.1.0 drew them."""
    draw = torch.Generator().manual_seed(0)
    for key, value in model.model.diffusion_model.state_dict().items():
        normal = torch.empty(value.shape).normal_(0, 0.2 if value.ndim > 1 else 0.1, generator=draw)
        value.copy_(normal + (value.ndim == 1 and not key.endswith("bias")))
    return model


FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "0.1.0" / "run"


def test_a_run_begun_by_0_1_0_ends_with_the_weights_that_0_1_0_gives(tmp_path, monkeypatch, request):
    """The fixture is that run with these models, stopped after 3 of 5 steps: checkpoint, tables, finished files; and
    `expected.safetensors`, the weights after step 5. Equal to rounding."""
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)
    shutil.copytree(FIXTURE, tmp_path / "run")
    models = small_family(tmp_path / "models")
    build_qwen25vl(tmp_path / "models/mllm/tiny", width=16, layers=2, heads=2, kv_heads=1, dtype=torch.float32)
    paint_subjects(tmp_path / "subjects", 5)
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.from_dict(read_state(checkpoints(tmp_path / "run")[-1])["recipe"])
    with torch.inference_mode():
        loaded = TrainingModels(draw_weights(tiny_flux(24)), load_vae(models["vae"]), load_mllm("tiny"))
    files, messages = (tmp_path / f"run/{kind}/small.safetensors" for kind in ("dla", "loras")), []
    with passes() as seen:
        paths = RunPaths(tmp_path / "run", tmp_path / "cache", *files)
        history = train(recipe, loaded, paths, lambda progress: messages.append(progress.text)).history
    assert set(seen) == {"mllm", "vae", "both"} and len(seen) == 4
    assert "Resuming from step 3 (checkpoint-00000003)" in messages
    told = [message for message in messages if message]
    assert "loading the diffusion model" in told and len(told) == len({*told})
    assert "dla.scores is heads now, this run began with states, and continues so." in messages
    with safe_open(FIXTURE / "expected.safetensors", framework="pt") as file:
        made = file.metadata()
    expected = load_file(FIXTURE / "expected.safetensors")
    found, start = {}, {}
    for weights, checkpoint in ((found, checkpoints(tmp_path / "run")[-1]), (start, FIXTURE / "checkpoint-00000003")):
        for part in ("dla", "lora"):
            weights |= {f"{part}.{k}": v for k, v in load_file(checkpoint / f"{part}.safetensors").items()}
    assert found.keys() == expected.keys()
    # The MLLM reads in two parts since, which rounds otherwise; other noise or another order of examples would give
    # other steps altogether.
    off, way = (sum(float((found[k] - side[k]).square().sum()) for k in expected) for side in (expected, start))
    assert off < 1e-4 * way
    assert history.losses == pytest.approx(json.loads(made["losses"]), rel=1e-3)
    assert sorted(history.validation) == [0, 3, 5] == sorted(read_table(tmp_path / "run" / "validation.csv"))
    for step, means in json.loads(made["validation"]).items():
        assert [row.mean for row in history.validation[int(step)]] == pytest.approx(means, rel=1e-3)


def test_a_run_keeps_the_form_of_the_dla_that_it_began_with(workspace):
    states = {"dla": {"scores": "states"}}
    workspace.train("states", **states)
    with pytest.raises(Stop):
        workspace.train("continued", stop_at(3), **states)
    messages = []
    for _ in range(2):  # the second time it is finished
        workspace.train("continued", lambda progress: messages.append(progress.text))  # a new DLA's form is another
        assert_equal(workspace.end("continued"), workspace.end("states"))
    said = "dla.scores is heads now, this run began with states, and continues so."
    assert messages.count(said) == 2
    assert read_state(workspace.newest("continued"))["recipe"]["dla"]["scores"] == "states"
    assert load_node_dla("continued.safetensors").config.scores == "states"


def test_a_changed_learning_rate_is_taken_over(workspace):
    rates = {"training": {"learning_rate": 0.0}, "lora": {"learning_rate": 0.0}}
    with pytest.raises(Stop):
        workspace.train("rates", stop_at(2))
    before, _ = workspace.end("rates")
    result = workspace.train("rates", **rates)
    after, losses = workspace.end("rates")
    assert result.history.step == len(losses) == STEPS
    for name in ("dla.safetensors", "lora.safetensors"):
        assert all(torch.equal(value, after[name][key]) for key, value in before[name].items())
    moments, others = before["optimizer.safetensors"], after["optimizer.safetensors"]
    assert any(not torch.equal(value, others[key]) for key, value in moments.items())


def test_more_steps_go_on_from_a_finished_run(workspace, whole):
    workspace.train("longer", training={"steps": 3})
    workspace.train("longer")
    assert_equal(workspace.end("longer"), whole)


@pytest.mark.parametrize("setting, section, change", [
    ("training.seed", "training", {"seed": 1}), ("training.stage", "training", {"stage": 1}),
    ("training.optimizer", "training", {"optimizer": "adamw8bit"}),
    ("lora.rank", "lora", {"rank": 3}), ("lora.alpha", "lora", {"alpha": 1.0}), ("dla", "dla", {"pooling": "linear"}),
])  # fmt: skip
def test_another_run_under_the_same_name_is_refused_by_setting(workspace, whole, monkeypatch, setting, section, change):
    if setting == "training.optimizer":  # whether its package is there or not
        make = partial(make_optimizer, workspace.recipe("any"))
        monkeypatch.setattr("subject_dla.training.build.make_optimizer", lambda _, *rest: make(*rest))
    before = everything(workspace.folder / "whole", workspace.folder / "models")
    with passes() as seen, pytest.raises(RecipeError, match=rf"'whole' was begun with {setting} = .* choose another"):
        workspace.train("whole", **{section: change})
    assert not seen and before == everything(workspace.folder / "whole", workspace.folder / "models")


def test_another_dla_to_begin_from_is_refused_once_a_run_has_begun(workspace, whole):
    dla = load_dla(workspace.targets[0] / "whole.safetensors")
    dla.config = DLAConfig.from_dict({**dla.config.to_dict(), "vit_blend": 0.5})
    save_dla(workspace.targets[0] / "blended.safetensors", dla)
    with pytest.raises(Stop):
        workspace.train("begun", stop_at(1))
    with passes() as seen, pytest.raises(CheckpointError, match="vit_blend"):
        workspace.train("begun", run={"start_dla": "blended.safetensors"})
    assert not seen


def test_a_damaged_checkpoint_stops_the_run_before_anything_is_written(workspace):
    with pytest.raises(Stop):
        workspace.train("damaged", stop_at(2), run={"save_every": 1, "keep": 1})
    path = workspace.newest("damaged") / "lora.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    before = everything(workspace.folder / "damaged", *workspace.targets)
    with passes() as seen, pytest.raises(ValueError, match=r"damaged/checkpoint-00000002: .* Move this folder away"):
        workspace.train("damaged")
    assert not seen and before == everything(workspace.folder / "damaged", *workspace.targets)


@pytest.mark.parametrize("damage", ["missing", "flipped bit"])
def test_of_two_checkpoints_the_damaged_one_is_put_aside_and_said(workspace, whole, damage):
    name, messages = f"aside {damage}", []
    with pytest.raises(Stop):
        workspace.train(name, stop_at(3), run={"save_every": 1})
    path = workspace.newest(name) / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.unlink() if damage == "missing" else path.write_bytes(data)
    workspace.train(name, lambda progress: messages.append(progress.text))
    reason = "does not exist" if damage == "missing" else "was changed or damaged: its checksum"
    (said,) = [text for text in messages if "is damaged" in text]
    assert said.startswith(f"checkpoint-00000003 is damaged (optimizer.safetensors {reason}"), said
    assert "so checkpoint-00000002 is taken. It was renamed to damaged-checkpoint-00000003." in said
    assert "Resuming from step 2 (checkpoint-00000002)" in messages
    assert_equal(workspace.end(name), whole)


def test_a_second_run_of_the_same_name_is_refused_while_the_first_trains(workspace, whole):
    refusals = []

    def again(progress):
        if progress.seconds is not None and progress.step == 2:
            before = everything(workspace.folder / "locked")
            with pytest.raises(RecipeError, match=rf"'locked' is being trained by process {os.getpid()} on .* choose"):
                workspace.train("locked")
            assert before == everything(workspace.folder / "locked")
            refusals.append(progress.step)

    workspace.train("locked", again)
    assert refusals == [2] and not (workspace.folder / "locked" / "run.lock").exists()
    assert_equal(workspace.end("locked"), whole)


def test_a_refused_run_leaves_no_folder(workspace):
    with pytest.raises(RecipeError, match="mllm_only"):
        workspace.train("refused", training={"mllm_only": 0.9, "vae_only": 0.9})
    with pytest.raises(ValueError):
        workspace.train("refused", data={"source": str(workspace.folder / "nowhere")})
    assert not (workspace.folder / "refused").exists()


def test_an_interrupt_saves_and_is_the_hosts(workspace, whole):
    def interrupt(progress):
        if progress.seconds is not None and progress.step == 3:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        workspace.train("interrupted", interrupt)
    assert read_state(workspace.newest("interrupted"))["step"] == 3
    workspace.train("interrupted")
    assert_equal(workspace.end("interrupted"), whole)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_and_the_last_good_checkpoint_stays(workspace, whole, broken, clip_norm):
    name, options = f"broken-{broken}-{clip_norm:g}", {"training": {"clip_norm": clip_norm}}

    def act(number, velocity):
        if number == 5 and broken == "gradient":  # in step 3
            velocity.register_hook(lambda gradient: gradient * float("inf"))
        return velocity * float("nan") if number == 5 and broken == "loss" else velocity

    with passes(act), pytest.raises(RuntimeError, match="(loss|norm) is (nan|inf) at step 3"):
        workspace.train(name, **options)
    assert read_state(workspace.newest(name))["step"] == 2
    if clip_norm:
        workspace.train(name, **options)
        assert_equal(workspace.end(name), whole)
    for path in workspace.files(name):
        assert all(value.isfinite().all() for value in load_file(path).values())


def test_lora_leaves_the_model_as_it_was(workspace, whole):
    with passes(lambda number, velocity: 1 / 0), pytest.raises(ZeroDivisionError):
        workspace.train("hooks")
    modules = workspace.loaded.model.model.diffusion_model.modules()
    assert not any(module._forward_hooks or "forward" in vars(module) for module in modules)
    assert not (workspace.folder / "hooks").exists() or not checkpoints(workspace.folder / "hooks")
    assert not any(path.exists() for path in workspace.files("hooks"))  # nothing was learnt


def test_stage_1_has_no_reference_and_without_a_lora_no_pass_has_vae_tokens_alone(workspace):
    with passes() as seen:
        workspace.train("stage-1", training={"stage": 1, "mllm_only": 0.0, "vae_only": 1.0}, lora={"rank": 0})
    assert seen == ["mllm"] * 2 * STEPS
    with passes() as seen:
        workspace.train("no-lora", training={"mllm_only": 0.4, "vae_only": 0.6}, lora={"rank": 0})
    assert set(seen) == {"mllm", "both"} and seen.count("both") > STEPS
    with passes() as seen:
        workspace.train("vae-only", training={"mllm_only": 0.0, "vae_only": 1.0, "steps": 2})
    assert seen == ["vae"] * 4


def test_the_pooled_vector_stays_where_mllm_tokens_are_left_out(workspace, monkeypatch):
    """As in sampling, where a stage without MLLM tokens keeps it."""
    given, real = [], FrozenDiT.velocity

    def pooled_of(prompt, return_pooled=True):
        return None, torch.randn(1, 768, generator=torch.Generator().manual_seed(len(prompt)))

    def velocity(self, noisy, t, context, references=(), **values):
        given.append((context is None, values["pooled"]))
        return real(self, noisy, t, context, references, **values)

    monkeypatch.setattr(FrozenDiT, "velocity", velocity)
    clip = SimpleNamespace(tokenize=str, encode_from_tokens=pooled_of)
    monkeypatch.setattr(workspace.loaded, "clip", clip)
    workspace.train("pooled", training={"steps": 3})
    prompts = {EMPTY[0], *(path.read_text() for path in workspace.data.glob("*/*.txt"))}
    known = [pooled_of(prompt)[1][0] for prompt in prompts]
    assert {off for off, _ in given} == {True, False}
    for _, pooled in given:
        assert all(any(torch.equal(row, vector) for vector in known) for row in pooled)


ANOTHERS = DLAConfig(MLLMInfo("x", "internvl", 2, 8), 8, provenance={"run": "another's"})
FOREIGN = {
    "a DLA": (0, lambda path: save_dla(path, DualLayerAggregator(ANOTHERS))),
    "a LoRA": (1, lambda path: save_file({"diffusion_model.x.lora_A.weight": torch.ones(1, 2)}, path)),
    "a LoRA of another run": (1, lambda path: save_file({"x": torch.ones(1)}, path, {RUN_KEY: '{"run": "another"}'})),
    "odd metadata": (1, lambda path: save_file({"x": torch.ones(1)}, path, {RUN_KEY: "[]"})),
    "garbage": (0, lambda path: path.write_bytes(b"\xff" * 99)),
    "a folder": (1, lambda path: path.mkdir()),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_that_is_somebody_elses_is_left_alone(workspace, what):
    number, make = FOREIGN[what]
    name = "foreign-" + what.replace(" ", "-")
    path = workspace.files(name)[number]
    path.parent.mkdir(exist_ok=True)
    make(path)
    before = everything(path.parent)
    with passes() as seen, pytest.raises(ValueError, match=f"{name}.safetensors is there already"):
        workspace.train(name)
    assert not seen and everything(path.parent) == before
    assert not checkpoints(workspace.folder / name)


def test_the_finished_dla_says_how_it_was_made_and_nothing_of_the_machine(workspace, whole):
    settings = {"dtype": "bf16", "validate_every": STEPS, "validation_examples": 1}
    workspace.train("exported", run=settings)
    dla = load_node_dla("exported.safetensors")
    trained = load_dla(workspace.newest("exported") / "dla.safetensors")
    made = dla.config.provenance
    assert made["stage"] == 2 and made["steps"] == STEPS and made["dit"] == "flux" and made["held_out_loss"]
    recipe = Recipe.from_dict(made["recipe"])
    assert recipe.data.source == "my subjects"
    assert {**asdict(recipe), "data": None} == {**asdict(workspace.recipe("exported", run=settings)), "data": None}
    for path in workspace.files("exported"):
        with open(path, "rb") as file:
            head = file.read(int.from_bytes(file.read(8), "little")).decode()
        assert str(workspace.folder) not in head and str(workspace.folder.parent) not in head
        assert json.loads(head)["__metadata__"]
    rounded = {key: value.bfloat16() for key, value in trained.state_dict().items()}
    found = load_file(workspace.files("exported")[0])
    assert all(torch.equal(found[key], value) for key, value in rounded.items()) and found.keys() == rounded.keys()


def test_the_host_takes_every_key_of_the_finished_lora(workspace, whole, caplog):
    weights = comfy.utils.load_torch_file(str(workspace.files("whole")[1]), safe_load=True)
    with caplog.at_level(logging.WARNING):
        patched, _ = comfy.sd.load_lora_for_models(workspace.loaded.model, None, weights, 1.0, 0)
    assert not [record for record in caplog.records if "lora" in record.getMessage().lower()]
    assert 3 * len(patched.patches) == len(weights) > 0
    assert any(value.abs().max() > 0 for key, value in weights.items() if "lora_B" in key)


def test_stage_2_begins_from_stage_1s_dla_and_lora(workspace):
    workspace.train("first", training={"stage": 1, "steps": 2})
    start = {"start_dla": "first.safetensors", "start_lora": "first.safetensors"}
    workspace.train("second", training={"steps": 1, "learning_rate": 0.0}, lora={"learning_rate": 0.0}, run=start)
    first, second = workspace.end("first")[0], workspace.end("second")[0]
    for name in ("dla.safetensors", "lora.safetensors"):
        assert all(torch.equal(value, second[name][key]) for key, value in first[name].items())
    for changed, words in (({"alpha": 9.0}, "alpha"), ({"rank": 3}, "rank 3")):
        with pytest.raises(ValueError, match=words):
            workspace.train("third", lora=changed, run=start)
