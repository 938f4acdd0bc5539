"""What the stage editor and Stage Preview read of a graph: schedule, keyframes, and the sampler's steps."""

import pytest
from subject_dla.common.prompt_graph import downstream, upstream
from subject_dla.sampling.queued_run import QueuedRun, queued_run, queued_run_of_inputs, queued_stages
from subject_dla.sampling.stages import Keyframe, Stages, preset

WIDGETS = {"preset": "paper", "clock": "flow_time", "tau1": 0.9, "tau2": 0.7}
SAMPLER = {"steps": 8, "scheduler": "simple", "sampler_name": "euler", "denoise": 1.0}
FRAME = {"mllm_strength": 0.5, "vae_strength": 1.0, "blend": "linear", "clock": "flow_time"}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graph(**more):
    return {
        "1": node("UNETLoader", unet_name="flux"),
        "2": node("SubjectApplyStages", model=["1", 0], **WIDGETS),
        "3": node("LoraLoaderModelOnly", model=["2", 0], strength_model=1.0),
        "4": node("KSampler", model=["3", 0], **SAMPLER),
    } | more


def test_the_schedule_of_a_preset():
    found = queued_stages(graph(), "2")
    assert found.stages == preset("paper", "flow_time", 0.9, 0.7)
    assert [key.start.input for key in found.keyframes] == ["", "tau1", "tau2"]
    assert found.reads == {"2": ["preset", "clock", "tau1", "tau2"]}
    only = graph()
    only["2"]["inputs"]["preset"] = "both"
    assert queued_stages(only, "2").reads == {"2": ["preset", "clock"]}


def test_equal_thresholds_are_one_boundary_and_both_are_read():
    equal = graph()
    equal["2"]["inputs"]["tau2"] = equal["2"]["inputs"]["tau1"]
    found = queued_stages(equal, "2")
    assert [key.start.input for key in found.keyframes] == ["", "tau1"]
    assert found.reads == {"2": ["preset", "clock", "tau1", "tau2"]}


def test_a_chain_of_keyframes_takes_the_place_of_the_widgets():
    chained = graph(
        **{
            "5": node("SubjectStageSchedule", **WIDGETS | {"preset": "semantics_first"}),
            "6": node("SubjectStageKeyframe", previous=["5", 0], start=0.5, **FRAME),
        }
    )
    chained["2"]["inputs"]["stages"] = ["6", 0]
    found = queued_stages(chained, "2")
    first = preset("semantics_first", "flow_time", 0.9, 0.7)
    assert found.stages == Stages((*first.keyframes, Keyframe(0.5, 0.5, 1.0, "linear")))
    assert [(key.start.node, key.start.input, key.context.input) for key in found.keyframes] == [
        ("5", "", ""), ("5", "tau1", ""), ("6", "start", "mllm_strength"),
    ]  # fmt: skip
    assert found.reads == {"5": ["preset", "clock", "tau1"], "2": []}


def test_numbers_that_come_from_number_nodes_cannot_be_dragged():
    linked = graph(**{"7": node("PrimitiveFloat", value=0.8)})
    linked["2"]["inputs"]["tau1"] = ["7", 0]
    found = queued_stages(linked, "2")
    assert found.stages.keyframes[1].start == 0.8
    assert [key.start.input for key in found.keyframes] == ["", "", "tau2"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tau1": 0.6}, "out of order"),
        ({"tau1": ["1", 0]}, "computes it when it runs"),
        ({"tau1": True}, "computes it when it runs"),
        ({"preset": "unknown"}, "Unknown stage preset"),
        ({"stages": ["9", 0]}, "not in this graph"),
        ({"stages": ["2", 0]}, "to itself"),
        ({"stages": ["1", 0]}, "comes from UNETLoader"),
    ],
)
def test_what_cannot_be_drawn_is_said(change, words):
    wrong = graph()
    wrong["2"]["inputs"] |= change
    with pytest.raises(ValueError, match=words):
        queued_stages(wrong, "2")


def test_the_steps_of_the_sampler_behind_other_nodes():
    assert queued_run(graph(), "2") == QueuedRun("4", "simple", 8)
    assert queued_run(graph(), "4") == QueuedRun("4", "simple", 8)
    assert queued_run({"2": graph()["2"]}, "2") is None


def test_the_steps_of_the_scheduler_that_gives_the_sigmas():
    custom = graph(
        **{
            "4": node("BasicGuider", model=["3", 0]),
            "5": node("BasicScheduler", model=["1", 0], steps=["9", 0], scheduler="beta", denoise=0.5),
            "6": node("SplitSigmas", sigmas=["5", 0], step=3),
            "7": node("SamplerCustomAdvanced", guider=["4", 0], sigmas=["6", 1]),
            "9": node("PrimitiveInt", value=12),
        }
    )
    assert queued_run(custom, "2") == QueuedRun("5", "beta", 12, denoise=0.5)


def test_a_part_of_the_steps():
    part = graph(**{"4": node("KSamplerAdvanced", model=["2", 0], **SAMPLER, start_at_step=2, end_at_step=6)})
    run = queued_run(part, "2")
    assert (run.first, run.last) == (2, 6) and run.text == "8 steps, 2 to 6, simple"


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"steps": 10**9}, {"steps": "8"}, {"steps": ["1", 0]}, {"denoise": 0.0}]
)
def test_settings_that_no_sampler_takes_are_none(change):
    assert queued_run(graph(**{"4": node("KSampler", model=["2", 0], **SAMPLER | change)}), "2") is None


def test_stage_preview_finds_the_sampler_of_its_model():
    preview = graph(**{"8": node("SubjectStagePreview", stages=["9", 0], model=["1", 0])})
    assert queued_run_of_inputs(preview, "8", "model", "stages") == QueuedRun("4", "simple", 8)


def test_a_malformed_graph_has_no_run_and_the_walk_ends():
    circle = graph(**{"5": node("Switch", a=["6", 0]), "6": node("Switch", a=["5", 0], b=["1", 0]), "7": None, "8": {}})
    assert queued_run_of_inputs(circle | {"2": graph()["2"], "4": [1]}, "6", "a", "b") is None
    assert set(upstream(circle, "5")) == {"1", "5", "6"} and list(downstream(circle, "3", ("clip",))) == ["3"]
