"""Subgraph blueprints: found by search, wired into a stock graph, run to a picture."""

import io

import pytest
from PIL import Image
from subject_dla.tests.small.prompts import key_of, run
from subject_dla.tools.comfy_client import workflow
from subject_dla.tools.comfy_client.server import ROOT

NAMES = sorted(path.stem for path in (ROOT / "subgraphs").glob("*.json"))
MOVE = """(app, LiteGraph, [name, x]) => {
    const node = app.graph.nodes.find((node) => node.title == name)
    node.pos = [x - 2000, 0]
    app.canvas.setDirty(true, true)
    app.canvas.deselectAll?.()
    return node.widgets.map((widget) => widget.name)
}"""
WIRE = """async (app, LiteGraph) => {
    const add = (type, y, values = {}) => {
        const node = LiteGraph.createNode(type)
        node.pos = [-500, y]
        app.graph.add(node)
        for (const widget of node.widgets ?? []) widget.value = values[widget.name] ?? widget.value
        return node
    }
    const link = (from, output, to, name) => {
        const input = to.inputs.findIndex((input) => input.name == name)
        if (input < 0 || !from.connect(output, to, input)) throw Error(`${to.title}: ${name} is not linked`)
    }
    const [sampling, conditioning] = ["Staged sampling", "Subject conditioning"].map(
        (name) => app.graph.nodes.find((node) => node.title == name))
    const model = add("UNETLoader", 0, {unet_name: "qwen_image_edit_2509_fp8_e4m3fn.safetensors"})
    const clip = add("CLIPLoader", 150, {clip_name: "qwen_2.5_vl_7b_fp8_scaled.safetensors", type: "qwen_image"})
    const vae = add("VAELoader", 350, {vae_name: "qwen_image_vae.safetensors"})
    const image = add("LoadImage", 480, {image: "example.png"})
    const latent = add("EmptySD3LatentImage", 900, {width: 128, height: 128})
    const decode = add("VAEDecode", 1100), save = add("SaveImage", 1200, {filename_prefix: "blueprints"})
    for (const node of [conditioning, sampling]) link(model, 0, node, "model")
    for (const [from, name] of [[clip, "clip"], [vae, "vae"], [image, "image"]]) link(from, 0, conditioning, name)
    for (const output of [0, 1]) link(conditioning, output, sampling, ["positive", "negative"][output])
    link(latent, 0, sampling, "latent_image")
    link(sampling, 0, decode, "samples")
    link(vae, 0, decode, "vae")
    link(decode, 0, save, "images")
    sampling.widgets.find((widget) => widget.name == "steps").value = 4
    await app.extensionManager.command.execute("Comfy.Canvas.FitView")
    return (await app.graphToPrompt()).output
}"""


def test_blueprints_are_found_wired_and_run(editor):
    for number, name in enumerate(NAMES):
        editor.run("(app) => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        field = editor.page.locator("input[role=combobox]:focus")
        field.fill(name)
        editor.page.get_by_role("option").filter(has_text=name).first.wait_for()
        editor.page.keyboard.press("Enter")
        editor.page.wait_for_timeout(500)
        editor.page.mouse.move(500, 300)
        editor.page.mouse.click(500, 300)  # where the newer editor puts it
        editor.page.wait_for_timeout(500)
        assert "tau1" in editor.run(MOVE, [name, 600 * number]) or name == "Subject conditioning"
    prompt = editor.run(WIRE)
    editor.page.wait_for_timeout(500)
    editor.screenshot("blueprints")
    values = prompt[key_of(prompt, "KSampler")]["inputs"]
    assert (values["steps"], values["cfg"], values["sampler_name"]) == (4, 4, "euler")
    stages = prompt[key_of(prompt, "SubjectApplyStages")]["inputs"]
    assert (stages["preset"], stages["tau1"]) == ("semantics_first", 0.95) and "stages" not in stages
    (image,) = run(editor.server, prompt)[key_of(prompt, "SaveImage")]["images"]
    picture = Image.open(io.BytesIO(editor.server.client.fetch(image))).convert("RGB")
    assert picture.size == (128, 128) and len(picture.getcolors(2**24)) > 100


@pytest.mark.parametrize("name", NAMES)
def test_the_host_can_read_the_file(name):
    """It opens the file in the system's encoding; every link inside leads from a slot to a slot."""
    path = ROOT / "subgraphs" / f"{name}.json"
    assert path.read_bytes().isascii()
    saved = workflow.read(path)
    (graph,), (shell,) = saved["definitions"]["subgraphs"], saved["nodes"]
    assert graph["id"] == shell["type"] and graph["name"] == name and saved["extra"]["BlueprintDescription"]
    assert [slot["name"] for slot in shell["inputs"]] == [slot["name"] for slot in graph["inputs"]]
    links, nodes = {link["id"]: link for link in graph["links"]}, {node["id"]: node for node in graph["nodes"]}
    for link in links.values():
        if link["target_id"] > 0:
            assert nodes[link["target_id"]]["inputs"][link["target_slot"]]["link"] == link["id"]
        if link["origin_id"] > 0:
            assert link["id"] in nodes[link["origin_id"]]["outputs"][link["origin_slot"]]["links"]
    for slot in (*graph["inputs"], *graph["outputs"]):
        assert all(links[number]["type"] == slot["type"] for number in slot["linkIds"]), slot["name"]
