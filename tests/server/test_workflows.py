"""Every shared workflow, in the host's real front end in Chromium, and through the queue to a picture or a trained DLA,
on small models; of DreamO's nodes there are stand-ins, which show that its workflow is wired right, and no more."""

import io
import json
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from subject_dla.dla import load_dla
from subject_dla.tests.small import editor
from subject_dla.tests.small.editor import LOAD, build_models, chromium, open_editor
from subject_dla.tests.small.editor_graphs import GRAPHS, NOT_BEFORE_1_49
from subject_dla.tests.small.prompts import key_of, make_node, of_type, run, shrink
from subject_dla.tools.comfy_client import editor_graph, workflow
from subject_dla.tools.comfy_client.server import ROOT
from subject_dla.tools.comfy_client.shipped import TITLES
from subject_dla.tools.perf.batch import FORMS, SUBJECT, changes
from subject_dla.tools.perf.batch import graph as batch_graph

WORKFLOWS = list(TITLES)
FIRST_SHIPPED = sorted((ROOT / "tests" / "fixtures").glob("*/workflows/*.json"))  # never edited
FIRST_BLUEPRINTS = sorted((ROOT / "tests" / "fixtures").glob("*/subgraphs/*.json"))
QWEN_IMAGE_21, CACHE_21 = "qwen_image_2_1_staged", "QwenImage21Cache"
LONG = ("system_qwen_image_edit", "train_dla_klein")  # to run; `nox -s browser` does
DREAMO = Path(__file__).with_name("dreamo")  # stand-ins, see there
TEMPLATES = Path(find_spec("comfyui_workflow_templates_json").origin).with_name("templates")
# Of the front end's own: with bypassed and nested subgraphs, reroutes, primitives, widgets shown outside.
OFFICIAL = [
    "basic_mask_operations_and_compositing", "flux1_dev_uso_reference_image_gen", "flux_depth_lora_example",
    "flux_kontext_dev_basic", "flux_redux_model_example", "hidream_e1_1", "image-qwen_image_edit_2511_lora_inflation",
    "image_chroma1_radiance_text_to_image", "image_flux2_klein_image_edit_4b_distilled", "image_netayume_lumina_t2i",
    "image_omnigen2_image_edit", "image_qwen_image_edit_2509_relight", "image_qwen_image_edit_2511",
    "image_qwen_image_instantx_inpainting_controlnet", "image_z_image_turbo_fun_union_controlnet",
    "sdxl_simple_example", "templates-1_click_multiple_scene_angles-v1.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def small_server(comfyui, tmp_path_factory):
    models = build_models(comfyui, tmp_path_factory.mktemp("small-models"))
    with editor.small_server(comfyui, tmp_path_factory.mktemp("small-host"), models) as server:
        yield server


@pytest.fixture(scope="module")
def page(small_server):
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        open_editor(page, small_server.address)
        yield page


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow(small_server, page, name, pytestconfig):
    saved = workflow.read(name)
    models = small_server.client.object_info()["UNETLoader"]["input"]["required"]["unet_name"][0]
    if name == "train_dla_klein" and saved["nodes"][0]["widgets_values"][0] not in models:
        pytest.skip("not on this host: FLUX.2")
    shown = page.evaluate(LOAD, saved)
    assert shown["count"] == len(saved["nodes"])
    if name == QWEN_IMAGE_21 and CACHE_21 not in small_server.client.object_info():
        assert shown["missing"] == [CACHE_21] and not shown["unlinked"], shown
        details = page.get_by_role("button", name="View details")  # of a newer editor
        details.or_(page.get_by_text(CACHE_21)).first.wait_for()
        if details.is_visible():
            details.click()
        page.get_by_text(CACHE_21).first.wait_for()  # the editor says which it lacks
        pytest.skip("not on this host: Qwen-Image 2.1")
    assert not shown["missing"] and not shown["broken"] and not shown["unlinked"], shown

    info = small_server.client.object_info()
    ours, theirs = workflow.to_api(saved, info), shown["output"]
    for node in theirs.values():  # the editor's own widgets, such as the text on Preview Any, are no inputs
        known = {name for group in info[node["class_type"]]["input"].values() for name in group}
        node["inputs"] = {name: value for name, value in node["inputs"].items() if name in known}
    ours, shown = ({k: (n["class_type"], n["inputs"]) for k, n in prompt.items()} for prompt in (ours, theirs))
    assert ours == shown

    if name not in LONG or pytestconfig.getoption("--long"):
        check_result(small_server, theirs, name)


def check_result(small_server, prompt, name):
    """Runs it, small: pictures of the right size that show something, or a DLA, a LoRA and a report."""
    shrink(prompt)
    outputs = run(small_server, prompt)
    images = [image for output in outputs.values() for image in output.get("images", [])]
    trained = [node["inputs"]["name"] for node in prompt.values() if node["class_type"] == "SubjectTrainDLA"]
    assert trained or any(image["type"] == "output" for image in images)
    for image in images:
        picture = Image.open(io.BytesIO(small_server.client.fetch(image))).convert("RGB")
        small = image["type"] == "output" and "sheet" not in image["filename"]
        side = (160, 96) if name == QWEN_IMAGE_21 else (128, 128)  # of the first reference's form
        assert picture.size == side if small else min(picture.size) > 128
        assert len(picture.getcolors(2**24)) > 100
    for dla in trained:
        models = small_server.base / "models"
        assert load_dla(models / "dla" / f"{dla}.safetensors").config.provenance["steps"] == 4
        with safe_open(models / "loras" / f"{dla}.safetensors", framework="pt") as lora:
            assert any("double_blocks" in key for key in lora.keys())
        assert any(dla in text for output in outputs.values() for text in output.get("text", [])), "no report is shown"
        assert len(images) >= 4


def test_graphs_are_queued_as_the_front_end_queues_them(small_server, page):
    """Only what an output node needs: up to some version after 1.32, it lists what is in a bypassed subgraph too."""
    info = small_server.client.object_info()
    old = tuple(map(int, version("comfyui-frontend-package").split(".")[:2])) < (1, 49)
    graphs = {name: graph for name, graph in GRAPHS.items() if not (old and name in NOT_BEFORE_1_49)}
    graphs |= {name: workflow.read(TEMPLATES / f"{name}.json") for name in OFFICIAL}
    compared = 0
    for name, graph in graphs.items():
        theirs = page.evaluate(LOAD, graph)["output"]
        unknown = {key for key, node in theirs.items() if node.get("class_type") not in info}
        if unknown:
            with pytest.raises(workflow.WorkflowFileError) as error:
                workflow.to_api(graph, info)
            assert (any if old else all)(f"(node {key})" in str(error.value) for key in unknown), name
            continue
        compared += 1
        assert needed(workflow.to_api(graph, info), info) == needed(theirs, info), name
    assert compared > len(graphs) - 5


def needed(prompt, info):
    """Of the nodes that the output nodes need, the class and the inputs that the server knows."""
    wanted, found = [key for key, node in prompt.items() if info[node["class_type"]]["output_node"]], {}
    while wanted:
        if (key := wanted.pop()) in found:
            continue
        kind, inputs = prompt[key]["class_type"], prompt[key]["inputs"]
        known = {name for group in info[kind]["input"].values() for name in group}
        found[key] = kind, {name: value for name, value in inputs.items() if name.split(".")[0] in known}
        wanted += [value[0] for value in inputs.values() if isinstance(value, list)]
    return found


@pytest.mark.parametrize("path", FIRST_SHIPPED, ids=lambda path: f"{path.parts[-3]} {path.stem}")
def test_workflows_as_first_shipped_run(small_server, path):
    """Every node, input, choice and link saved then is one that the server has now; with nodes of ours it runs."""
    info = small_server.client.object_info()
    saved = workflow.read(path)
    models = info["UNETLoader"]["input"]["required"]["unet_name"][0]
    if path.stem == "train_dla_klein" and saved["nodes"][0]["widgets_values"][0] not in models:
        pytest.skip("not on this host: FLUX.2")
    if path.stem == QWEN_IMAGE_21 and CACHE_21 not in info:
        pytest.skip("not on this host: Qwen-Image 2.1")
    prompt = workflow.to_api(saved, info)
    for key, node in prompt.items():
        known = info[node["class_type"]]["input"]
        specs = {name: spec for group in ("required", "optional") for name, spec in known.get(group, {}).items()}
        assert set(known.get("required", {})) <= set(node["inputs"]) <= set(specs), (key, node["class_type"])
        for name, value in node["inputs"].items():
            kind, options = specs[name][0], specs[name][1] if len(specs[name]) > 1 else {}
            choices = kind if isinstance(kind, list) else options.get("options", ())
            if isinstance(value, list):
                made = info[prompt[value[0]]["class_type"]]["output"][value[1]]
                assert isinstance(kind, list) or made == kind or "*" in (made, kind), (key, name, made)
            elif choices and not options.get("image_upload"):
                assert value in choices, (key, name)
    if any(node["class_type"].startswith("Subject") for node in prompt.values()):  # else nothing of it is ours
        check_result(small_server, prompt, path.stem)


@pytest.mark.parametrize("path", FIRST_BLUEPRINTS, ids=lambda path: f"{path.parts[-3]} {path.stem}")
def test_blueprints_as_first_shipped_have_their_nodes(small_server, path):
    """A workflow that holds one has its nodes inside: types, inputs and outputs are those of now."""
    info = small_server.client.object_info()
    (graph,) = json.loads(path.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    for node in graph["nodes"]:
        known = info[node["type"]]
        names = {name for group in known["input"].values() for name in group}
        assert {item["name"] for item in node["inputs"]} <= names | {"value"}, node["type"]
        assert [item["type"] for item in node["outputs"]] == known["output"], node["type"]


def test_staging_by_one_node_adds_two_nodes_at_most(small_server):
    """Three of the stock graph's nodes become three of ours; the demo and the benchmark find its prompt."""
    names = "system_qwen_image_edit", "qwen_image_edit_one_node"
    stock, ours = map(workflow.read, names)
    assert len(ours["nodes"]) <= len(stock["nodes"]) + 2 and len(ours["links"]) <= len(stock["links"]) + 2
    added = {node["type"] for node in ours["nodes"]} - {node["type"] for node in stock["nodes"]}
    assert added == {"SubjectMLLMFromCLIP", "SubjectConditioning", "SubjectApplyStages"}
    prompt = workflow.to_api(ours, small_server.client.object_info())
    assert workflow.text_inputs(prompt) == [(key_of(prompt, "SubjectConditioning"), "prompt")]


def test_a_further_prompt_moves_models_as_seldom_as_with_the_hosts_nodes(small_server):
    """Each change of the model is a move where memory holds one at a time. Ours reads a reference with the VAE once;
    the host's edit node does for each prompt, so that the stock graph here has a Reference Latent."""
    small_server.client.upload(SUBJECT, "subject.jpg")
    found = {}
    for form in FORMS:
        for number in range(2):
            before = len(small_server.client.get("/loads"))
            run(small_server, batch_graph(form, f"the subject, number {number}", number))
        found[form] = changes(small_server.client.get("/loads")[before:])
    reads_again = "--cache-none" in os.environ.get("HOST_FLAGS", "")  # the VAE's for the second prompt
    assert found["ours"] <= found["stock"] == (4 if reads_again else 3), found


def test_qwen_image_2_1_staged_is_the_stock_graph_with_a_node_more(small_server):
    """With `both` its picture is that of the host's own encode node, bit for bit; with other presets another."""
    info = small_server.client.object_info()
    if CACHE_21 not in info:
        pytest.skip("not on this host: Qwen-Image 2.1")
    prompt = workflow.to_api(workflow.read(QWEN_IMAGE_21), info)
    shrink(prompt)
    encode, stages = key_of(prompt, "SubjectEncodeQwenImage21"), key_of(prompt, "SubjectApplyStages")
    assert workflow.text_inputs(prompt) == [(encode, "prompt")]

    def picture(preset: str = "", device: str = "auto"):
        new = {key: {**node, "inputs": dict(node["inputs"])} for key, node in prompt.items()}
        of_type(new, CACHE_21)["device"] = device
        of_type(new, "SubjectApplyStages")["preset"] = preset
        if not preset:
            given = new[encode]["inputs"]
            images = {f"images.{name}" if name.startswith("image_") else name: value for name, value in given.items()}
            new[encode] = make_node("TextEncodeQwenImage21", **images)
            of_type(new, "KSampler")["model"] = new.pop(stages)["inputs"]["model"]
        (image,) = run(small_server, new)[key_of(new, "SaveImage")]["images"]
        return Image.open(io.BytesIO(small_server.client.fetch(image))).tobytes()

    stock = picture()
    assert picture("both") == picture("both", "off") == stock
    others = {name: picture(name) for name in ("semantics_first", "mllm_only", "vae_only", "two_stage")}
    assert len({stock, *others.values()}) == 5


def test_threshold_sweep_with_its_figures(small_server, page):
    """The two nodes that are muted until the orientation model's file is there."""
    saved = workflow.read("threshold_sweep")
    muted = [node["type"] for node in saved["nodes"] if node["mode"] == editor_graph.MUTED]
    assert muted == ["SubjectLoadOrientation", "SubjectCopyPasteReport"]
    for node in saved["nodes"]:
        node["mode"] = editor_graph.ALWAYS
    prompt = page.evaluate(LOAD, saved)["output"]
    shrink(prompt)
    of_type(prompt, "SubjectLoadOrientation")["orientation"] = "small.safetensors"
    of_type(prompt, "SubjectCopyPasteReport")["min_confidence"] = 0.0
    prompt["100"] = make_node("PreviewAny", source=of_type(prompt, "SubjectContactSheet")["figures"])
    outputs = run(small_server, prompt)
    shown = outputs["100"]["text"]
    assert len(shown) == 6, shown  # two controls, four thresholds
    assert all(text.startswith("azimuth ") for text in shown), shown
    assert "azimuth" in outputs[key_of(prompt, "SubjectCopyPasteReport")]["text"][0]
    assert outputs[key_of(prompt, "SaveImage")]["images"]


def test_many_prompts_name_their_files_and_are_on_one_sheet(small_server):
    """Number and first words of each prompt, in its script; the sheet has a place for each."""
    prompt = workflow.to_api(workflow.read("batch_prompts"), small_server.client.object_info())
    shrink(prompt)
    lines = [
        "The subject on a rock, seen from behind.",
        "雨夜橱窗里的主体，玻璃上有雨滴，霓虹灯倒映在湿漉漉的街道上",
        "# none",
    ]
    of_type(prompt, "SubjectPromptList")["prompts"] = "\n".join([*lines, "The subject on a chessboard"])
    outputs = run(small_server, prompt)
    saved = {key: outputs[key]["images"] for key, node in prompt.items() if node["class_type"] == "SaveImage"}
    pictures, (sheet,) = sorted(saved.values(), key=len, reverse=True)
    names = [image["filename"].rsplit("_", 2)[0] for image in pictures]
    assert names == [
        "01-the-subject-on-a-rock-seen-from-behind",
        "02-雨夜橱窗里的主体-玻璃上有雨滴-霓虹灯倒映在湿漉漉的街道上",
        "03-the-subject-on-a-chessboard",
    ]
    assert {image["subfolder"] for image in (*pictures, sheet)} == {"subject/batch"}
    with Image.open(io.BytesIO(small_server.client.fetch(sheet))) as shown:
        assert min(shown.size) > 600


def test_stand_ins_are_as_published(small_server):
    """The host tells of them what it would tell of the pack itself, and no workflow but DreamO's needs them."""
    info = small_server.client.object_info()
    published = json.loads((DREAMO / "object_info.json").read_text(encoding="utf-8"))
    assert "ComfyUI-DreamO" in published["source"]
    for name, expected in published["nodes"].items():
        assert {key: info[name][key] for key in expected} == expected
    kinds = {name: {node["type"] for node in workflow.read(name)["nodes"]} for name in WORKFLOWS}
    assert [name for name, used in kinds.items() if used & set(published["nodes"])] == ["system_dreamo"]
