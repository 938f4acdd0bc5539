"""Mistakes that the queue refuses before anything is loaded, on their node: by the host's own validation."""

import asyncio
import inspect
import re

import comfy_extras.nodes_custom_sampler as custom
import execution
import folder_paths
import pytest
from subject_dla.nodes import SubjectExtension, queued_graph
from subject_dla.nodes.schema import with_title
from subject_dla.nodes.translation import translate
from subject_dla.sampling.stages import preset

import nodes as host_nodes

OURS = asyncio.run(SubjectExtension().get_node_list())


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for node in (*OURS, custom.KSamplerSelect, custom.SamplerCustomAdvanced):
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, node.__name__, node)


def errors(node: str, kind: str = "custom_validation_failed", **graph) -> list[str]:
    """What the host says of a node of a graph that is queued: the details of its errors of ours."""
    prompt = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in graph.items()}

    async def validate():
        queued_graph.remember({"prompt": prompt})
        takes = len(inspect.signature(execution.validate_prompt).parameters)
        return await execution.validate_prompt(*("job", prompt, None)[:takes])

    found = asyncio.run(validate())[3].get(node, {"errors": []})["errors"]
    details = [error["details"] for error in found if error["type"] == kind]
    for text in details if kind == "custom_validation_failed" else ():  # each has a Chinese form with its values
        said = text.split(" - ", 1)[1]
        lines = zip(said.split("\n"), translate(said, "zh").split("\n"), strict=True)
        assert said == "see above" or all(re.search("[\u4e00-\u9fff]", line) for _, line in lines), said
        assert set(re.findall(r"\d\.\d+|\w+\.safetensors", said)) <= set(
            re.findall(r"\d\.\d+|\w+\.safetensors", translate(said, "zh"))
        )
    return details


def schedule(clock="flow_time", tau1=0.95, tau2=0.85, name="paper") -> dict:
    return {"preset": name, "clock": clock, "tau1": tau1, "tau2": tau2}


def staged(sampler="euler", **values) -> dict:
    """Apply Stages before a KSampler whose picture is saved."""
    sampled = {"model": ["2", 0], "positive": ["9", 0], "negative": ["9", 0], "latent_image": ["8", 0]}
    sampled |= {"seed": 1, "steps": 4, "cfg": 1.0, "sampler_name": sampler, "scheduler": "simple", "denoise": 1.0}
    return {
        "n1": ("UNETLoader", {"unet_name": "a.safetensors", "weight_dtype": "default"}),
        "2": ("SubjectApplyStages", {"model": ["n1", 0], **schedule(**values)}),
        "3": ("KSampler", sampled),
        "4": ("VAEDecode", {"samples": ["3", 0], "vae": ["7", 0]}),
        "5": ("SaveImage", {"images": ["4", 0], "filename_prefix": "x"}),
        "7": ("VAELoader", {"vae_name": "v.safetensors"}),
        "8": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "9": ("SubjectStageSchedule", schedule()),  # of a wrong type, so that other errors are there, too
    }


@pytest.mark.parametrize("values, words", [
    ({"tau1": 0.5}, ["tau1 is 0.5", "tau2 0.85", "below tau1"]),
    ({"clock": "steps"}, ["tau1 is 0.95", "above tau1", "flow times"]),
    ({"tau1": 1.5}, ["tau1 is 1.5", "between 0 and 1"]),
    ({"tau1": 1.0}, ["tau1 is 1", "first stage"]),
    ({"clock": "steps", "tau1": 0.2, "tau2": 0.4, "sampler": "dpm_adaptive"}, ["dpm_adaptive", "flow_time"]),
])  # fmt: skip
def test_thresholds_that_make_no_schedule_are_refused_by_their_names(values, words):
    (text,) = errors("2", **staged(**values))
    assert text.startswith("tau1 - Apply Stages: ") and all(word in text for word in words), text


@pytest.mark.parametrize("values", [
    {}, {"tau1": 0.9, "tau2": 0.9}, {"clock": "steps", "tau1": 0.2, "tau2": 0.4}, {"sampler": "dpm_adaptive"},
    {"clock": "steps", "tau1": 0.95, "name": "semantics_first"}, {"tau1": 0.1, "tau2": 0.9, "name": "both"},
])  # fmt: skip
def test_what_ran_is_not_refused(values):
    assert errors("2", **staged(**values)) == []


def test_a_schedule_that_is_connected_takes_the_place_of_the_widgets():
    graph = staged(clock="steps")
    graph["2"][1]["stages"] = ["9", 0]
    assert errors("2", **graph) == []


def test_a_connected_schedule_on_steps_is_refused_with_samplers_that_choose_their_own():
    graph = staged(sampler="dpm_fast")
    graph["2"][1]["stages"] = ["9", 0]
    graph["9"] = ("SubjectStageKeyframe", keyframe(0.2, "steps"))
    (text,) = errors("2", **graph)
    assert text.startswith("tau1 - Apply Stages: ") and "dpm_fast" in text
    graph["9"] = ("SubjectStageKeyframe", keyframe(0.2, "flow_time"))
    assert errors("2", **graph) == errors("9", **graph) == []


def keyframe(start, clock="flow_time", previous=None) -> dict:
    given = {"start": start, "mllm_strength": 1.0, "vae_strength": 1.0, "blend": "hold", "clock": clock}
    return given | ({"previous": [previous, 0]} if previous else {})


def keyframes(*values, before=None) -> dict:
    """Apply Stages with keyframes 1, 2, … of (start, clock) in a chain, the first behind a schedule if there is one."""
    graph = staged()
    graph["2"][1]["stages"] = [f"k{len(values)}", 0]
    if before:
        graph["k0"] = ("SubjectStageSchedule", before)
    for number, (start, clock) in enumerate(values, 1):
        previous = f"k{number - 1}" if number > 1 or before else None
        graph[f"k{number}"] = ("SubjectStageKeyframe", keyframe(start, clock, previous))
    return graph


def test_keyframes_are_refused_on_the_one_that_does_not_fit_the_chain():
    graph = keyframes((1.0, "flow_time"), (0.5, "flow_time"), (0.9, "flow_time"), (0.2, "flow_time"))
    (text,) = errors("k3", **graph)
    assert text.startswith("start - Stage Keyframe: Stages out of order: keyframe 3") and "0.9" in text
    assert errors("k2", **graph) == errors("k4", **graph) == []
    (text,) = errors("k2", **keyframes((1.0, "flow_time"), (0.5, "steps")))
    assert text.count("Stage Keyframe") == 1 and "'steps'" in text and "'flow_time'" in text
    (text,) = errors("k1", **keyframes((3.0, "flow_time")))
    assert "starts at 3" in text
    graph = keyframes((0.9, "flow_time"), before=schedule(name="semantics_first"))
    assert errors("k1", **graph) == []
    (text,) = errors("k1", **keyframes((0.97, "flow_time"), before=schedule(name="semantics_first")))
    assert "keyframe 3 starts at 0.97" in text
    graph["k0"][1]["tau1"] = ["n1", 0]  # linked: known when it runs
    assert errors("k1", **graph) == []


@pytest.mark.parametrize("values, words", [
    ({}, []), ({"tau1": "0.9, x"}, ["tau1 holds 'x'"]), ({"tau1": "0.2", "tau2": "0.9"}, ["No tau2 of 0.9"]),
    ({"combine": "pairs", "tau2": "0.9"}, ["pairs"]), ({"vae_strengths": "3"}, ["vae_strengths", "0 to 2"]),
])  # fmt: skip
def test_lists_of_a_sweep_are_refused_on_the_sweep(values, words):
    graph = staged()
    graph["2"][1]["stages"] = ["9", 0]
    given = {**schedule(tau1="0.97, 0.95", tau2="0.9, 0.7, 0.6"), "combine": "grid", "controls": True}
    graph["9"] = ("SubjectThresholdSweep", {**given, "mllm_strengths": "1", "vae_strengths": "1", **values})
    found = errors("9", **graph)
    assert len(found) == bool(words)
    assert all(text.startswith("tau1 - Threshold Sweep: ") and word in text for text in found for word in words), found


def test_equal_thresholds_mean_an_empty_middle_stage():
    assert preset("paper", tau1=0.9, tau2=0.9) == preset("two_stage", tau1=0.9)


def sampled(node="SubjectStagedGuider", clock="flow_time", **inputs) -> dict:
    """A node that samples with stages, before a picture that is saved."""
    given = {"model": ["n1", 0], "positive": ["6", 0], "stages": ["9", 0], "cfg": 1.0, **inputs}
    custom = {"noise": ["6", 0], "guider": ["2", 0], "sampler": ["10", 0], "sigmas": ["6", 0], "latent_image": ["8", 0]}
    return staged() | {
        "2": (node, given),
        "3": ("SamplerCustomAdvanced", custom),
        "6": ("SubjectStageSchedule", schedule()),
        "9": ("SubjectStageSchedule", schedule(clock, 0.2, 0.4) if clock == "steps" else schedule()),
        "10": ("KSamplerSelect", {"sampler_name": inputs.get("sampler_name", "euler")}),
    }


def test_cfg_without_a_negative_is_refused():
    (text,) = errors("2", **sampled(cfg=2.5))
    assert text.startswith("cfg - Staged Guider: cfg is 2.5") and "negative" in text
    assert errors("2", **sampled(cfg=2.5, negative=["6", 0])) == errors("2", **sampled(cfg=1.0)) == []
    (text,) = errors("2", **sampled(cfg=-1.0))
    assert "expected 0 to 100" in text


@pytest.mark.parametrize("node", ["SubjectStagedGuider", "SubjectStagedSampler"])
def test_samplers_with_steps_of_their_own_are_refused_on_the_clock_steps(node):
    graph = sampled(node, "steps", sampler_name="dpm_adaptive")
    if node == "SubjectStagedSampler":  # it samples itself
        graph["4"] = ("VAEDecode", {"samples": ["2", 0], "vae": ["7", 0]})
    (text,) = errors("2", **graph)
    assert "dpm_adaptive" in text and "flow_time" in text
    assert errors("2", **{**graph, "9": ("SubjectStageSchedule", schedule())}) == []


def test_all_missing_files_are_named_once():
    files = {"diffusion_model": "d.safetensors", "vae": "v.safetensors", "mllm": "m", "dla": "none"}
    graph = staged() | {"n1": ("SubjectLoadPipeline", {**files, "weight_dtype": "default"})}
    first, *others = errors("n1", **graph)
    assert "Load Subject Pipeline: " in first and all(name in first for name in list(files.values())[:3])
    assert all(text.endswith("see above") for text in others)


def test_saved_training_data_that_are_not_offered_are_judged_by_the_node(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    (tmp_path / "bare").mkdir()
    widgets = {"name": "run", "stage": "1: MLLM tokens", "steps": 3, "lora_rank": 0, "seed": 0, "learning_rate": 1e-4}
    widgets |= {"resolution": 512, "batch_size": 1, "accumulate": 1, "data": "bare"}
    graph = staged() | {"4": ("SubjectTrainDLA", {"model": ["n1", 0], "vae": ["7", 0], "mllm": ["9", 0], **widgets})}
    (text,) = errors("4", "exception_during_validation", **graph)
    assert text.startswith("Train DLA: the folder 'bare' has no captions") and "SUBJECT/PICTURE.txt" in text


def test_messages_are_in_the_language_of_the_editor(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    (text,) = errors("2", **staged(tau1=1.5))
    assert text.startswith("tau1 - Apply Stages: tau1 is 1.5")
    settings = tmp_path / "default" / "comfy.settings.json"
    settings.parent.mkdir()
    for damaged in ("{", "[]", '{"Comfy.Locale": 3}', '{"Comfy.Locale": "../../x"}', '{"Comfy.Locale": "fr"}'):
        settings.write_text(damaged)
        assert errors("2", **staged(tau1=1.5)) == [text]
    settings.write_text('{"Comfy.Locale": "zh"}')
    (chinese,) = errors("2", **staged(tau1=1.5))
    assert chinese.startswith("tau1 - 应用阶段：tau1 为 1.5") and "flow_time" in chinese


def test_errors_of_a_run_begin_with_the_display_name():
    guider = next(node for node in OURS if node.__name__ == "SubjectStageKeyframe")
    with pytest.raises(ValueError, match="^Stage Keyframe: .*starts at 3"):
        guider.execute(3.0, 1.0, 1.0, "hold", "flow_time")
    sampler = next(node for node in OURS if node.__name__ == "SubjectStagedSampler")
    text = "Apply Stages: its sigmas are [0.0]"
    assert with_title(sampler, text) == "Staged Sampler: its sigmas are [0.0]"
    assert with_title(next(node for node in OURS if node.__name__ == "SubjectApplyStages"), text) == text
