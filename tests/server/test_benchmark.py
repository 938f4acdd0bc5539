"""A benchmark through the queue: the server killed and restarted in the middle, the run killed and started again; every
picture once, one bad prompt recorded. The table of what the score nodes in the workflow measured, by one server and by
two of which one is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from PIL import Image
from subject_dla.common.list_files import Example
from subject_dla.demo.family.layout import MODELS
from subject_dla.loaders.preprocessing import DINO, clip_preprocessing, preprocess
from subject_dla.tests.small.measure import build_measures
from subject_dla.tests.small.prompts import make_node, of_type, two_references
from subject_dla.tests.small.training import paint_subjects
from subject_dla.tools.benchmark.sets import Case
from subject_dla.tools.benchmark.template import Template
from subject_dla.tools.comfy_client import workflow
from subject_dla.tools.comfy_client.server import PACK, ROOT, Server, end_group

BENCHMARK = ROOT / "tools" / "benchmark"
PROMPTS = 18
WORKFLOWS = [
    "system_omnigen2", "system_qwen_image_edit", "system_uso", "system_uno", "system_dreamo", "flux_uno_staged",
    "omnigen2_staged", "qwen_image_edit_staged", "several_subjects", "paper", "mllm_only", "demo",
]  # fmt: skip
BAD = 8  # this one is only a comment to Prompt List, which refuses it


@pytest.fixture(scope="session")
def measures(comfyui, tmp_path_factory) -> Path:
    return build_measures(tmp_path_factory.mktemp("measures"), comfyui)


@pytest.fixture
def make_server(comfyui, new_dlas, measures, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # sums of several threads may differ in their last bits
    packs, models = {"dreamo": Path(__file__).with_name("dreamo"), PACK: ROOT}, [MODELS, new_dlas, measures]

    def make(name):
        return Server(comfyui, tmp_path / name, packs=packs, models=models, arguments=["--cpu"])

    return make


@pytest.fixture
def own_server(make_server):
    with make_server("host") as running:
        yield running


@pytest.fixture
def small_workflow(own_server, tmp_path) -> Path:
    """With two Load Image nodes, its prompt from a Prompt List, in API format."""
    prompt = two_references(own_server.client.object_info())
    of_type(prompt, "EmptySD3LatentImage").update(width=64, height=64)
    of_type(prompt, "SubjectStagedSampler").update(steps=2)
    for node in prompt.values():
        if node["class_type"] == "SubjectAddIdentity":
            node["inputs"]["size"] = 64
    of_type(prompt, "SubjectEncode").update(prompt=["50", 0], image_size=56)
    prompt["50"] = make_node("SubjectPromptList", prompts="a cup")
    path = tmp_path / "small.json"
    path.write_text(json.dumps(prompt))
    return path


@pytest.fixture
def questions(tmp_path) -> Path:
    """UNO's layout; every third prompt has two references, the others one."""
    subjects = sorted(path.name for path in paint_subjects(tmp_path / "set").iterdir())
    entries = []
    for number in range(PROMPTS):
        subject = subjects[number // 3]
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
    command = [sys.executable, BENCHMARK, "run", questions, "--workflow", small_workflow]
    command += ["--server", own_server.address, "--out", out, "--patience", "300"]

    def start() -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, text=True, **pipes)

    first = start()
    try:
        await_lines(out, 4, first)
        end_group(own_server.process)
        early = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
        time.sleep(1)
        assert first.poll() is None, "the run ended with its server"
        own_server.start()
        await_lines(out, 11, first)
    finally:
        first.kill()  # the run itself, without a chance to tidy up
        first.communicate()
    with open(out / "ledger.jsonl", "a") as file:
        file.write('{"name": "cut off by the ki')

    second = start()
    said = second.communicate(timeout=300)
    result = json.loads(said[0].splitlines()[-1])
    assert second.returncode == 1 and result["failed"] == 1 and result["pictures"] == PROMPTS - 1, said[1]
    assert result["made"] < PROMPTS - 7, "pictures that were there were made again"

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


def add_scores(prompt: dict) -> None:
    """Orientation, Copy-Paste Report and Identity Scores on the picture and the first reference, as a user wires them.
    Every pair counts: a random network is sure of no front."""
    picture = of_type(prompt, "SaveImage")["images"]
    reference = [min((key for key, node in prompt.items() if node["class_type"] == "LoadImage"), key=int), 0]
    shown, model = {"images": picture, "references": reference}, {"orientation_model": ["60", 0]}
    turned = model | {"min_confidence": 0.0, "filename_prefix": "copy_paste/report"}
    alike = {"dino_folder": "dino-vits16", "clip_folder": "clip", "filename_prefix": "identity/scores"}
    prompt |= {
        "60": make_node("SubjectLoadOrientation", orientation="small.safetensors", save_safetensors=False),
        "61": make_node("SubjectOrientation", **model, image=picture, min_confidence=0.5),
        "62": make_node("SubjectCopyPasteReport", **shown, **turned),
        "63": make_node("PreviewAny", source=["62", 2]),
        "64": make_node("SubjectIdentityScores", **shown, **alike, prompts=["50", 0]),
        "65": make_node("PreviewAny", source=["64", 1]),
    }


def pixels(path: Path) -> torch.Tensor:
    """(H, W, 3) in 0..1, as Load Image reads it."""
    with Image.open(path) as picture:
        return torch.from_numpy(numpy.asarray(picture.convert("RGB"), dtype=numpy.float32) / 255)


@torch.no_grad()
def cosines(out: Path, references: Path, models: Path) -> dict[str, list[float]]:
    dino = transformers.ViTModel.from_pretrained(models / "dino-vits16", add_pooling_layer=False)
    clip = transformers.CLIPModel.from_pretrained(models / "clip")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(models / "clip")
    found = {"DINO-I": [], "CLIP-I": [], "CLIP-T": []}
    for entry in lines(out):
        drawn = (pixels(out / entry["picture"]) + 0.5 / 255).clamp(max=1)  # the host cuts off what 8 bits don't hold
        pair = [drawn, pixels(references / entry["references"][0])]
        faces = [dino(preprocess(image, DINO)[None]).last_hidden_state[:, 0] for image in pair]
        seen = [clip.vision_model(preprocess(image, clip_preprocessing(224))[None]).pooler_output for image in pair]
        seen = [clip.visual_projection(state) for state in seen]
        said = clip.text_model(**tokenizer(entry["prompt"], return_tensors="pt")).pooler_output
        pairs = {"DINO-I": faces, "CLIP-I": seen, "CLIP-T": (seen[0], clip.text_projection(said))}
        for name, (one, other) in pairs.items():
            found[name].append(torch.cosine_similarity(one, other).item())
    return found


def test_scores_in_the_workflow_become_the_table(own_server, small_workflow, questions, measures, tmp_path):
    """The score nodes measure as the run goes, each showing its JSON in a Preview as Text. The table is theirs, and
    what the library's own models say of the saved pictures. Then: another workflow is refused in the same folder."""
    out, pictures = tmp_path / "out", 4
    options = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True, "capture_output": True}

    def go(*command) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, BENCHMARK, *map(str, command)], **options)

    def draw(path: Path) -> subprocess.CompletedProcess:
        run = ["run", questions, "--server", own_server.address, "--out", out, "--limit", pictures]
        return go(*run, "--workflow", path)

    prompt = json.loads(small_workflow.read_text())
    add_scores(prompt)
    small_workflow.write_text(json.dumps(prompt))
    done = draw(small_workflow)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])["scores"]["out"]
    assert set(scores) == {"azimuth", "polar", "average_recall", "DINO-I", "CLIP-I", "CLIP-T"}
    for name, values in cosines(out, questions.parent, measures / "clip_vision").items():
        found = scores[name]["mean"]
        assert found == pytest.approx(sum(values) / pictures, abs=5e-4), (name, "a saved picture has 8 bits")
        assert scores[name]["low"] < found < scores[name]["high"], name
        assert max(values) - min(values) > 2e-3, (name, "the models see no difference")
    reports = [json.loads(path.read_text()) for path in (out / "scores").glob("*.json")]
    assert len(reports) == 2 * pictures
    pairs = [pair for report in reports for pair in report.get("pairs", ()) if pair["set"] != "floor"]
    turned = [pair["azimuth_difference"] for pair in pairs]
    assert len(turned) == pictures and scores["azimuth"]["mean"] == pytest.approx(sum(turned) / pictures)
    assert f"{pictures} of {pictures} pairs count" in done.stderr and "dino-vits16 (folder)" in done.stderr

    scored = go("score", f"out={out}", "--paper")
    assert scored.returncode == 0 and json.loads(scored.stdout) == {"out": scores}, scored.stderr
    assert "| UNO, as published" in scored.stderr

    name = lines(out)[1]["name"]  # lost with its reports: the host answers from its cache
    for path in [out / f"{name}.png", *(out / "scores").glob(f"{name}-*.json")]:
        path.unlink()
    again = draw(small_workflow)
    assert again.returncode == 0 and json.loads(again.stdout.splitlines()[-1])["scores"]["out"] == scores, again.stderr

    of_type(prompt, "SubjectStagedSampler")["steps"] = 3
    (tmp_path / "other.json").write_text(json.dumps(prompt))
    refused = draw(tmp_path / "other.json")
    assert refused.returncode == 1 and "another --out" in refused.stderr and "Traceback" not in refused.stderr
    assert len(lines(out)) == pictures


@pytest.mark.long
def test_two_servers_of_which_one_is_killed_make_the_table_of_one(
    own_server, make_server, small_workflow, questions, tmp_path
):
    prompt = json.loads(small_workflow.read_text())
    add_scores(prompt)
    small_workflow.write_text(json.dumps(prompt))

    def start(out, *servers):
        command = [
            sys.executable,
            BENCHMARK,
            "run",
            questions,
            "--workflow",
            small_workflow,
            "--out",
            out,
            "--limit",
            few,
        ]
        for server in servers:
            command += ["--server", server.address]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, text=True, **pipes)

    def end(process):
        said = process.communicate(timeout=300)
        assert process.returncode == 1 and "Traceback" not in said[1], said[1]  # of the bad prompt
        return json.loads(said[0].splitlines()[-1]), said[1]

    two, one, few = tmp_path / "two", tmp_path / "one", BAD + 3
    with make_server("other") as other:
        process = start(two, own_server, other)
        deadline = time.monotonic() + 300
        while [line["server"] for line in lines(two)].count(other.address) < 2:
            assert process.poll() is None and time.monotonic() < deadline, lines(two)
            time.sleep(0.05)
        end_group(other.process)
        result, said = end(process)
    assert f"{other.address} does not answer" in said and list(result["lost"]) == [other.address]
    by = result["servers"]
    assert by[other.address] >= 2 and sum(by.values()) == result["pictures"] == few - 1
    alone, _ = end(start(one, own_server))
    assert alone["lost"] == {} and alone["scores"]["one"] == result["scores"]["two"] and result["failed"] == 1
    for mine, theirs in zip(lines(two), lines(one), strict=True):
        assert (mine["name"], mine["status"]) == (theirs["name"], theirs["status"])
        if mine["status"] == "failed":
            assert mine["prompt"] == "# nothing to draw" and mine["error"] == theirs["error"]
        else:
            assert torch.equal(pixels(two / mine["picture"]), pixels(one / theirs["picture"])), mine["server"]


def test_every_system_takes_a_reference_and_a_prompt(own_server):
    """The place of the prompt is the positive one, wherever a workflow keeps it. DreamO's nodes are stand-ins."""
    info = own_server.client.object_info()
    item = Example("subject", "the words of the benchmark", (Path("a.png"),))
    for name in WORKFLOWS:
        prompt = workflow.to_api(workflow.read(name), info)
        filled = Template(prompt, info).fill(Case("case", item, 0, 77), ["a.png"], "out")
        kinds = [node["class_type"] for node in filled.values()]
        assert kinds.count("LoadImage") == kinds.count("SaveImage") == 1, name
        changed = [key for key, node in filled.items() if item.prompt in node["inputs"].values()]
        assert len(changed) == 1 and "negative" not in filled[changed[0]]["_meta"]["title"].lower(), name
        seeds = [node["inputs"].get("seed", node["inputs"].get("noise_seed")) for node in filled.values()]
        assert [seed for seed in seeds if seed is not None] == [77], name
        for key, node in filled.items():
            required = info[node["class_type"]]["input"].get("required", {})
            assert set(required) <= set(node["inputs"]), (name, key, "a required input has gone")
            links = [value[0] for value in node["inputs"].values() if isinstance(value, list)]
            assert set(links) <= set(filled), (name, key, "a link leads nowhere")
