"""Train DLA on a real server: what it makes draws in the next job, a stopped run resumes bit for bit, wrong input is
named before anything is loaded."""

import io
import threading
import urllib.request
from contextlib import contextmanager, suppress

import pytest
import websocket
from PIL import Image
from safetensors.torch import load_file
from subject_dla.demo.family import layout as small
from subject_dla.tests.small.prompts import key_of, make_node, run
from subject_dla.tests.small.training import paint_subjects
from subject_dla.tools.comfy_client.client import WorkflowError

STEPS = 8
SETTINGS = """
dla.heads = 4
data = {reference_size = 64, pairs_per_target = 1, validation = 0.25}
training = {warmup = 0, optimizer = "adamw"}
lora.learning_rate = 0.01
run.dtype = "fp32"
run.save_every = 0
"""
QUIET = "run.validate_every = 0\nrun.sample_every = 0\n"
PREVIEW = b"\0\0\0\1"  # begins the host's binary messages with a picture in them


@pytest.fixture(scope="module", autouse=True)
def data(server):
    """Four subjects, and a broken picture beside the good ones."""
    folder = paint_subjects(server.base / "input" / "subjects", subjects=4)
    (folder / "crimson-ball" / "broken.png").write_bytes(b"no picture")
    (server.base / "input" / "nothing-here").mkdir()
    return folder


@pytest.fixture
def training() -> dict:
    """A job in API format: a small run of the second stage with a LoRA."""
    models = {"diffusion_model": "diffusion_models", "vae": "vae", "mllm": "mllm"}
    pipeline = {key: small.NAMES[kind] for key, kind in models.items()}
    pipeline |= {"dla": "new.safetensors", "weight_dtype": "default", "mllm_weight_dtype": "default"}
    settings = {
        "model": ["1", 0], "vae": ["1", 1], "mllm": ["1", 2], "data": "subjects", "name": "run",
        "stage": "2: MLLM and VAE tokens", "steps": STEPS, "learning_rate": 1e-3, "resolution": 64, "batch_size": 2,
        "accumulate": 1, "lora_rank": 4, "seed": 3, "options": SETTINGS + QUIET,
    }  # fmt: skip
    return {"1": make_node("SubjectLoadPipeline", **pipeline), "2": make_node("SubjectTrainDLA", **settings)}


@contextmanager
def previews(client):
    """Collects the pictures that the server shows the client while a job runs."""
    found, address = [], client.address.replace("http", "ws", 1)
    socket = websocket.create_connection(f"{address}/ws?clientId={client.id}", timeout=60)

    def receive():
        with suppress(websocket.WebSocketException, OSError):
            while True:
                message = socket.recv()
                if isinstance(message, bytes) and message[:4] == PREVIEW:
                    found.append(message[8:])

    threading.Thread(target=receive, daemon=True).start()
    yield found
    socket.close()


def weights(server, name: str, kinds=("dla", "loras")) -> dict:
    files = [load_file(server.base / "models" / kind / f"{name}.safetensors") for kind in kinds]
    return {(number, key): value for number, file in enumerate(files) for key, value in file.items()}


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all((first[key] == second[key]).all() for key in first)


def test_what_is_trained_draws_in_the_next_job(server, prompt, training):
    training["2"]["inputs"]["name"] = "trained"
    shown_often = "run.sample_every = 4\nrun.sample_steps = 2\nrun.validate_every = 4\n"
    training["2"]["inputs"]["options"] = SETTINGS + shown_often
    training["3"] = make_node("PreviewAny", source=["2", 2])
    client = server.client
    with previews(client) as found:
        outputs = client.wait(client.queue(training), training)
    shown = [Image.open(io.BytesIO(client.fetch(image))) for image in outputs["2"]["images"]]
    pictures = [Image.open(io.BytesIO(data)) for data in found]
    assert len(pictures) >= 4 and all(picture.format == "JPEG" for picture in pictures)
    heights = [picture.height for picture in pictures]
    assert heights[0] < 100 < heights[-1] - max(picture.height for picture in shown), "text, then losses, then samples"
    assert len(shown) == 3 and all(min(picture.size) > 300 for picture in shown)
    assert "broken.png" in outputs["3"]["text"][0]

    # the DLA through Load Subject Pipeline, the LoRA through the host's own loader
    pipeline = key_of(prompt, "SubjectLoadPipeline")
    prompt[pipeline]["inputs"]["dla"] = "trained.safetensors"
    for node in prompt.values():
        node["inputs"] = {k: ["20", 0] if v == [pipeline, 0] else v for k, v in node["inputs"].items()}
    drawn = []
    for strength in (1.0, 0.0):
        lora = {"lora_name": "trained.safetensors", "strength_model": strength}
        prompt["20"] = make_node("LoraLoaderModelOnly", model=[pipeline, 0], **lora)
        images = [image for output in run(server, prompt).values() for image in output.get("images", [])]
        drawn.append(Image.open(io.BytesIO(server.client.fetch(images[0]))).convert("RGB"))
    assert drawn[0].size == (128, 128) and len(drawn[0].getcolors(2**24)) > 100
    assert drawn[0].tobytes() != drawn[1].tobytes(), "the LoRA does nothing"
    assert "lora key not loaded" not in server.log.read_text(encoding="utf-8", errors="replace")


def test_a_run_stopped_in_the_middle_ends_as_one_that_was_not(server, training):
    training["2"]["inputs"]["name"] = "whole"
    run(server, training)
    training["2"]["inputs"]["name"] = "stopped"
    steps = []

    def interrupt(_, step, last):
        if last == STEPS and step >= 2 and not steps:
            steps.append(step)
            urllib.request.urlopen(urllib.request.Request(f"{server.address}/interrupt", b""), timeout=30).close()

    with pytest.raises(WorkflowError, match="interrupted"):
        run(server, training, interrupt)
    folder = server.base / "output" / "subject_dla" / "runs" / "stopped"
    [checkpoint] = folder.glob("checkpoint-*")
    assert 2 <= int(checkpoint.name[-8:]) < STEPS
    assert not equal(weights(server, "stopped", ["dla"]), weights(server, "whole", ["dla"]))
    run(server, training)
    assert equal(weights(server, "stopped"), weights(server, "whole"))

    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.glob("checkpoint-*/*"))
    training["2"]["inputs"]["options"] += "# the host would not run the very same job twice\n"
    steps = []
    outputs = run(server, training, lambda _, step, last: steps.append(step) if last == STEPS else None)
    assert set(steps) <= {STEPS} and outputs["2"]["images"], "a finished run was run again"
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.glob("checkpoint-*/*")) == before
    assert equal(weights(server, "stopped"), weights(server, "whole"))

    training["2"]["inputs"]["stage"] = "1: MLLM tokens"
    with pytest.raises(WorkflowError, match="training.stage = 2, now it is 1"):  # before anything is loaded
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
