"""Train DLA on a real server: what it makes draws in the next job, a stopped run resumes bit for bit, wrong input is
named before anything is loaded."""

import io
import json
import struct
import threading
import urllib.request

import pytest
import websocket
from PIL import Image
from safetensors.torch import load_file
from subject_dla.demo.family import layout as small
from subject_dla.tests.small.prompts import run
from subject_dla.tests.small.training import paint_subjects
from subject_dla.tools.comfy_client.client import WorkflowError

STEPS = 8
SETTINGS = """
dla.heads = 4
data.reference_size = 64
data.pairs_per_target = 1
data.validation = 0.25
training.warmup = 0
training.optimizer = "adamw"
lora.learning_rate = 0.01
run.dtype = "fp32"
run.save_every = 0
"""
QUIET = "run.validate_every = 0\nrun.sample_every = 0\n"
PREVIEW = 1  # the host's kind of binary message with a picture in it


@pytest.fixture(scope="module", autouse=True)
def data(server):
    """Four subjects, and a broken picture beside the good ones."""
    folder = paint_subjects(server.base / "input" / "subjects", subjects=4)
    (folder / "crimson-ball" / "broken.png").write_bytes(b"no picture")
    (server.base / "input" / "nothing-here").mkdir()
    return folder


@pytest.fixture
def training(family) -> dict:
    """A job in API format: a small run of the second stage with a LoRA."""
    models = {"diffusion_model": "diffusion_models", "vae": "vae", "mllm": "mllm"}
    pipeline = {key: small.NAMES[kind] for key, kind in models.items()}
    pipeline |= {"dla": "new.safetensors", "weight_dtype": "default", "mllm_weight_dtype": "default"}
    settings = {
        "model": ["1", 0], "vae": ["1", 1], "mllm": ["1", 2], "data": "subjects", "name": "run",
        "stage": "2: MLLM and VAE tokens", "steps": STEPS, "learning_rate": 1e-3, "resolution": 64, "batch_size": 2,
        "accumulate": 1, "lora_rank": 4, "seed": 3, "options": SETTINGS + QUIET,
    }  # fmt: skip
    return {
        "1": {"class_type": "SubjectLoadPipeline", "inputs": pipeline},
        "2": {"class_type": "SubjectTrainDLA", "inputs": settings},
    }


class Messages:
    """Everything the server sends to a client, on a thread. `stop_at`: interrupts the job at that step."""

    def __init__(self, server, stop_at: int = 0):
        self.server, self.client, self.stop_at = server, server.client, stop_at
        self.pictures, self.steps = [], []
        address = server.address.replace("http", "ws", 1)
        self.socket = websocket.create_connection(f"{address}/ws?clientId={self.client.id}", timeout=60)
        threading.Thread(target=self.receive, daemon=True).start()

    def receive(self) -> None:
        while True:
            try:
                message = self.socket.recv()
            except (websocket.WebSocketException, OSError):
                return
            if isinstance(message, bytes) and message:
                (kind,) = struct.unpack(">I", message[:4])
                if kind == PREVIEW:
                    self.pictures.append(message[8:])
            elif message:
                self.on_event(json.loads(message))

    def on_event(self, event: dict) -> None:
        if event["type"] != "progress" or event["data"]["max"] != STEPS:
            return
        self.steps.append(event["data"]["value"])
        if self.stop_at and self.steps[-1] >= self.stop_at:
            self.stop_at = 0
            urllib.request.urlopen(urllib.request.Request(f"{self.server.address}/interrupt", b""), timeout=30).close()

    def run(self, prompt: dict) -> dict:
        try:
            return self.client.wait(self.client.queue(prompt), prompt)
        finally:
            self.socket.close()


def weights(server, name: str) -> dict:
    return {kind: load_file(server.base / "models" / kind / f"{name}.safetensors") for kind in ("dla", "loras")}


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all((first[key] == second[key]).all() for key in first)


def test_what_is_trained_draws_in_the_next_job(server, prompt, training):
    training["2"]["inputs"]["name"] = "trained"
    training["2"]["inputs"]["options"] = (
        SETTINGS + "run.sample_every = 4\nrun.sample_steps = 2\nrun.validate_every = 4\n"
    )
    training["3"] = {"class_type": "PreviewAny", "inputs": {"source": ["2", 2]}}
    messages = Messages(server)
    outputs = messages.run(training)
    shown = [Image.open(io.BytesIO(server.client.fetch(image))) for image in outputs["2"]["images"]]
    previews = [Image.open(io.BytesIO(data)) for data in messages.pictures]
    assert len(previews) >= 4 and all(picture.format == "JPEG" for picture in previews)
    heights = [picture.height for picture in previews]
    assert heights[0] < 100 < heights[-1] - max(picture.height for picture in shown), "text, then losses, then samples"
    assert len(shown) == 3 and all(min(picture.size) > 300 for picture in shown)
    assert "broken.png" in outputs["3"]["text"][0]

    # the DLA through Load Subject Pipeline, the LoRA through the host's own loader
    pipeline = next(key for key, node in prompt.items() if node["class_type"] == "SubjectLoadPipeline")
    prompt[pipeline]["inputs"]["dla"] = "trained.safetensors"
    for node in prompt.values():
        node["inputs"] = {k: ["20", 0] if v == [pipeline, 0] else v for k, v in node["inputs"].items()}
    lora = {"model": [pipeline, 0], "lora_name": "trained.safetensors", "strength_model": 1.0}
    prompt["20"] = {"class_type": "LoraLoaderModelOnly", "inputs": lora}
    drawn = []
    for strength in (1.0, 0.0):
        lora["strength_model"] = strength
        images = [image for output in run(server, prompt).values() for image in output.get("images", [])]
        drawn.append(Image.open(io.BytesIO(server.client.fetch(images[0]))).convert("RGB"))
    assert drawn[0].size == (128, 128) and len(drawn[0].getcolors(2**24)) > 100
    assert drawn[0].tobytes() != drawn[1].tobytes(), "the LoRA does nothing"
    assert "lora key not loaded" not in server.log.read_text(encoding="utf-8", errors="replace")


def test_a_run_stopped_in_the_middle_ends_as_one_that_was_not(server, training):
    training["2"]["inputs"]["name"] = "whole"
    run(server, training)
    training["2"]["inputs"]["name"] = "stopped"
    messages = Messages(server, stop_at=2)
    with pytest.raises(WorkflowError, match="interrupted"):
        messages.run(training)
    folder = server.base / "output" / "subject_dla" / "runs" / "stopped"
    [checkpoint] = folder.glob("checkpoint-*")
    assert 2 <= int(checkpoint.name[-8:]) < STEPS
    assert not equal(weights(server, "stopped")["dla"], weights(server, "whole")["dla"])
    run(server, training)
    for kind, found in weights(server, "stopped").items():
        assert equal(found, weights(server, "whole")[kind]), kind

    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.glob("checkpoint-*/*"))
    training["2"]["inputs"]["options"] += "# the host would not run the very same job twice\n"
    messages = Messages(server)
    outputs = messages.run(training)
    assert set(messages.steps) <= {STEPS} and outputs["2"]["images"], "a finished run was run again"
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.glob("checkpoint-*/*")) == before
    for kind, found in weights(server, "stopped").items():
        assert equal(found, weights(server, "whole")[kind]), kind

    with pytest.raises(
        WorkflowError, match="training.stage = 2, now it is 1"
    ):  # in the editor, before anything is loaded
        training["2"]["inputs"]["stage"] = "1: MLLM tokens"
        server.client.queue(training)


WRONG = {
    "unknown option": ({"options": "training.stepz = 3"}, ["training", "stepz", "learning_rate"]),
    "unknown section": ({"options": "trainer.steps = 3"}, ["trainer", "training"]),
    "not TOML": ({"options": "training.warmup 3"}, ["options", "TOML"]),
    "option out of bounds": ({"options": "data.validation = 3.0"}, ["data.validation", "3.0", "0.9"]),
    "other data by an option": ({"options": 'data.source = "/"'}, ["data.source", "input"]),
    "out of bounds": ({"learning_rate": 7.0}, ["learning_rate", "7.0"]),
    "no such stage": ({"stage": "3"}, ["stage", "'3'", "1: MLLM tokens"]),
    "empty folder": ({"data": "nothing-here"}, ["nothing-here", "captions"]),
    "no such data": ({"data": "gone"}, ["gone", "subjects"]),
    "data outside": ({"data": "../output"}, ["'../output'", "input folder"]),
    "name outside": ({"name": "../run"}, ["'../run'", "file name"]),
    "name taken": ({"name": "mine"}, ["dla/mine.safetensors", "Choose another name"]),
    "no such LoRA": ({"start_lora": "gone.safetensors"}, ["models/loras", "gone.safetensors"]),
    "LoRA without rank": ({"options": 'run.start_lora = "x.safetensors"'}, ["x.safetensors"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_named_before_anything_is_loaded(server, new_dlas, training, case):
    changes, words = WRONG[case]
    mine = server.base / "models" / "dla" / "mine.safetensors"
    mine.write_bytes((new_dlas / "dla" / "new.safetensors").read_bytes())
    training["2"]["inputs"] |= changes
    with pytest.raises(WorkflowError) as problem:
        server.client.queue(training)
    assert all(word in str(problem.value) for word in words), problem.value
