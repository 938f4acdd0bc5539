"""The nodes as the host sees them. Saved workflows hold their ids, input names and output positions: these stay."""

import asyncio
import inspect
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import folder_paths
import pytest
from subject_dla.nodes import SubjectExtension
from subject_dla.nodes.files import missing
from subject_dla.training import inputs

NODES = {node.__name__: node for node in asyncio.run(SubjectExtension().get_node_list())}

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "0.1.0"
PUBLISHED = json.loads((FIXTURES / "object_info.json").read_text(encoding="utf-8"))
# id: (inputs, output types), all of 0.1.0's; what comes later is added here, new inputs at the end and optional
FROZEN = {name: (" ".join(node["inputs"]), " ".join(node["output"])) for name, node in PUBLISHED.items()}
FROZEN |= {  # in the schema, optional inputs may stand between the others
    "SubjectEncode": (
        "mllm prompt image_1 image_2 image_3 image_4 image_5 dla image_size tiles system_prompt", "MLLM_FEATURES"),
    "SubjectAggregateLayers": ("features dla template vit_blend pooled_from", "CONDITIONING"),
    "SubjectAddIdentity": ("conditioning model vae image mask strength size placement region stages", "CONDITIONING"),
    "SubjectConditioning": (
        "model vae mllm prompt negative_prompt image_1 image_2 image_3 image_4 image_5 mask_1 mask_2 mask_3 mask_4"
        " mask_5 region_1 region_2 region_3 region_4 region_5 dla pooled_from width height batch_size strength size"
        " placement encode_negative",
        "CONDITIONING CONDITIONING LATENT"),
    "SubjectPromptList": ("prompts prefix", "STRING STRING"),
    "SubjectStagedSampler": (
        "model positive latent_image stages negative seed steps cfg sampler_name scheduler denoise", "LATENT"),
    "SubjectApplyStages": ("model preset clock tau1 tau2 stages sigmas", "MODEL"),  # later than 0.1.0
    "SubjectEncodeQwenImage21": (
        "clip vae prompt negative_prompt image_1 image_2 image_3 image_4 image_5 resolution",
        "CONDITIONING CONDITIONING LATENT"),
    "SubjectImageGuidance": ("model image_guidance", "MODEL"),
    "SubjectOrientation": ("orientation_model image mask min_confidence", "IMAGE STRING FLOAT FLOAT FLOAT FLOAT"),
}  # fmt: skip
PAGES = Path(__file__).resolve().parents[2] / "web" / "docs"


def test_the_ids_inputs_and_outputs_of_saved_workflows_are_still_there():
    found = {}
    for name, node in NODES.items():
        schema = node.define_schema()
        found[schema.node_id] = (" ".join(i.id for i in schema.inputs), " ".join(o.io_type for o in schema.outputs))
        assert schema.node_id == name
    assert found == FROZEN


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_0_1_0_published_is_still_accepted(name):
    """Kinds, types, defaults, ranges and choices of inputs, and positions of outputs; more of either may have come."""
    then, now = PUBLISHED[name], NODES[name].GET_NODE_INFO_V1()
    for key in ("output", "output_name", "output_is_list"):
        assert now[key][: len(then[key])] == then[key], key
    assert now["output_node"] == then["output_node"]
    kinds = ("required", "optional")
    found = {key: (kind, *spec) for kind in kinds for key, spec in now["input"].get(kind, {}).items()}
    for key, expected in then["inputs"].items():
        kind, type_, *options = found.pop(key)
        options = options[0] if options else {}
        assert kind == expected["kind"] or kind == "optional", key
        assert type_ == expected["type"] and options.get("default") == expected.get("default"), key
        assert set(options.get("options", ())) >= set(expected.get("options", ())), key
        assert options.get("min", 0) <= expected.get("min", 0) and options.get("max", 0) >= expected.get("max", 0), key
    assert all(kind == "optional" for kind, *_ in found.values()), "an old workflow has no value for it"


@pytest.mark.parametrize("name", FROZEN)
def test_the_schema_says_what_everything_is_and_execute_takes_it(name):
    node = NODES[name]
    schema = node.GET_SCHEMA()  # validates, on every host
    assert not {i.id for i in schema.inputs} & {o.id for o in schema.outputs}  # an error up to 0.3.75, unseen later
    info = node.GET_NODE_INFO_V1()
    assert info["category"].split("/")[0] == "subject" and info["display_name"] and info["description"]
    assert all(info["output_tooltips"])
    for kind in ("required", "optional"):
        for key, (type_, options) in info["input"].get(kind, {}).items():
            assert options.get("tooltip"), f"{name}.{key} has no tooltip"
            if "default" in options and type_ in ("INT", "FLOAT"):
                assert options["min"] <= options["default"] <= options["max"], f"{name}.{key}"
            if "default" in options and type_ == "COMBO":
                assert options["default"] in options["options"], f"{name}.{key}"
    parameters = inspect.signature(node.execute).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for input_ in node.define_schema().inputs:
        assert takes_any or input_.id in parameters, f"{name}.execute lacks {input_.id}"
        if input_.optional and input_.id in parameters:
            assert parameters[input_.id].default is not inspect.Parameter.empty, f"{name}.{input_.id}"
    named = {name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    assert named <= {i.id for i in node.define_schema().inputs}


def test_every_node_has_a_help_page_of_two_screens_at_most_in_both_languages():
    assert (
        {page.stem for page in PAGES.glob("*.md")}
        == {page.parent.name for page in PAGES.glob("*/zh.md")}
        == set(FROZEN)
    )
    links = re.compile(r"\]\((?!https?://)([^)]+)\)")
    for page in (*PAGES.glob("*.md"), *PAGES.glob("*/zh.md")):
        text = page.read_text(encoding="utf-8")
        assert len(text) < 6000, f"{page}: what is longer belongs into docs/"
        shown = links.findall(text)  # the editor looks from web/docs on, for pages of other languages, too
        assert shown and all((PAGES / name).is_file() for name in shown), page


def test_a_vanished_file_is_named_with_what_is_there_instead(tmp_path, monkeypatch):
    (tmp_path / "there.safetensors").write_bytes(b"0")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "dla", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})  # of a folder that is not there later
    assert missing("dla", "there.safetensors") is None
    problem = missing("dla", "gone.safetensors")
    assert "gone.safetensors" in problem and "there.safetensors" in problem and "models/dla" in problem
    before = NODES["SubjectLoadDLA"].fingerprint_inputs(dla="there.safetensors")
    (tmp_path / "there.safetensors").write_bytes(b"01")
    assert NODES["SubjectLoadDLA"].fingerprint_inputs(dla="there.safetensors") != before


def test_training_data_are_offered_and_taken_from_the_input_folder_alone(tmp_path, monkeypatch):
    root = tmp_path / "input"
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(root))
    for name in ("cats/tom/1.jpg", "cats/tom/1.txt", "uno/list.json", "uno/images/a.jpg", ".hidden/b.json", "c.jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("[]")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "1.txt").write_text("a cat")
    (root / "empty").mkdir()
    combo = next(i for i in NODES["SubjectTrainDLA"].define_schema().inputs if i.id == "data")
    assert combo.options == ["c.jsonl", "cats", "uno/list.json"]  # of folders: with captions alone
    settings = {"name": "run", "stage": "1: MLLM tokens", "steps": 3, "lora_rank": 0, "seed": 0}
    check = NODES["SubjectTrainDLA"].validate_inputs
    assert check(data="cats", **settings) is True and check(data="uno/list.json", **settings) is True
    assert check(data=None, **settings | {"name": None, "seed": None}) is True  # linked: known later
    assert check(data="cats", **settings | {"lora_rank": None}, options='run.start_lora = "mine.safetensors"') is True
    with pytest.raises(ValueError, match="run.name is ''"):
        check(data="cats", **settings | {"name": ""})
    for outside in ("../outside", str(tmp_path / "outside"), "cats/tom", ""):
        with pytest.raises(ValueError, match="input folder.*cats"):
            check(data=outside, **settings)
    for bare in ("empty", "uno"):
        with pytest.raises(ValueError, match=f"{bare}.*no captions"):
            check(data=bare, **settings)


@pytest.mark.parametrize("files, offered", [
    (["a/1.jpg", "a/1.txt"], True), (["a/1.JPG", "a/1.txt"], True), (["1.png", "1.txt"], True), (["s-0.tar"], True),
    (["a/1.jpg", "a/2.txt"], False), (["a/1.jpg", "1.txt"], False), (["a/b/1.jpg", "a/b/1.txt"], False),
    ([".a/1.jpg", ".a/1.txt"], False), (["readme.txt"], False),
])  # fmt: skip
def test_folders_are_offered_where_a_picture_has_a_caption(tmp_path, monkeypatch, files, offered):
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    for name in files:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    assert ("data" in inputs.list_sources()) is offered
    if not offered:  # found once its caption is written
        (tmp_path / "data" / "0.webp").touch()
        (tmp_path / "data" / "0.txt").touch()
        os.utime(tmp_path / "data", (1, 1))  # later than one tick of the file system's clock
        assert "data" in inputs.list_sources()


def test_an_offer_reads_some_names_and_a_choice_all(tmp_path, monkeypatch):
    """Folders of more names than are read: offered where captions may come, and judged when chosen."""
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    (tmp_path / "data").mkdir()
    for number in range(8):
        (tmp_path / "data" / f"{number}.jpg").touch()
    look = inputs.os.scandir
    read = []

    @contextmanager
    def counted(folder):
        with look(folder) as entries:
            yield (read.append(entry.name) or entry for entry in sorted(entries, key=lambda entry: entry.name))

    monkeypatch.setattr(inputs.os, "scandir", counted)
    assert not inputs._trains(tmp_path / "data", 4) and read == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert not inputs._trains(tmp_path / "data", 4) and len(read) == 4  # nothing changed
    (tmp_path / "data" / "7.txt").touch()
    os.utime(tmp_path / "data", (1, 1))
    assert not inputs._trains(tmp_path / "data", 4) and inputs.find_source("data") == tmp_path / "data"
    (tmp_path / "data" / "1.txt").touch()
    os.utime(tmp_path / "data", (2, 2))
    assert inputs._trains(tmp_path / "data", 4)


def test_keyframes_chain_and_a_mixed_clock_is_refused():
    keyframe = NODES["SubjectStageKeyframe"].execute
    (first,) = keyframe(1.0, 1.0, 0.0, "hold", "flow_time").result
    (both,) = keyframe(0.9, 1.0, 0.5, "linear", "flow_time", first).result
    assert [(k.start, k.reference) for k in both.keyframes] == [(1.0, 0.0), (0.9, 0.5)]
    assert both.clock.name == "flow_time"
    with pytest.raises(ValueError, match="steps.*flow_time"):
        keyframe(0.5, 1.0, 1.0, "hold", "steps", first)


@pytest.mark.parametrize("name", ["SubjectAddIdentity", "SubjectConditioning"])
def test_the_choices_of_placement_stay(name):
    placement = next(i for i in NODES[name].define_schema().inputs if i.id == "placement")
    expected = {"auto", "UNO, USO", "Kontext", "Qwen-Image-Edit 2511", "uxo", "offset", "index", "index_timestep_zero"}
    assert set(placement.options) == expected and len(placement.options) == len(expected)


def test_prompt_list_keeps_lines_with_text():
    prompts, _ = NODES["SubjectPromptList"].execute("a cat \n\n# not this\n a dog").result
    assert prompts == ["a cat", "a dog"]
    with pytest.raises(ValueError, match="one prompt per line"):
        NODES["SubjectPromptList"].execute("\n # only a remark")
    with pytest.raises(ValueError, match="prompts has 500000 lines with text, expected at most 10000"):
        NODES["SubjectPromptList"].execute("a\n" * 500_000)


def test_file_names_have_number_and_words_of_the_prompt():
    prompts = {
        "A duck, on sand: 'seen' from/the\\right and from the left": "01-a-duck-on-sand-seen-from-the-right-and",
        "岩石上的鸭子，黄昏": "02-岩石上的鸭子-黄昏",
        "काली बिल्ली": "03-काली-बिल्ली",
        "%year%?": "04-year",
        "字" * 50: "05-" + "字" * 40,
        "...": "06",
    }
    _, names = NODES["SubjectPromptList"].execute("\n".join(prompts), "toys/").result
    assert names == [f"toys/{name}" for name in prompts.values()]


@pytest.mark.parametrize(
    "word", ["reference", "ipadapter", "consistent character", "face", "kontext", "uno", "pulid", "multi subject"]
)
def test_words_that_users_search_for_find_add_identity(word):
    """Hosts without aliases search names: there `words` are in them (tests/browser types them)."""
    shown = NODES["SubjectAddIdentity"].define_schema()
    if not hasattr(shown, "search_aliases"):
        names = " ".join(node.define_schema().display_name for node in NODES.values()).lower()
        assert word in names or word in ("ipadapter", "kontext", "pulid")
    else:
        assert word in shown.search_aliases
