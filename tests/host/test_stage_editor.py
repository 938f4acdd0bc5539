"""What the server tells the stage editor: the plan of a graph as the sampler will run it, and a run's progress."""

import asyncio
import json
import re
import sys
from types import SimpleNamespace

import comfy.model_sampling
import comfy.samplers
import pytest
import torch
from subject_dla.loaders.host import answer_requests
from subject_dla.nodes import translation
from subject_dla.nodes.stages import draw_stages
from subject_dla.sampling.patch import apply_stages
from subject_dla.sampling.queued_run import QueuedRun
from subject_dla.sampling.sample import flow_sampling, run_sigmas
from subject_dla.sampling.stage_editor import answer
from subject_dla.sampling.stages import plan, preset
from subject_dla.tests.host.test_guider import condition, host, model  # noqa: F401
from subject_dla.tests.method.test_queued_run import WIDGETS, graph, node


class Server:
    """In the place of the host's, with what it was sent."""

    client_id = "a browser"

    def __init__(self):
        self.sent, self.handlers = [], {}
        self.routes = SimpleNamespace(post=lambda path: lambda handle: self.handlers.setdefault(path, handle))

    def send_sync(self, event, data, client):
        assert client == self.client_id
        self.sent.append((event, json.loads(json.dumps(data))))


@pytest.fixture
def server(monkeypatch):
    found = Server()
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=found)))
    return found


@pytest.mark.parametrize("settings", [{"shift": 1.15}, {"shift": 3.0, "multiplier": 1000.0}])
@pytest.mark.parametrize("scheduler", ["simple", "beta", "normal"])
def test_the_steps_are_those_of_the_hosts_sampler(model, settings, scheduler):  # noqa: F811
    kind = (
        comfy.model_sampling.ModelSamplingDiscreteFlow
        if "multiplier" in settings
        else comfy.model_sampling.ModelSamplingFlux
    )
    levels = kind()
    levels.set_parameters(**settings)
    clone = model.clone()
    clone.add_object_patch("model_sampling", levels)
    for sampler, denoise in [("euler", 1.0), ("dpm_2", 1.0), ("euler", 0.6)]:
        expected = comfy.samplers.KSampler(clone, 7, "cpu", sampler, scheduler, denoise).sigmas.tolist()
        assert run_sigmas(flow_sampling(**settings), QueuedRun("4", scheduler, 7, sampler, denoise)) == expected


def test_the_answer_is_the_samplers_plan():
    found = answer({"graph": graph(), "node": "2", "last": {"model_sampling": {"shift": 0.5}, "tokens": 4096}})
    stages, sigmas = preset("paper", "flow_time", 0.9, 0.7), run_sigmas(flow_sampling(0.5), QueuedRun("4", "simple", 8))
    assert found["steps"] == [[s.position, s.context, s.reference] for s in plan(stages, sigmas)]
    assert [key["start_input"] for key in found["keyframes"]] == ["", "tau1", "tau2"]
    assert found["curve"][0] == [1.0, 1.0, 0.0] and found["curve"][-1] == [0.0, 0.0, 1.0]
    assert all(tuple(strengths) == stages.strengths(position) for position, *strengths in found["curve"])
    assert found["run"]["node"] == "4" and not found["notes"]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("clock, preset_, tau1", [
    ("flow_time", "paper", 0.95), ("flow_time_resolution", "paper", 0.95), ("steps", "two_stage", 0.99),
    ("steps", "semantics_first", 0.99), ("steps", "paper", 0.99),
])  # fmt: skip
def test_its_texts_are_in_the_editors_language(monkeypatch, clock, preset_, tau1):
    monkeypatch.setattr(translation, "editor_language", lambda: "zh")
    asked = graph()
    asked["2"]["inputs"] |= {"clock": clock, "preset": preset_, "tau1": tau1}
    found = [draw_stages({"graph": asked, "node": "2"}), draw_stages({"graph": {"2": asked["2"]}, "node": "2"})]
    lines = [line for one in found for key in ("text", "error") for line in one.get(key, "").split("\n") if line]
    lines += [note for one in found for note in one.get("notes", [])]
    assert lines and all(re.search("[\u4e00-\u9fff]", line) for line in lines), lines


def test_before_the_first_run_the_noise_levels_are_assumed_and_said():
    assert any("shift 1.15" in note for note in answer({"graph": graph(), "node": "2"})["notes"])
    alone = answer({"graph": {"2": graph()["2"]}, "node": "2"})
    assert alone["steps"] == [] and any("Connect a sampler" in note for note in alone["notes"])
    last = {"sigmas": [1.0, 0.5, 0.0]}
    assert len(answer({"graph": {"2": graph()["2"]}, "node": "2", "last": last})["steps"]) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        None, [], {}, {"graph": [], "node": "2"}, {"graph": {"2": 1}, "node": "2"}, {"graph": graph(), "node": 2},
        {"graph": graph(), "node": "17"}, {"graph": graph(), "node": "2", "last": 1},
        {"graph": graph(), "node": "2", "last": {"tokens": 0}},
        {"graph": graph(), "node": "2", "last": {"sigmas": [1.0, "0"]}},
        {"graph": graph(), "node": "2", "last": {"tokens": 10**400}},
        {"graph": graph(), "node": "2", "last": {"sigmas": [float("nan")] * 2}},
        {"graph": graph(), "node": "2", "last": {"model_sampling": {"shift": -1}}},
        {"graph": graph(), "node": "2", "last": {"model_sampling": {"shift": 1, "path": "/etc"}}},
    ],
)  # fmt: skip
def test_a_malformed_request_is_refused_with_a_reason(server, wrong):
    answer_requests("/stages", answer)
    response = ask(server, wrong)
    assert response.status == 400 and json.loads(response.text)["error"]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (graph(**{"2": {"class_type": "SubjectApplyStages", "inputs": [1]}}), "tau1 comes from a node"),
        (graph(**{"2": node("SubjectApplyStages", **WIDGETS | {"tau1": 0.6})}), "tau1 is 0.6 and tau2 0.7"),
        (graph(**{"2": node("SubjectApplyStages", **WIDGETS | {"tau1": 10**400})}), "tau1 is out of range"),
        (graph(**{"2": node("SubjectApplyStages", stages=["1", 0], **WIDGETS)}), "comes from UNETLoader"),
    ],
)
def test_a_schedule_that_cannot_be_drawn_is_no_failed_request(server, wrong, words):
    """A status of 400 would be an error in the browser's console, for a slip that the editor shows by itself."""
    answer_requests("/stages", answer)
    response = ask(server, {"graph": wrong, "node": "2"})
    found = json.loads(response.text)
    assert response.status == 200 and found.keys() == {"error"} and words in found["error"]


def test_the_route_answers(server):
    answer_requests("/stages", answer)
    response = ask(server, {"graph": graph(), "node": "2"})
    assert response.status == 200 and len(json.loads(response.text)["steps"]) == 8


@pytest.mark.parametrize("sent", [b"{", b"", b"[" * 100_000, b'{"a": "\xff"}', b'{"a": 1, "a": 2}', b'{"a": NaN}'])
def test_what_is_no_json_is_refused(server, sent):
    answer_requests("/stages", answer)
    response = ask(server, sent)
    assert response.status == 400 and json.loads(response.text)["error"].startswith("The request ")


def ask(server, request):
    async def body():
        return request if isinstance(request, bytes) else json.dumps(request).encode()

    return asyncio.run(server.handlers["/stages"](SimpleNamespace(read=body)))


def test_a_run_says_each_step_once_and_changes_nothing(model, server):  # noqa: F811
    expected = host(apply_stages(model, preset("semantics_first", tau1=0.9)), condition(), condition(seed=4))
    silent = len(server.sent)
    server.client_id = None  # queued by a script: nobody listens
    assert torch.equal(
        host(apply_stages(model, preset("semantics_first", tau1=0.9)), condition(), condition(seed=4)), expected
    )
    assert len(server.sent) == silent
    assert {event for event, _ in server.sent} == {"subject_dla.run"}
    (_, first), *steps = server.sent
    assert len(first["begin"]["sigmas"]) == 7 and first["begin"]["tokens"] == 16
    assert [data["step"] for _, data in steps] == [1, 2, 3, 4, 5, 6]
    assert re.fullmatch(r"step 1/6, stage 1: MLLM 1\.00, VAE 0\.00", steps[0][1]["text"])
    assert re.fullmatch(r"step 5/6, stage 2: MLLM 1\.00, VAE 1\.00, \d+ s left", steps[4][1]["text"])
    assert re.fullmatch(r"step 6/6, stage 2: MLLM 1\.00, VAE 1\.00", steps[5][1]["text"])
