"""Editor workflows to the queue's format; tests/server/test_workflows.py compares with the real front end's."""

import pytest
from subject_dla.tests.small.editor_graphs import GRAPHS, controlled, node, stock, subgraph, workflow
from subject_dla.tools.comfy_client.workflow import WorkflowFileError, editor_graph, put_in, to_api


def kind(output, **required):
    specs = {name: spec if isinstance(spec, tuple) else (spec,) for name, spec in required.items()}
    return {"input": {"required": specs}, "output": output}


MODEL, CLIP, LATENT, IMAGE, CONDITION = "MODEL", "CLIP", "LATENT", "IMAGE", "CONDITIONING"
BOTH = {"positive": CONDITION, "negative": CONDITION}
INFO = {
    "CheckpointLoaderSimple": kind([MODEL, CLIP, "VAE"], ckpt_name=["a.safetensors"]),
    "ControlNetLoader": kind(["CONTROL_NET"], control_net_name=["c.safetensors"]),
    "CLIPTextEncode": kind([CONDITION], text="STRING", clip=CLIP),
    "LoadImage": kind([IMAGE, "MASK"], image=(["a.png"], {"image_upload": True})),
    "EmptyLatentImage": kind([LATENT], width="INT", height="INT", batch_size="INT"),
    "KSampler": kind(
        [LATENT], model=MODEL, seed=("INT", {"control_after_generate": True}), steps="INT", cfg="FLOAT",
        sampler_name=["euler"], scheduler=["simple"], **BOTH, latent_image=LATENT, denoise="FLOAT",
    ),
    "LoraLoader": kind([MODEL, CLIP], model=MODEL, clip=CLIP, lora_name=["l"], strength_model="FLOAT"),
    "ControlNetApplyAdvanced": kind(
        [CONDITION, CONDITION], **BOTH, control_net="CONTROL_NET", image=IMAGE, strength="FLOAT", start="FLOAT",
    ),
    "VAEDecode": kind([IMAGE], samples=LATENT, vae="VAE"),
    "SaveImage": kind([], images=IMAGE, filename_prefix="STRING"),
}  # fmt: skip
STOCK = GRAPHS["stock"]
SAMPLED = {"seed": 7, "steps": 4, "cfg": 1.5, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
SAMPLED |= {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}


def prompt(name):
    return {key: node["inputs"] for key, node in to_api(GRAPHS[name], INFO).items()}


def test_widgets_and_links():
    made = to_api(STOCK, INFO)
    assert made["5"]["inputs"] == SAMPLED and made["7"]["inputs"] == {"images": ["6", 0], "filename_prefix": "x"}
    assert (made["2"]["class_type"], made["2"]["_meta"]["title"]) == ("CLIPTextEncode", "Positive")
    assert to_api(made, INFO) is made
    label = workflow(stock({10: node("LabelOfAnotherPack", values=["words"])}))
    assert prompt("for the editor") == prompt("stock") and to_api(label, INFO) == made


@pytest.mark.parametrize("name", ["bypassed", "bypassed, of another pack", "reroutes", "bypassed behind a reroute"])
def test_what_is_passed_through(name):
    made = prompt(name)
    assert made | prompt("stock") == made
    assert set(made) - set(prompt("stock")) == ({"10", "11"} if "reroute" not in name else set()), "loaders"


@pytest.mark.parametrize("name", ["muted", "muted, of another pack"])
def test_muted_nodes_are_left_out(name):
    made = prompt(name)
    assert "12" not in made and made["5"] == {k: v for k, v in SAMPLED.items() if k not in BOTH}


def test_primitives_write_their_value():
    made = prompt("primitive")
    assert made["5"] == SAMPLED | {"seed": 5} and made["4"] == {"width": 48, "height": 48, "batch_size": 1}
    assert set(made) == set(prompt("stock"))


@pytest.mark.parametrize(
    "name, inside, texts",
    [
        ("subgraph", "10", ("inner words", "inner ugly")),
        ("subgraph with a text", "10", ("outer words", "inner ugly")),
        ("subgraph with a text inside", "10", ("outer words", "outer ugly")),
        ("nested", "10:30", ("middle words", "inner ugly")),
        ("nested with a text", "10:30", ("outer words", "inner ugly")),
    ],
)
def test_subgraphs_are_expanded(name, inside, texts):
    made = prompt(name)
    encoders = {f"{inside}:21": texts[0], f"{inside}:20": texts[1]}
    assert {key: made.pop(key) for key in encoders} == {k: {"text": v, "clip": ["1", 1]} for k, v in encoders.items()}
    assert made["5"] == SAMPLED | {"positive": [f"{inside}:21", 0], "negative": [f"{inside}:20", 0]}
    assert set(made) == {"1", "4", "5", "6", "7"}


def test_subgraphs_that_do_not_run():
    assert prompt("subgraph of a latent")["6"]["samples"] == ["10:21", 0]
    assert prompt("subgraph of a latent")["10:21"]["latent_image"] == ["5", 0]
    assert prompt("subgraph bypassed") == prompt("stock")
    muted = prompt("subgraph muted")
    assert "10:21" not in muted and "samples" not in muted["6"]


def test_links_in_every_form():
    gaps = STOCK | {"links": [None, *STOCK["links"]]}
    assert to_api(gaps, INFO) == to_api(GRAPHS["links as objects"], INFO) == to_api(STOCK, INFO)


LOOP = {10: node("Reroute", {"": (11, 0, MODEL)}), 11: node("Reroute", {"": (10, 0, MODEL)})}
ITSELF = subgraph("itself", {1: node("itself")}, {}, {})
LOOSE_END = subgraph("itself", {4: node("VAEDecode", {"samples": (-10, 5, LATENT)})}, {}, {})
UNLINKED = workflow({1: node("CheckpointLoaderSimple", values=["a.safetensors"])})


@pytest.mark.parametrize(
    "words, saved",
    [
        (r"Node 6 \(VAEDecode\).* no link 8.* 'vae'", STOCK | {"links": STOCK["links"][:7]}),
        (
            "no node 5, .* link to node 6",
            STOCK | {"nodes": [n for n in STOCK["nodes"] if n["id"] != 5]},
        ),
        ("workflow has no table `links`", {k: v for k, v in STOCK.items() if k != "links"}),
        (r"no node Elsewhere \(node 12\)", workflow(controlled("Elsewhere"))),
        (r"Node 5 \(KSampler\).* 'model' leads in a circle", workflow(stock(LOOP, _5={"model": (11, 0, MODEL)}))),
        (r"link \[2, 1\], expected id, origin_id", STOCK | {"links": [*STOCK["links"], [2, 1]]}),
        (r"Node 3 \(itself\).* no input 5", workflow({3: node("itself")}, [LOOSE_END])),
        ("subgraph contains itself", workflow({3: node("itself")}, [ITSELF])),
        ("saved from the editor", {"last_node_id": 3}),
    ],
)
def test_what_cannot_be_queued_is_named(words, saved):
    with pytest.raises(WorkflowFileError, match=words):
        to_api(saved, INFO)
    assert list(to_api({k: v for k, v in UNLINKED.items() if k != "links"}, INFO)) == ["1"]


def test_a_picture_brings_the_graph_with_its_own_values_back():
    prompt = put_in(to_api(STOCK, INFO), text="another")
    prompt["5"]["inputs"] |= {"seed": 11, "denoise": 0.5}  # before and behind the editor's own "control after generate"
    assert to_api(editor_graph(STOCK, prompt, INFO), INFO) == prompt != to_api(STOCK, INFO)
    assert editor_graph(prompt, prompt, INFO) is None  # in API format
    for saved in (saved for saved in GRAPHS.values() if saved.get("definitions")):
        prompt = to_api(saved, INFO)
        assert editor_graph(saved, prompt, INFO) == saved
        if inside := [node for key, node in prompt.items() if ":" in key]:
            inside[0]["inputs"]["another"] = 1
            assert editor_graph(saved, prompt, INFO) is None
