"""Workflow files, ledgers and score files from elsewhere: each is read, or refused by its name in bounded time."""

import json
import os

import pytest
from subject_dla.tools.benchmark.ledger import Ledger, RunError, check_run
from subject_dla.tools.benchmark.score_table import ScoreError, read_systems
from subject_dla.tools.benchmark.template import Template
from subject_dla.tools.comfy_client import workflow
from subject_dla.tools.comfy_client.workflow import WorkflowFileError

INFO = {
    "LoadImage": {"input": {"required": {"image": [["a.png"], {"image_upload": True}]}}, "output": ["IMAGE", "MASK"]},
    "SaveImage": {"input": {"required": {"images": ["IMAGE"], "filename_prefix": ["STRING", {}]}}, "output": []},
    "KSampler": {"input": {"required": {"model": ["MODEL"], "seed": ["INT", {}]}}, "output": ["LATENT"]},
}
API = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
    "2": {"class_type": "KSampler", "inputs": {"seed": 1, "positive": ["3", 0], "model": ["1", 0]}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "x"}},
    "4": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
}


def read(path, value):
    path.write_text(json.dumps(value))
    return Template(workflow.to_api(workflow.read(path), INFO, path), INFO)


def node(**entries):
    return {"id": 1, "type": "KSampler", "inputs": [], "outputs": []} | entries


def subgraph(name, *inner):
    nodes = [node(id=number, type=kind) for number, kind in enumerate(inner, 1)]
    return {"id": name, "name": name, "nodes": nodes, "links": [], "inputs": [], "outputs": []}


LINKED = [{"name": "model", "type": "MODEL", "link": 1}]
OF_THE_EDITOR = [
    [{"type": "KSampler"}], ["x"], [None], [node(type=["x"])], [node(widgets_values=7)], [node(inputs="x")],
    [node(inputs=[None])], [node(inputs=[{"link": 1}])], [node(outputs=[None, 7])], [node(inputs={"a": 1})],
]  # fmt: skip
MORE = [
    {"definitions": [1]}, {"definitions": {"subgraphs": "x"}}, {"definitions": {"subgraphs": [{"nodes": []}]}},
    {"nodes": {"a": 1}}, {"nodes": [node(inputs=LINKED)], "links": 7},
    {"nodes": [node(inputs=LINKED), node(id=2, mode=4)], "links": [[1, 2, -5, 1, 0, "MODEL"]]},
]  # fmt: skip


@pytest.mark.parametrize("entries", [*({"nodes": nodes} for nodes in OF_THE_EDITOR), *MORE])
def test_a_graph_with_entries_of_other_types_is_refused_by_its_name(tmp_path, entries):
    with pytest.raises(WorkflowFileError, match="a.json: "):
        read(tmp_path / "a.json", {"nodes": [], "links": [], **entries})


def test_subgraphs_that_hold_each_other_twice_and_again_are_refused(tmp_path):
    definitions = [subgraph(f"S{level}", f"S{level + 1}", f"S{level + 1}") for level in range(40)]
    graph = {"nodes": [node(type="S0")], "links": [], "definitions": {"subgraphs": [*definitions, subgraph("S40")]}}
    with pytest.raises(WorkflowFileError, match="a.json: .* has over 100,000 nodes with those of its subgraphs"):
        read(tmp_path / "a.json", graph)


@pytest.mark.parametrize("change", [
    {"2": {"class_type": "KSampler"}}, {"2": {"class_type": "KSampler", "inputs": [1]}}, {"2": {"class_type": None}},
    {"3": {"class_type": 7, "inputs": {}}}, {"3": API["3"] | {"_meta": [1]}},
    {"3": {"class_type": "CLIPTextEncode", "inputs": {"text": ["99", 0]}}},
])  # fmt: skip
def test_nodes_for_the_queue_of_other_types_are_refused_by_the_files_name(tmp_path, change):
    with pytest.raises(WorkflowFileError, match="a.json: node [23]"):
        read(tmp_path / "a.json", API | change)


@pytest.mark.parametrize("changes", [
    {"3": {"class_type": "CLIPTextEncode", "inputs": {"text": ["3", 0]}}},
    {"3": API["3"] | {"inputs": {"text": ["5", 0]}}, "5": {"class_type": "X", "inputs": {"text": ["3", 0]}}},
])  # fmt: skip
def test_a_prompt_that_comes_from_itself_is_refused(tmp_path, changes):
    with pytest.raises(WorkflowFileError, match="The prompt comes from node [35], which is linked to itself"):
        read(tmp_path / "a.json", API | changes)


@pytest.mark.parametrize("value", [[], ["3"], [["3"], 0], [1, 2, 3]])
@pytest.mark.parametrize("name", ["seed", "positive", "more"])
def test_a_list_that_is_no_link_is_a_value(tmp_path, name, value):
    graph = API | {"2": {"class_type": "KSampler", "inputs": API["2"]["inputs"] | {name: value}}}
    graph |= {"5": {"class_type": "SubjectEncode", "inputs": {"prompt": "x"}}}
    graph |= {"\u00b2": {"class_type": "LoadImage", "inputs": {"image": "a"}}, "9" * 5000: API["1"]}
    if name == "seed":
        with pytest.raises(WorkflowFileError, match="no seed"):
            read(tmp_path / "a.json", graph)
    else:
        assert read(tmp_path / "a.json", graph).texts == [("5", "prompt")]


def test_a_workflow_file_is_read_in_any_unicode_and_bounded(tmp_path):
    for name, data in (("a", json.dumps(API).encode("utf-16")), ("b", b"\xef\xbb\xbf" + json.dumps(API).encode())):
        (tmp_path / f"{name}.json").write_bytes(data)
        assert workflow.read(tmp_path / f"{name}.json") == API
    with open(tmp_path / "c.json", "wb") as file:
        file.truncate(10**9)
    with pytest.raises(WorkflowFileError, match="c.json has 1,000,000,000 bytes, expected at most"):
        workflow.read(tmp_path / "c.json")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "d.json")
        with pytest.raises(WorkflowFileError, match="d.json is a pipe"):
            workflow.read(tmp_path / "d.json")


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="has no such links")
def test_a_runs_lock_writes_through_no_link(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="It is a link"):
        with Ledger(tmp_path).alone():
            pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_what_is_no_ledger_is_given_up(tmp_path):
    (tmp_path / "ledger.jsonl").write_text("{}\n" * 200_000)
    with pytest.raises(RunError, match="ledger.jsonl has over 100,000 lines that name no case"):
        Ledger(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"workflow_digest": "x", "workflow": "w" * 10**6}))
    with pytest.raises(RunError, match="of another workflow") as error:
        check_run(tmp_path, {"workflow_digest": "y"})
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(("name", "text"), [
    ("a.csv", ",".join(["x"] * 200_000) + "\n"), ("b.jsonl", '{"CLIP-I": 0.5, "clip_i": 0.6}\n'),
])  # fmt: skip
def test_two_values_of_one_name_are_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ScoreError, match=f"{name}.*(200000 columns of the name 'x'|two values of one name)"):
        read_systems([str(tmp_path / name)])
