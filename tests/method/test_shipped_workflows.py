"""The workflows that come with the pack: their titles, and what the editor's list of templates finds them by."""

import json
import math

import pytest
from subject_dla.tools.comfy_client import workflow
from subject_dla.tools.comfy_client.editor_graph import WorkflowFileError
from subject_dla.tools.comfy_client.shipped import FOLDER, TITLES, find, shipped


def test_every_file_has_a_short_name_and_a_thumbnail():
    for kind in ("json", "jpg"):
        assert sorted(path.stem for path in FOLDER.glob(f"*.{kind}")) == sorted(TITLES.values()), kind
    assert all(path.stat().st_size < 60_000 for path in FOLDER.glob("*.jpg"))
    assert list(TITLES.values()) == sorted(TITLES.values()), "numbers give the order"
    assert not set('%#?:\\/*"<>|') & set("".join(TITLES.values())), "part of an address, and of a file name on Windows"


@pytest.mark.parametrize("words", ["subject", "reference", "consistent character"])
def test_a_newcomers_words_find_one(words):
    """The newest editor wants every word in the title, an older one words near its start."""
    assert any(words in title.lower()[:45] for title in TITLES.values())


def test_short_names_and_the_file_names_of_0_1_0_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("paper", "paper.json", "workflows/paper.json", FOLDER / "paper.json", shipped("paper")):
        assert find(name).samefile(shipped("paper"))
        assert workflow.read(name) == json.loads(shipped("paper").read_text(encoding="utf-8"))
    (tmp_path / "paper.json").write_text('{"mine": 1}')
    assert workflow.read("paper.json") == {"mine": 1}
    with pytest.raises(WorkflowFileError, match="papers.json: there is no such workflow file"):
        workflow.read("papers.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(WorkflowFileError, match="deep.json: not JSON"):
        workflow.read("deep.json")


TITLE = 30  # px of a node's title, above its position
COLOURS = {"#a1309b", "#b58b2a", "#3f789e"}  # of groups: model, context, image


@pytest.mark.parametrize("name", TITLES)
def test_graphs_can_be_read(name):
    """A heading at the top left, nodes inside groups of three colours and beside each other, and no link runs behind
    another node or through the title of a group."""
    graph = workflow.read(name)
    nodes = {node["id"]: node for node in graph["nodes"]}
    boxes = {key: (x, y - TITLE, x + w, y + h) for key, node in nodes.items() for (x, y), (w, h) in [_place(node)]}
    notes = [node for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    head = min(graph["nodes"], key=lambda node: (node["pos"][0], node["pos"][1]))
    heading, *sentences = head["widgets_values"][0].split("\n")
    assert heading.startswith("# ") and len(heading) < 60 and sentences and head in notes
    groups = [(x, y, x + w, y + h) for x, y, w, h in (group["bounding"] for group in graph["groups"])]
    assert {group["color"] for group in graph["groups"]} <= COLOURS
    for key, (x0, y0, x1, y1) in boxes.items():
        around = [g for g in groups if g[0] <= x0 and g[1] <= y0 and x1 <= g[2] and y1 <= g[3]]
        assert len(around) == (nodes[key] not in notes), (name, nodes[key]["type"])
        for other, (u0, v0, u1, v1) in boxes.items():
            assert key == other or x1 <= u0 or u1 <= x0 or y1 <= v0 or v1 <= y0, (name, key, other)
    titles = [(x, y, x + 14 * len(g["title"]), y + 34) for g in graph["groups"] for x, y, *_ in [g["bounding"]]]
    for link, path in _paths(graph, nodes):
        for key, box in boxes.items():
            inside = key not in (link[1], link[3]) and any(_inside(point, box) for point in path)
            assert not inside, (name, link, nodes[key]["type"])
        assert not any(_inside(point, title) for point in path for title in titles), (name, link)


def _place(node):
    return node["pos"], node["size"]


def _inside(point, box):
    return box[0] < point[0] < box[2] and box[1] < point[1] < box[3]


def _paths(graph, nodes):
    """Each link with points on its way: a curve, where it has reroutes lines between them."""
    reroutes = {reroute["id"]: reroute for reroute in graph["extra"].get("reroutes", [])}
    last = {link["id"]: link["parentId"] for link in graph["extra"].get("linkExtensions", [])}
    for link in graph["links"]:
        number, source, out, target, into, _ = link
        (x, y), (width, _) = _place(nodes[source])
        shown = [slot for slot in nodes[target]["inputs"] if "widget" not in slot]
        slot = nodes[target]["inputs"][into]
        right = nodes[target]["pos"]
        below = 14 + 20 * shown.index(slot) if slot in shown else nodes[target]["size"][1] / 2
        ends, between, key = [(x + width, y + 14 + 20 * out), (right[0], right[1] + below)], [], last.get(number)
        while key:
            assert number in reroutes[key]["linkIds"]
            between.insert(0, reroutes[key]["pos"])
            key = reroutes[key].get("parentId")
        points, steps = [ends[0], *between, ends[1]], [step / 40 for step in range(41)]
        if between:
            lines = zip(points, points[1:])
            yield link, [tuple(a[i] + t * (b[i] - a[i]) for i in (0, 1)) for a, b in lines for t in steps]
        else:
            (a, b), reach = ends, math.dist(*ends) / 4
            knots = (a, (a[0] + reach, a[1]), (b[0] - reach, b[1]), b)
            weights = [((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3) for t in steps]
            yield link, [tuple(sum(w * k[i] for w, k in zip(ws, knots)) for i in (0, 1)) for ws in weights]
