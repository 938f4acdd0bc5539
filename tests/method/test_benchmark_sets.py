"""Benchmark layouts, whole and damaged; the pictures they ask for; the places in a workflow; the table of scores."""

import json
import random
import shutil
import string
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from subject_dla.common.list_files import DataError, Example
from subject_dla.tools.benchmark.ledger import Ledger, read_mark, with_texts
from subject_dla.tools.benchmark.runner import Benchmark
from subject_dla.tools.benchmark.score_table import ScoreError, as_json, read_systems, score_table
from subject_dla.tools.benchmark.sets import Case, cases, read_prompts, read_set
from subject_dla.tools.benchmark.template import Template

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "0.1.0"
OBJECTS = ["'a {0} {1} in the jungle'", "'a {0} {1} on top of a mirror'", "'a red {0} {1}'"]
ALIVE = ["'a {0} {1} wearing a red hat'", "'a wet {0} {1}'"]


def paint(path, colour="teal"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), colour).save(path)


def dreambench(root, objects=OBJECTS, classes=("can,can", "dog2,dog", "wolf_plushie,stuffed animal")):
    """As google/dreambooth publishes it."""
    (root / "dataset").mkdir(parents=True)
    for number, line in enumerate(classes):
        for view in range(3):
            paint(root / "dataset" / line.split(",")[0] / f"{view:02d}.jpg", (40 * number, 90, 30 * view))
    text = ["Classes", "", "subject_name,class", *classes, "", "Prompts", ""]
    for head, prompts in (("Object Prompts", objects), ("Live Subject Prompts", ALIVE)):
        lines = [line + ".format(unique_token, class_token)," for line in prompts]
        text += [head, "", "prompt_list = [", *lines, "]", ""]
    (root / "dataset" / "prompts_and_classes.txt").write_text("\n".join(text), encoding="utf-8")
    return root


def prompts_of(found, subject):
    return [item.prompt for item in found.items if item.subject == subject]


def has(found, *words):
    return any(all(word in problem for word in words) for problem in found.problems)


def test_dreambench(tmp_path):
    found = read_set(dreambench(tmp_path))
    assert found.layout == "dreambench" and not found.problems
    assert prompts_of(found, "can") == ["a can in the jungle", "a can on top of a mirror", "a red can"]
    assert prompts_of(found, "dog2") == ["a dog wearing a red hat", "a wet dog"]
    assert prompts_of(found, "wolf_plushie")[2] == "a red stuffed animal"
    assert {tuple(path.name for path in item.references) for item in found.items} == {("00.jpg",)}
    assert read_set(tmp_path / "dataset", references=2).items[0].references[1].name == "01.jpg"


def test_damaged_dreambench(tmp_path):
    root = dreambench(tmp_path, objects=[*OBJECTS, "'no class in here'", "not quoted"])
    home, text = root / "dataset", (root / "dataset" / "prompts_and_classes.txt")
    lines = text.read_text().replace("can,can", "can,can\nnonsense\n../up,cat\ngone,vase").replace("\n", "\r\n")
    text.write_bytes(lines.encode("utf-8-sig"))
    (home / "can" / "00.jpg").write_bytes((home / "can" / "00.jpg").read_bytes()[:200])
    (home / "stranger").mkdir()
    for path in (home / "dog2").iterdir():
        path.unlink()
    found = read_set(root)
    assert {item.subject for item in found.items} == {"can", "wolf_plushie"}
    assert len([problem for problem in found.problems if "gone" in problem]) == 1  # once, not also as empty
    assert found.items[0].references[0].name == "01.jpg", "the broken picture was taken"
    assert len(prompts_of(found, "can")) == 3
    for words in (
        ("00.jpg", "cannot be read"), ("dog2", "0 readable"), ("stranger",), ("nonsense", "SUBJECT,CLASS"),
        ("../up",), ("no class in here",), ("not quoted",),
    ):  # fmt: skip
        assert has(found, *words), (words, found.problems)


def test_dreambench_without_anything_to_draw(tmp_path):
    root = dreambench(tmp_path / "c")
    (root / "dataset" / "prompts_and_classes.txt").write_bytes(b"\xff\xfe\x00broken")
    (tmp_path / "d").mkdir()
    for words, place in (
        ("no object prompts", dreambench(tmp_path / "a", objects=[])),
        ("no classes", dreambench(tmp_path / "b", classes=())),
        ("UTF-8", root), ("--prompts", tmp_path / "d"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words):
            read_set(place)


def test_lists(tmp_path):
    for name in ("cat/0.jpg", "cat/1.jpg", "assets/animal/13_polar bear.jpg"):
        paint(tmp_path / name)
    entries = [
        {"prompt": "a cat\n asleep ", "image_paths": ["./cat/0.jpg", "cat\\1.jpg"], "image_tgt_path": "missing.jpg"},
        {"prompt": "one", "image_path": "cat/0.jpg", "subject": "tom"},
    ]
    (tmp_path / "uno.json").write_text(json.dumps(entries))
    (tmp_path / "uno.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    found = read_set(tmp_path / "uno.json")
    assert found.layout == "list" and not found.problems
    assert [(item.subject, item.prompt) for item in found.items] == [("cat/0", "a cat asleep"), ("tom", "one")]
    assert [path.name for path in found.items[0].references] == ["0.jpg", "1.jpg"]
    assert [i.prompt for i in read_set(tmp_path / "uno.jsonl").items] == [i.prompt for i in found.items]

    place = tmp_path / "eval" / "XVerseBench_single.json"  # its paths start two folders above it
    place.parent.mkdir()
    source = {"image_path": "assets/animal/13_polar bear.jpg", "caption": "it"}
    parts = [{"type": "adapter", "src_inputs": [source], "use_words": []}]
    prompt = "a polar bear on an iceberg\n"
    place.write_text(json.dumps([{"index": 0, "input_images": [], "prompt": prompt, "modulation": parts}]))
    [item] = read_set(place, images=tmp_path).items
    assert item.prompt == "a polar bear on an iceberg" and item.references[0].name == "13_polar bear.jpg"
    with pytest.raises(DataError, match="--images"):
        read_set(place)


def test_damaged_lists(tmp_path):
    paint(tmp_path / "set" / "good.jpg")
    paint(tmp_path / "outside.jpg")
    (tmp_path / "set" / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "set" / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    good = {"prompt": "fine", "image_paths": ["good.jpg"]}
    bad = [
        "text", {}, {"prompt": " ", "image_paths": ["good.jpg"]}, {"prompt": "\ud800", "image_paths": ["good.jpg"]},
        {"prompt": "x"}, {"prompt": "x", "image_paths": []}, {"prompt": "x", "image_paths": [3]},
        {"prompt": "x", "image_paths": "../outside.jpg"}, {"prompt": "x", "image_paths": ["link.jpg"]},
        {"prompt": "x", "image_paths": [str(tmp_path / "outside.jpg")]}, {"prompt": "x", "image_paths": ["gone.jpg"]},
        {"prompt": "x", "image_paths": ["broken.jpg"]}, {"prompt": "x", "image_paths": ["good.jpg"], "subject": 7},
        {"prompt": "x", "modulation": "nothing"}, {"prompt": "x", "modulation": [{}]}, good,
    ]  # fmt: skip
    path = tmp_path / "set" / "list.json"
    path.write_text(json.dumps([good, *bad]))
    found = read_set(path)
    assert [item.prompt for item in found.items] == ["fine"]
    assert len(found.problems) == len(bad)
    assert all("list.json entry" in problem and problem.isprintable() for problem in found.problems), found.problems
    for number in range(2, len(bad) + 2):
        assert has(found, f"entry {number}:"), f"nothing is said of entry {number}"
    assert has(found, "repeats list.json entry 1")

    lines = path.with_suffix(".jsonl")
    lines.write_text(json.dumps(good) + '\n{"prompt": "cut o\n')
    assert has(read_set(lines), "entry 2", "not JSON")


def test_ones_own_folder(tmp_path):
    for name in ("my_toy/b.png", "my_toy/a.webp", "cup-1/x.JPG", "loose.png", ".hidden/x.png"):
        paint(tmp_path / "mine" / name)
    (tmp_path / "mine" / "cup-1" / "class.txt").write_text("mug\n")
    (tmp_path / "mine" / "empty").mkdir()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# comment\n{subject} at night\n\n  {other} {subject}, {0}  \n", encoding="utf-8-sig")
    found = read_set(tmp_path / "mine", prompts=prompts)
    assert found.layout == "folder" and found.problems == ("empty: 0 readable picture(s), expected 1",)
    assert prompts_of(found, "my_toy") == ["my toy at night", "{other} my toy, {0}"]
    assert prompts_of(found, "cup-1")[0] == "mug at night" and len(prompts_of(found, "mine")) == 2
    assert found.items[-1].references[0].name == "a.webp"
    json_list = tmp_path / "prompts.json"
    json_list.write_text('["one", "two"]')
    assert read_prompts(json_list) == ["one", "two"]
    for path, text, words in ((prompts, "# nothing\n\n", "no prompt"), (json_list, '["one", 2]', "list of texts")):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            read_prompts(path)


def test_seeds_belong_to_the_prompt_and_nothing_else(tmp_path):
    items = read_set(dreambench(tmp_path)).items
    all_of_them = cases(items, seeds=3)
    assert len(all_of_them) == 3 * len(items) == len({case.name for case in all_of_them})
    assert len({case.seed for case in all_of_them}) == len(all_of_them)
    assert all(0 <= case.seed < 2**53 for case in all_of_them)
    assert cases(items, seeds=3, limit=2) == all_of_them[:6]
    shuffled = random.Random(0).sample(items, len(items))
    assert set(cases(shuffled, seeds=3)) == set(all_of_them)
    assert not {case.name for case in cases(items, seed=1)} & {case.name for case in all_of_them}

    paint(items[0].references[0], "black")  # another picture of the subject: to be drawn again, with the same seed
    again = cases(items, seeds=3)
    assert again[0].name != all_of_them[0].name and again[0].seed == all_of_them[0].seed


def test_names_are_file_names(tmp_path):
    paint(tmp_path / "a.png")
    item = Example("../../" + "ü" * 300, "con: <x> | " + "y" * 300, (tmp_path / "a.png",))
    [case] = cases([item])
    assert len(case.name) < 120 and set(case.name) <= {*string.ascii_letters, *string.digits, *"_-"}


def kind(output, optional=(), **required):
    inputs = {"required": {name: [type_] for name, type_ in required.items()}}
    return {"input": inputs | {"optional": {name: ["IMAGE"] for name in optional}}, "output": output}


CONDITION = "CONDITIONING"
INFO = {
    "LoadImage": kind(["IMAGE", "MASK"], image=["a.png"]),
    "Scale": kind(["IMAGE"], image="IMAGE"),
    "Encode": kind([CONDITION], ["image2"], text="STRING", image="IMAGE"),
    "Reference": kind([CONDITION], conditioning=CONDITION, image="IMAGE"),
    "KSampler": kind(["IMAGE"], positive=CONDITION, negative=CONDITION, seed="INT"),
    "PreviewImage": kind([], images="IMAGE"),
    "SaveImage": kind([], images="IMAGE"),
    "PrimitiveInt": kind(["INT"], value="INT"),
}


def graph(**changes):
    nodes = {
        "1": ("LoadImage", {"image": "mine.png"}), "2": ("LoadImage", {"image": "mine too.png"}),
        "3": ("Scale", {"image": ["2", 0]}), "4": ("PreviewImage", {"images": ["3", 0]}),
        "5": ("Encode", {"text": "words", "image": ["1", 0], "image2": ["3", 0]}),
        "6": ("Encode", {"text": "ugly", "image": ["1", 0]}),
        "7": ("Reference", {"conditioning": ["5", 0], "image": ["3", 0]}),
        "8": ("KSampler", {"positive": ["7", 0], "negative": ["6", 0], "seed": 5}),
        "9": ("SaveImage", {"images": ["8", 0], "filename_prefix": "x"}),
    }  # fmt: skip
    nodes = {key: {"class_type": kind, "inputs": dict(inputs)} for key, (kind, inputs) in nodes.items()}
    for key, inputs in changes.items():
        nodes[key.strip("_")]["inputs"].update(inputs)
    return nodes


CASE = Case("name", Example("toy", "a toy", ()), 0, 77)


def test_a_case_takes_its_places_in_the_workflow():
    before = graph()
    template = Template(before, INFO)
    both = template.fill(CASE, ["a.png", "b.png"], "out")
    assert both["1"]["inputs"]["image"] == "a.png" and both["2"]["inputs"]["image"] == "b.png"
    assert both["5"]["inputs"]["text"] == "a toy" and both["6"]["inputs"]["text"] == "ugly"
    assert both["8"]["inputs"]["seed"] == 77 and both["9"]["inputs"]["filename_prefix"] == "out/name"
    assert before == graph(), "the template was changed"

    one = template.fill(CASE, ["a.png"], "out")  # what the second picture went through is bypassed
    assert set(one) == {"1", "5", "6", "8", "9"}
    assert "image2" not in one["5"]["inputs"] and one["8"]["inputs"]["positive"] == ["5", 0]
    with pytest.raises(ValueError, match="needs them all"):
        Template(graph(_9={"images": ["3", 0]}), INFO).fill(CASE, ["a.png"], "out")
    with pytest.raises(ValueError, match="3 images were given"):
        template.fill(CASE, ["a.png"] * 3, "out")


def test_a_picture_that_a_reference_has_no_part_in_is_refused():
    """A node that needs both references goes with the second one, and hands on a condition without the first."""
    both = graph(_8={"positive": ["7", 0]}) | {"6": {"class_type": "Words", "inputs": {"text": "ugly"}}}
    both["7"] = {"class_type": "Pair", "inputs": {"one": ["1", 0], "two": ["3", 0], "condition": ["5", 0]}}
    both["5"] = {"class_type": "Words", "inputs": {"text": "words"}}
    pair = kind([CONDITION], one="IMAGE", two="IMAGE", condition=CONDITION)
    template = Template(both, INFO | {"Words": kind([CONDITION], text="STRING"), "Pair": pair})
    assert {"1", "2", "7"} <= set(template.fill(CASE, ["a.png", "b.png"], "out"))
    with pytest.raises(ValueError, match="node 1 .*drawn without it"):
        template.fill(CASE, ["a.png"], "out")


def test_a_bypassed_node_hands_each_output_the_input_of_its_position():
    both = graph(_8={"positive": ["7", 0], "negative": ["7", 1]})
    both["7"] = {"class_type": "Both", "inputs": {"positive": ["5", 0], "negative": ["6", 0], "image": ["3", 0]}}
    control = kind([CONDITION, CONDITION], positive=CONDITION, negative=CONDITION, image="IMAGE")
    one = Template(both, INFO | {"Both": control}).fill(CASE, ["a.png"], "out")
    assert "7" not in one and one["8"]["inputs"]["positive"] == ["5", 0] and one["8"]["inputs"]["negative"] == ["6", 0]


def test_places_that_are_linked_or_missing():
    linked = graph(_8={"seed": ["10", 0]}, _5={"text": ["11", 0]})
    linked["10"] = {"class_type": "PrimitiveInt", "inputs": {"value": 1}}
    linked["11"] = {"class_type": "PrimitiveString", "inputs": {"value": "words"}}
    filled = Template(linked, INFO).fill(CASE, ["a.png", "b.png"], "out")
    assert filled["10"]["inputs"]["value"] == 77 and filled["11"]["inputs"]["value"] == "a toy"
    assert Template(graph(), INFO, "6").texts == [("6", "text")]
    for words, *wrong in (
        ("no seed", graph(_8={"seed": ["5", 0]}), INFO), ("positive", graph(_8={"positive": ["1", 0]}), INFO),
        ("expected one of", graph(), INFO, "99"),
        ("no Save Image", {key: node for key, node in graph().items() if key != "9"}, INFO),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            Template(*wrong)
    same = graph(_5={"text": "other"}, _1={"image": "other.png"}, _8={"seed": 6}, _9={"filename_prefix": "y"})
    assert Template(same, INFO).digest == Template(graph(), INFO).digest
    assert Template(graph(_9={"quality": 3}), INFO).digest != Template(graph(), INFO).digest


def png(path, name):
    paint(path)
    path.write_bytes(with_texts(path.read_bytes(), {"subject_benchmark": json.dumps({"name": name, "seed": 1})}))


def test_the_ledger_says_what_there_is(tmp_path):
    wanted = [Case(f"c{number}", Example("s", "p", ()), 0, 1) for number in range(6)]
    ledger = Ledger(tmp_path)
    for number in range(4):
        ledger.add({"name": f"c{number}", "status": "done", "picture": f"c{number}.png"})
    ledger.add({"name": "c4", "status": "failed", "error": "it rained"})
    for number in (0, 1, 5):  # 2 and 3 have lost theirs; 5 was killed before its line was written
        png(tmp_path / f"c{number}.png", f"c{number}")
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + b'{"name": "c9", "sta')
    again = Ledger(tmp_path)
    assert again.damaged == 1
    again.keep_done(wanted)
    assert sorted(again.lines) == ["c0", "c1", "c5"]
    assert [json.loads(line)["name"] for line in again.path.read_text().splitlines()] == ["c0", "c1", "c5"]
    for cut in range(0, len(whole), 7):  # a kill anywhere costs the last line at most
        ledger.path.write_bytes(whole[:cut])
        assert len(Ledger(tmp_path).lines) >= whole[:cut].count(b"\n")


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "..", "", "\0", "a" * 300, "\ud800", 7, None])
def test_a_ledger_names_pictures_of_its_own_folder_alone(tmp_path, name):
    (tmp_path / "outside.png").write_text("x")
    (tmp_path / "run").mkdir()
    ledger = Ledger(tmp_path / "run")
    ledger.lines = {"c0": {"name": "c0", "status": "done", "picture": name}}
    ledger.keep_done([Case("c0", Example("s", "p", ()), 0, 1)])
    assert ledger.lines == {}


def test_a_picture_says_which_case_it_shows(tmp_path):
    png(tmp_path / "a.png", "a")
    assert read_mark(tmp_path / "a.png") == {"name": "a", "seed": 1}
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    assert read_mark(tmp_path / "b.png") is None, "a copy under another name passed for another case"
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:-30])
    assert read_mark(tmp_path / "a.png") is None and read_mark(tmp_path / "gone.png") is None
    assert with_texts(data, {"subject_benchmark": "other"}) == data, "what the server wrote was replaced"
    for bad in (b"", b"text", data[:50]):
        with pytest.raises(ValueError, match="is no picture"):
            with_texts(bad, {})


def test_a_run_begun_by_0_1_0_is_continued(tmp_path):
    """Two pictures are done, one failed, the run was killed before the fourth's line, and while writing the next."""
    shutil.copytree(FIXTURES / "benchmark", tmp_path, dirs_exist_ok=True)
    out, found = tmp_path / "run", read_set(tmp_path / "set" / "list.json")
    before = {path.name: path.read_bytes() for path in out.glob("*.png")}
    facts = json.loads((out / "run.json").read_text())
    template = Template(json.loads((tmp_path / "workflow.json").read_text()), {})
    prompts, picture = [], (tmp_path / "set" / "cat" / "0.png").read_bytes()

    def post(path, body, kind):
        prompts.append(json.loads(body)["prompt"])
        return json.loads(body)

    def get(path):
        image = {"filename": "a.png", "type": "output"}
        return {} if path == "/queue" else {path.rsplit("/", 1)[1]: {"outputs": {"4": {"images": [image]}}}}

    always = dict(problem=lambda: "", upload=lambda path, name: name, fetch=lambda image: picture)
    client = SimpleNamespace(address="http://127.0.0.1:8188", id="id", post=post, get=get, **always)
    wanted = cases(found.items)
    result = Benchmark([client], template, out, root=found.root, facts=facts).run(wanted)
    assert result == {"pictures": 5, "made": 2, "failed": 0, "cases": 5} and not found.problems
    texts = [prompt["2"]["inputs"]["text"] for prompt in prompts]
    assert texts == ["a cat that fails", "a cat to come"], "a picture that was there was generated again"
    assert before == {name: (out / name).read_bytes() for name in before} and len(before) == 3
    entries = [json.loads(line) for line in (out / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {entry["name"] for entry in entries} == {case.name for case in wanted}
    assert [(entry["status"], entry["seed"]) for entry in entries[:2]] == [("done", case.seed) for case in wanted[:2]]
    assert json.loads((out / "run.json").read_text()) == facts
    [system] = read_systems([f"ours={out}"])
    assert as_json([system])["ours"]["azimuth"]["mean"] == pytest.approx((5 + 6 + 8) / 3)


def pose(*rows):
    pairs = [{"set": "outputs", "azimuth_difference": a, "polar_difference": p, "counted": c} for a, p, c in rows]
    pairs.append({"set": "floor", "azimuth_difference": 170, "polar_difference": 80, "counted": 1})
    return json.dumps({"orientation_model": "small", "threshold": 0.5, "figures": {}, "pairs": pairs})


def test_the_table_of_what_was_measured(tmp_path):
    run = tmp_path / "run" / "scores"
    run.mkdir(parents=True)
    (run / "a.json").write_text(pose((4, 1, 1), (12, 3, 1), (90, 50, 0)))
    (run / "a.csv").write_text("azimuth_difference,polar_difference\n1,1\n")  # the same report's table
    dino = {"figure": "DINO-I", "per_output": (0.5, 0.7), "backbone": {"name": "ViT-S/16", "file": "dino.safetensors"}}
    (run / "b.json").write_text(json.dumps({"figures": [dino, dino | {"figure": "DINO-I, references"}]}))
    (tmp_path / "run" / "ledger.jsonl").write_text('{"name": "x"}\n')
    (tmp_path / "plain.csv").write_text("picture,clip_t,CLIP-I\na,0.25,\nb,0.35,0.5\n")
    systems = read_systems([f"ours={tmp_path / 'run'}", str(tmp_path / "plain.csv")])
    found = as_json(systems)
    assert found["ours"]["azimuth"]["mean"] == 8 and found["ours"]["polar"]["mean"] == 2
    # 4 and 1 lie below every k; 12 and 3 below 15 and 20: (1 + 1/2) / 2
    assert found["ours"]["average_recall"]["mean"] == pytest.approx(0.75)
    # two values a distance of 0.2 apart: half width t(0.975, 1) * 0.1
    half = found["ours"]["DINO-I"]["high"] - found["ours"]["DINO-I"]["mean"]
    assert found["ours"]["DINO-I"]["mean"] == pytest.approx(0.6) and half == pytest.approx(1.27062, rel=1e-4)
    assert set(found["plain"]) == {"CLIP-T", "CLIP-I"} and found["plain"]["CLIP-I"]["low"] is None
    table = score_table(systems, paper=True)
    [row] = [line for line in table.splitlines() if line.startswith("| plain")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:5] == ["", "", "", ""] and cells[5] == "0.5000" and cells[6].startswith("0.3000 (")
    assert "2 of 3 pairs count" in table and "UNO, as published" in table and "small, threshold 0.5" in table


def test_scores_that_cannot_be_read(tmp_path):
    path = tmp_path / "s.jsonl"
    (tmp_path / "empty").mkdir()
    for text, words, source in (
        ('{"clip_i": "good"}', "expected a number", path), ('{"clip_i": 83.5}', "cosine", path),
        ('{"clip_i": NaN}', "expected a number", path), ('{"other": 1}', "no column", path),
        ('{"azimuth_difference": 200, "polar_difference": 1}', "from 0 to 180", path), ("[1]", "names", path),
        ("{", "cannot be read", path), ("", "no column", path),
        ("", "no score file", tmp_path / "empty"), ("", "no such", "nowhere"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ScoreError, match=words):
            read_systems([str(source)])


def test_a_figure_is_never_pooled_over_two_backbones(tmp_path):
    """An error names file, found, expected and way out; one report with both makes two rows."""

    def write(name, *rows):
        path = tmp_path / name
        path.write_text(rows[0] if isinstance(rows[0], str) else json.dumps({"figures": rows}))
        return path

    vit = {"name": "ViT-S/16", "file": "dino.safetensors"}
    text = {"name": "CLIP ViT-L/14", "file": "l.safetensors", "text": {"name": "CLIP text", "file": "l.safetensors"}}
    row = {"figure": "DINO-I", "per_output": [0.5, 0.7], "backbone": vit, "preprocessing": "centre 224"}
    said = row | {"figure": "CLIP-T", "backbone": text}
    first = write("first.json", row, said)
    others = {
        "file b.safetensors; expected file dino.safetensors": row | {"backbone": vit | {"file": "b.safetensors"}},
        "name ViT-B/16; expected name ViT-S/16": row | {"backbone": vit | {"name": "ViT-B/16"}},
        "preprocessing centre 518; expected preprocessing centre 224": row | {"preprocessing": "centre 518"},
        "text file g.safetensors; expected text file l.safetensors":
            said | {"backbone": text | {"text": text["text"] | {"file": "g.safetensors"}}},
        "name not recorded, file not recorded, preprocessing not recorded; expected name ViT-S/16": "dino_i\n0.6\n",
    }  # fmt: skip
    for number, (words, content) in enumerate(others.items()):
        other = write(f"{number}.csv" if isinstance(content, str) else f"{number}.json", content)
        with pytest.raises(ScoreError, match="do not compare") as caught:
            read_systems([f"x={first}", f"x={other}"])
        assert all(part in str(caught.value) for part in (words, str(other), str(first), "NAME=PATH")), caught.value
        assert [system.name for system in read_systems([f"x={first}", f"y={other}"])] == ["x", "y"]

    wide = row | {"per_output": [0.1], "backbone": {"name": "ViT-B/16", "file": None}}
    run = tmp_path / "run" / "scores"
    run.mkdir(parents=True)
    for name in "ab":
        (run / f"{name}.json").write_text(json.dumps({"figures": [row, wide, said]}))
    systems = read_systems([f"ours={tmp_path / 'run'}"])
    found = {name: {key: value["mean"] for key, value in row.items()} for name, row in as_json(systems).items()}
    ours = {"DINO-I": pytest.approx(0.6), "CLIP-T": pytest.approx(0.6)}
    assert found == {"ours": ours, "ours, by ViT-B/16": {"DINO-I": pytest.approx(0.1)}}
    assert [len(system.identity["DINO-I"]) for system in systems] == [4, 2]
    table = score_table(systems)
    by = "DINO-I by ViT-S/16, dino.safetensors; CLIP-T by CLIP ViT-L/14, l.safetensors, text by CLIP text"
    assert f"ours: {by}" in table and "ours, by ViT-B/16: DINO-I by ViT-B/16." in table

    lines = write("own.csv", "DINO-I,backbone\n0.2,ViT-S/16\n0.4,ViT-S/16\n0.9,ViT-B/16\n")
    found = {name: row["DINO-I"]["mean"] for name, row in as_json(read_systems([f"own={lines}"])).items()}
    assert found == {"own": pytest.approx(0.3), "own, by ViT-B/16": 0.9}


def test_angles_are_never_pooled_over_two_orientation_models(tmp_path):
    (tmp_path / "a.json").write_text(pose((4, 1, 1)))
    (tmp_path / "b.json").write_text(pose((9, 2, 1)).replace("small", "large"))
    with pytest.raises(ScoreError, match="orientation model large; expected orientation model small"):
        read_systems([f"x={tmp_path / 'a.json'}", f"x={tmp_path / 'b.json'}"])
    assert len(read_systems([f"x={tmp_path / 'a.json'}", f"y={tmp_path / 'b.json'}"])) == 2


def test_the_address_of_0_1_0():
    """`python -m evaluation` from the pack's folder; elsewhere it is `python tools/benchmark`."""
    command = [sys.executable, "-m", "evaluation", "score", f"ours={FIXTURES / 'benchmark' / 'run'}", "--paper"]
    done = subprocess.run(command, cwd=FIXTURES.parents[2], text=True, capture_output=True)
    assert done.returncode == 0 and json.loads(done.stdout)["ours"]["azimuth"]["mean"] == 19 / 3, done.stderr
    assert "3 of 3 pairs count" in done.stderr and "| UNO, as published" in done.stderr
