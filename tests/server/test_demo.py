"""The demo as its user starts it: a process of its own, its last line, and nothing left behind however it ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from io import BytesIO

import psutil
import pytest
from PIL import Image
from subject_dla.common import bootstrap
from subject_dla.demo import run as demo
from subject_dla.tests.small.prompts import key_of, of_type, run
from subject_dla.tools.comfy_client import workflow
from subject_dla.tools.comfy_client.server import ROOT, Server

SCRIPT = [sys.executable, bootstrap.__file__, "demo.run"]
PROMPT = "the cat of image 1 on a mossy rock"


@pytest.fixture
def small_workflow(tmp_path):
    """The demo workflow, saved by a user who made it small."""
    saved = workflow.read(demo.WORKFLOW)
    for node in saved["nodes"]:
        if node["type"] == "EmptySD3LatentImage":
            node["widgets_values"][:2] = [128, 128]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(saved))
    return path


def test_ones_own_workflow_images_and_prompt(comfyui, small_workflow, tmp_path):
    images = ["--image", str(demo.IMAGES / "chelsea.jpg")]
    command = [*SCRIPT, "--comfyui", str(comfyui), "--workflow", str(small_workflow)]
    command += ["--prompt", PROMPT, "--out", str(tmp_path / "out")]
    done = subprocess.run(command + images, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["workflow"] == "mine" and last["seconds"] > 0 and last["host"]
    [path] = last["images"]
    with Image.open(path) as picture:
        assert picture.size == (128, 128) and len(picture.convert("RGB").getcolors(2**24)) > 100
        queued = json.loads(picture.text["prompt"])  # the host saves what it ran in the picture
        graph = json.loads(picture.text["workflow"])  # what the editor restores when the picture is dropped
    nodes = [queued[key] for key in sorted(queued, key=int)]
    loaded = [node["inputs"]["image"] for node in nodes if node["class_type"] == "LoadImage"]
    assert [name.split(".")[0].split(" ")[0] for name in loaded] == ["chelsea"]
    prompts = [node["inputs"]["prompt"] for node in nodes if node["class_type"] == "SubjectEncode"]
    assert sorted(prompts) == [" ", PROMPT]  # the negative's stays empty
    texts = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "SubjectEncode"]
    (image,) = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "LoadImage"]
    assert sorted(texts) == [" ", PROMPT] and [image] == loaded
    again = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600).stdout.splitlines()[-1])
    assert again["images"] != last["images"] and os.path.exists(path), "an earlier picture was overwritten"


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("number", [
    signal.SIGINT, *(pytest.param(number, marks=pytest.mark.long) for number in (signal.SIGTERM, signal.SIGKILL))
])  # fmt: skip
def test_interrupted_it_leaves_no_process(comfyui, number, tmp_path):
    """SIGKILL too: nothing of ours runs then, and the server ends all the same."""
    command = [*SCRIPT, "--comfyui", str(comfyui), "--out", str(tmp_path)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # after SIGKILL nobody clears the server's folder
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    assert any("VAE and MLLM throughout" in line for line in process.stderr), "the demo ended before it printed that"
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("main.py" in " ".join(child.cmdline()) for child in children), children
    process.send_signal(number)
    threading.Thread(target=process.stderr.read, daemon=True).start()
    assert process.wait(60) != 0
    deadline = time.monotonic() + 30
    while left := [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, f"still running: {[child.cmdline() for child in left]}"
        time.sleep(0.2)


def test_a_plain_install_makes_the_demos_picture(comfyui, tmp_path):
    """Nothing is given to it but the pack: no model, no picture; also what 0.1.0 saved."""
    old = ROOT / "tests" / "fixtures" / "0.1.0" / "workflows" / "demo.json"
    with Server(comfyui, tmp_path, arguments=demo.device()) as server:
        assert [path.name for path in (server.base / "input").iterdir() if path.is_file()] == ["toy-1.png"]
        assert "copied the demo's picture" in server.log.read_text()
        info = server.client.object_info()
        for number, path in enumerate((demo.WORKFLOW, old)):
            prompt = workflow.to_api(workflow.read(path), info)
            of_type(prompt, "SaveImage")["filename_prefix"] = f"demo{number}"
            (image,) = run(server, prompt)[key_of(prompt, "SaveImage")]["images"]
            with Image.open(BytesIO(server.client.fetch(image))) as picture:
                assert picture.size == (112, 112) and len(picture.convert("RGB").getcolors(2**24)) > 1000
        saved = [path for path in (server.base / "models").rglob("*") if path.is_file()]
        assert not saved, "the demo's models stay in the pack"


def test_more_images_than_the_workflow_takes():
    prompt = {"1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}}}
    with pytest.raises(workflow.WorkflowFileError, match="2 images were given, but this workflow has 1"):
        workflow.put_in(prompt, ["b.png", "c.png"])
    with pytest.raises(workflow.WorkflowFileError, match="no Encode Subject"):
        workflow.put_in(prompt, text="words")
