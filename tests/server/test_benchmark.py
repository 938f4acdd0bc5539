"""A benchmark through the queue: the server killed and restarted in the middle, the run killed and started again; every
picture once, one bad prompt recorded."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from subject_dla.demo import run as demo
from subject_dla.demo import workflow
from subject_dla.demo.host import ROOT, Server, end_group
from subject_dla.evaluation.benchmark import Template
from subject_dla.evaluation.benchmark_sets import Case, Item
from subject_dla.tests.small.training import paint_subjects

from .conftest import of_type, shrink

PROMPTS = 30
OURS = [
    "flux_uno_staged",
    "omnigen2_staged",
    "qwen_image_edit_staged",
    "several_subjects",
    "paper",
    "mllm_only",
    "demo",
]
BAD = 12  # this one is only a comment to Prompt List, which refuses it


@pytest.fixture
def own_server(comfyui, family, tmp_path):
    with Server(comfyui, tmp_path / "host", models=[family], arguments=["--cpu"]) as running:
        yield running


@pytest.fixture
def small_workflow(own_server, tmp_path) -> Path:
    """The demo's with two Load Image nodes, its prompt from a Prompt List, in API format."""
    prompt = workflow.to_api(json.loads(demo.WORKFLOW.read_text()), own_server.client.object_info())
    shrink(prompt)
    of_type(prompt, "EmptySD3LatentImage").update(width=64, height=64)
    of_type(prompt, "SubjectStagedSampler").update(steps=2)
    for node in prompt.values():
        if node["class_type"] == "SubjectAddIdentity":
            node["inputs"]["size"] = 64
    of_type(prompt, "SubjectEncode").update(prompt=["50", 0], image_size=56)
    prompt["50"] = {"class_type": "SubjectPromptList", "inputs": {"prompts": "a cup"}}
    path = tmp_path / "small.json"
    path.write_text(json.dumps(prompt))
    return path


@pytest.fixture
def questions(tmp_path) -> Path:
    """UNO's layout; every third prompt has two references, the others one."""
    subjects = sorted(path.name for path in paint_subjects(tmp_path / "set").iterdir())
    entries = []
    for number in range(PROMPTS):
        subject = subjects[number // 5]
        prompt = f"a {subject.split('-')[1]} on a table, number {number}" if number != BAD else "# nothing to draw"
        paths = [f"{subject}/{view}.png" for view in range(2 if number % 3 == 0 else 1)]
        entries.append({"prompt": prompt, "image_paths": paths, "subject": subject})
    path = tmp_path / "set" / "list.json"
    path.write_text(json.dumps(entries))
    return path


def lines(out: Path) -> list[dict]:
    path = out / "ledger.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def await_lines(out: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while len(lines(out)) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, lines(out)
        time.sleep(0.05)


def test_every_picture_once_whatever_is_killed(own_server, small_workflow, questions, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "evaluation", "run", questions, "--workflow", small_workflow]
    command += ["--server", own_server.address, "--out", out, "--patience", "300"]

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    first = start()
    try:
        await_lines(out, 6, first)
        end_group(own_server.process)
        early = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
        time.sleep(1)
        assert first.poll() is None, "the run ended with its server"
        own_server.start()
        await_lines(out, 18, first)
    finally:
        first.kill()  # the run itself, without a chance to tidy up
        first.communicate()
    with open(out / "ledger.jsonl", "a") as file:
        file.write('{"name": "cut off by the ki')

    second = start()
    said = second.communicate(timeout=300)
    result = json.loads(said[0].splitlines()[-1])
    assert second.returncode == 1 and result["failed"] == 1 and result["pictures"] == PROMPTS - 1, said[1]
    assert result["made"] < PROMPTS - 12, "pictures that were there were made again"

    entries = lines(out)
    assert len(entries) == PROMPTS == len({entry["name"] for entry in entries})
    [failed] = [entry for entry in entries if entry["status"] == "failed"]
    assert failed["prompt"] == "# nothing to draw" and "Prompt List" in failed["error"]
    done = [entry for entry in entries if entry["status"] == "done"]
    assert sorted(entry["picture"] for entry in done) == sorted(path.name for path in out.glob("*.png"))
    wanted = {entry["prompt"]: entry for entry in json.loads(questions.read_text())}
    seen = set()
    for entry in done:
        with Image.open(out / entry["picture"]) as picture:
            queued, said = json.loads(picture.text["prompt"]), json.loads(picture.text["subject_benchmark"])
            assert picture.size == (64, 64)
            seen.add(picture.convert("RGB").tobytes())
        assert said.items() <= entry.items()
        assert of_type(queued, "SubjectPromptList")["prompts"] == entry["prompt"]
        assert of_type(queued, "SubjectStagedSampler")["seed"] == entry["seed"]
        assert entry["references"] == wanted[entry["prompt"]]["image_paths"]
        loaders = [node for node in queued.values() if node["class_type"] == "LoadImage"]
        identities = [node for node in queued.values() if node["class_type"] == "SubjectAddIdentity"]
        assert len(loaders) == len(identities) == len(entry["references"]), "a picture of the workflow's own came along"
        for loader, reference in zip(loaders, entry["references"]):
            with Image.open(own_server.base / "input" / loader["inputs"]["image"]) as there:
                with Image.open(questions.parent / reference) as here:
                    assert there.tobytes() == here.tobytes()
    assert len(seen) == PROMPTS - 1, "pictures of different prompts and seeds are equal"
    assert all((out / name).stat().st_mtime_ns == time_ for name, time_ in early.items()), "a picture was made twice"

    other = tmp_path / "other"
    command[command.index(out)] = other
    stopped = start()
    await_lines(other, 2, stopped)
    stopped.send_signal(signal.SIGTERM)
    assert "Traceback" not in stopped.communicate(timeout=60)[1] and stopped.returncode == 130
    deadline = time.monotonic() + 30
    while any(own_server.client.get("/queue").values()):
        assert time.monotonic() < deadline, "jobs were left in the server's queue"
        time.sleep(0.1)
    assert len(lines(other)) < PROMPTS // 2
    command[command.index(other)] = out

    own_server.stop()
    gone = start()
    said = gone.communicate(timeout=60)
    assert gone.returncode == 1 and "does not answer" in said[1] and "Traceback" not in said[1]
    assert len(lines(out)) == PROMPTS


def test_scores_in_the_workflow_become_the_table(own_server, small_workflow, questions, tmp_path):
    """A score node shows its JSON in a Preview as Text; here a constant stands for it. Then: another workflow is
    refused in the same folder."""
    command = [sys.executable, "-m", "evaluation", "run", str(questions), "--server", own_server.address]
    command += ["--out", str(tmp_path / "out"), "--limit", "2", "--workflow"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def go(path: Path) -> subprocess.CompletedProcess:
        return subprocess.run([*command, str(path)], cwd=ROOT, capture_output=True, text=True, env=environment)

    prompt = json.loads(small_workflow.read_text())
    report = {"figures": [{"figure": "CLIP-T", "per_output": [0.25], "backbone": {"name": "ViT-B/32"}}]}
    prompt["60"] = {"class_type": "PrimitiveStringMultiline", "inputs": {"value": json.dumps(report)}}
    prompt["61"] = {"class_type": "PreviewAny", "inputs": {"source": ["60", 0]}}
    small_workflow.write_text(json.dumps(prompt))
    done = go(small_workflow)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])["scores"]["out"]
    assert set(scores) == {"CLIP-T"} and scores["CLIP-T"]["mean"] == 0.25
    assert "| 0.2500 (0.2500 to 0.2500) | 2 " in done.stderr and "ViT-B/32" in done.stderr

    of_type(prompt, "SubjectStagedSampler")["steps"] = 3
    (tmp_path / "other.json").write_text(json.dumps(prompt))
    refused = go(tmp_path / "other.json")
    assert refused.returncode == 1 and "another --out" in refused.stderr and "Traceback" not in refused.stderr
    assert len(lines(tmp_path / "out")) == 2


def test_every_system_takes_a_reference_and_a_prompt(own_server):
    """The place of the prompt is the positive one, wherever a workflow keeps it."""
    info = own_server.client.object_info()
    item = Item("subject", "the words of the benchmark", (Path("a.png"),), "")
    for path in [*(ROOT / "workflows").glob("system_*.json"), *(ROOT / "workflows" / f"{name}.json" for name in OURS)]:
        prompt = workflow.to_api(json.loads(path.read_text(encoding="utf-8")), info)
        filled = Template(prompt, info).fill(Case("name", item, 0, 77), ["a.png"], "out")
        kinds = [node["class_type"] for node in filled.values()]
        assert kinds.count("LoadImage") == kinds.count("SaveImage") == 1, path.stem
        changed = [key for key, node in filled.items() if item.prompt in node["inputs"].values()]
        assert len(changed) == 1 and "negative" not in filled[changed[0]]["_meta"]["title"].lower(), path.stem
        seeds = [node["inputs"].get("seed", node["inputs"].get("noise_seed")) for node in filled.values()]
        assert [seed for seed in seeds if seed is not None] == [77], path.stem
        for key, node in filled.items():
            required = info[node["class_type"]]["input"].get("required", {})
            assert set(required) <= set(node["inputs"]), (path.stem, key, "a required input has gone")
            links = [value[0] for value in node["inputs"].values() if isinstance(value, list)]
            assert set(links) <= set(filled), (path.stem, key, "a link leads nowhere")
