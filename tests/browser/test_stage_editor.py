"""The stage editor of Apply Stages and Stage Schedule, and the colours of the pack's sockets."""

import re
from itertools import cycle

import pytest
from subject_dla.tests.small.prompts import of_type
from subject_dla.tools.comfy_client import workflow

APP = "window.app ?? window.comfyAPI.app.app"
OURS = ["MLLM", "MLLM_FEATURES", "DLA", "STAGES", "ORIENTATION_MODEL"]
FREE = cycle((560, 640))  # px of empty canvas: two clicks at one place, of a short test and the next, open the search
# A model, Apply Stages and a sampler in a row.
ROW = """(app, LiteGraph) => {
    const [model, stages, sampler] = ["UNETLoader", "SubjectApplyStages", "KSampler"].map((kind, index) => {
        const node = LiteGraph.createNode(kind)
        node.pos = [20 + 340 * index + (index > 1 ? 120 : 0), 60]
        app.graph.add(node)
        return node
    })
    model.connect(0, stages, 0)
    stages.connect(0, sampler, 0)
    app.canvas.setDirty(true, true)
    return stages.id
}"""

CHOOSE = """(app, _, [id, name, value]) => {
    const widget = app.graph.getNodeById(id).widgets.find((one) => one.name === name)
    widget.value = value
    widget.callback?.(value)
}"""


def slider(editor, name):
    """Of the Apply Stages; a Stage Schedule behind it has the same."""
    return editor.page.locator(f".subject-stages [role=slider][aria-label$='{name}']").first


def queued(editor) -> dict:
    """Inputs of the Apply Stages that Run would queue."""
    return of_type(editor.queued(), "SubjectApplyStages")


def shown(editor, value):
    """Waits until the first boundary is drawn at a value."""
    function = "(value) => document.querySelector('.subject-stages .handle')?.getAttribute('aria-valuenow') == value"
    editor.page.wait_for_function(function, arg=value)


def drag(editor, handle, across, down):
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    mouse = editor.page.mouse
    mouse.move(x, y)
    mouse.down()
    mouse.move(x + across / 2, y + down / 2)
    mouse.move(x + across, y + down)
    mouse.up()


@pytest.fixture
def stages(editor) -> int:
    node = editor.run(ROW)
    slider(editor, "keyframe 2, start").wait_for()
    editor.page.mouse.click(next(FREE), 720)  # the front end notes what the graph is, to undo changes to it
    editor.page.wait_for_timeout(150)  # once more 50 ms later, in newer ones
    return node


@pytest.mark.every_editor
def test_a_boundary_is_dragged_and_undone(editor, stages):
    boundary = slider(editor, "keyframe 2, start")
    assert boundary.get_attribute("aria-valuenow") == "0.95"
    editor.page.locator(".subject-stages .tick").nth(19).wait_for(state="attached")  # a mark for each of the 20 steps
    drag(editor, boundary, 60, 0)
    dragged = queued(editor)["tau1"]
    shown(editor, dragged)
    editor.screenshot("stage-editor-dragged")
    assert 0.5 < dragged < 0.85 and round(dragged, 2) == dragged
    assert queued(editor) == {**queued(editor), "preset": "semantics_first", "tau2": 0.85}
    assert "stage_editor" not in queued(editor)
    saved = "(app, _, id) => app.graph.serialize().nodes.find((node) => String(node.id) === String(id)).widgets_values"
    assert editor.run(saved, stages) == ["semantics_first", "flow_time", dragged, 0.85]
    shown(editor, dragged)
    editor.page.keyboard.press("Control+z")
    slider(editor, "keyframe 2, start").wait_for()
    shown(editor, 0.95)
    assert queued(editor)["tau1"] == 0.95


def test_the_keyboard_moves_a_boundary(editor, stages):
    slider(editor, "keyframe 2, start").focus()
    for key, value in [("ArrowRight", 0.94), ("ArrowLeft", 0.95), ("Shift+ArrowRight", 0.85), ("ArrowDown", 0.84)]:
        editor.page.keyboard.press(key)
        assert queued(editor)["tau1"] == value
        editor.page.wait_for_timeout(150)  # the handles are drawn anew: the focus must stay
    assert "0.84 on the clock flow_time" in slider(editor, "keyframe 2, start").get_attribute("aria-valuetext")


DISABLED = """(app, _, id) => app.graph.getNodeById(id).widgets.filter((one) => one.disabled).map((one) => one.name)"""


@pytest.mark.every_editor
def test_what_a_preset_does_not_read_is_greyed_out(editor, stages):
    for preset, greyed, handles in [("paper", [], 2), ("both", ["tau1", "tau2"], 0), ("two_stage", ["tau2"], 1)]:
        editor.run(CHOOSE, [stages, "preset", preset])
        editor.page.wait_for_function(
            "(count) => document.querySelectorAll('.subject-stages .handle').length === count", arg=handles
        )
        assert editor.run(DISABLED, stages) == greyed
        editor.screenshot(f"stage-editor-{preset}")


def test_boundaries_that_touch_are_both_dragged(editor, stages):
    editor.run(CHOOSE, [stages, "preset", "paper"])
    slider(editor, "keyframe 3, start").wait_for()
    drag(editor, slider(editor, "keyframe 2, start"), 300, 0)  # not past its neighbour
    assert queued(editor)["tau1"] == 0.86
    shown(editor, 0.86)
    drag(editor, slider(editor, "keyframe 2, start"), -30, 0)
    assert 0.9 < queued(editor)["tau1"] < 1 and queued(editor)["tau2"] == 0.85
    editor.run(CHOOSE, [stages, "tau1", 0.86])
    shown(editor, 0.86)
    drag(editor, slider(editor, "keyframe 3, start"), 30, 0)
    assert queued(editor)["tau1"] == 0.86 and 0.7 < queued(editor)["tau2"] < 0.85


def test_it_shows_what_is_queued_of_bypassed_and_muted_nodes(editor, stages):
    """And of the front end's own: what they have is queued with the node behind them."""
    set_mode = "(app, _, [id, mode]) => { app.graph.getNodeById(id).mode = mode }"
    text = editor.page.locator(".subject-stages output").first
    for mode, words in [
        (4, "Bypassed: a run goes past this node."),
        (2, "Muted: this node does not run."),
        (0, "20 steps"),
    ]:
        editor.run(set_mode, [stages, mode])
        text.filter(has_text=words).wait_for()
        assert "wrong" not in (text.get_attribute("class") or "")
    for _ in range(2):
        count = editor.page.locator(".subject-stages").first.locator(".handle").count()
        editor.page.get_by_role("button", name="Add a keyframe").first.click()
        editor.page.wait_for_function(
            "(count) => document.querySelector('.subject-stages').querySelectorAll('.handle').length > count", arg=count
        )
    frames = editor.run("(app) => app.graph._nodes.filter((n) => n.type === 'SubjectStageKeyframe').map((n) => n.id)")
    for mode, found in [(4, 2), (2, 0), (0, 3)]:  # without a schedule before it, the last keyframe is the first
        editor.run(set_mode, [min(map(int, frames)), mode])
        first = "() => document.querySelector('.subject-stages').querySelectorAll('.handle:not(.up)').length"
        editor.page.wait_for_function(f"(count) => ({first})() === count", arg=found)
    link = """(app, LiteGraph, id) => {
        const node = app.graph.getNodeById(id), source = LiteGraph.createNode("PrimitiveNode")
        node.disconnectInput(node.inputs.findIndex((one) => one.name === "stages"))
        source.pos = [20, 500]
        app.graph.add(source)
        source.connect(0, node, node.inputs.findIndex((one) => one.name === "tau1"))
        source.widgets[0].value = 0.5
    }"""
    editor.run(link, stages)
    text.filter(has_text="steps 1-16 (16)").wait_for()
    assert queued(editor)["tau1"] == 0.5


def test_keyframes_are_undone_and_done_again(editor, stages):
    """By one press each; 1.32 has steps of its own between them, as many as it finds time for."""
    if editor.version <= (1, 32):
        pytest.skip("this editor notes a change after each undo, of whatever node, and then has nothing to do again")
    there = "(app) => app.graph._nodes.length"
    for nodes in (5, 6):
        editor.page.get_by_role("button", name="Add a keyframe").first.click()
        editor.page.wait_for_timeout(500)
        assert editor.run(there) == nodes
    for keys, wanted in [("Control+z", (5, 3)), ("Control+y", (5, 6))]:
        for nodes in wanted:
            editor.page.keyboard.press(keys)
            editor.page.wait_for_function(f"(count) => ({there})({APP}) === count", arg=nodes)
            editor.page.wait_for_timeout(500)


def test_a_schedule_out_of_order_is_said(editor, stages):
    """By the editor, which goes on drawing the last one; not by an error in the browser's console."""
    write = """(app, _, [id, values]) => {
        for (const widget of app.graph.getNodeById(id).widgets) widget.value = values[widget.name] ?? widget.value
    }"""
    text = editor.page.locator(".subject-stages output")
    assert editor.run(DISABLED, stages) == ["tau2"]
    editor.run(write, [stages, {"preset": "paper", "tau1": 0.5}])
    editor.page.locator(".subject-stages output.wrong").wait_for()
    assert editor.run(DISABLED, stages) == []  # what is out of order can be mended
    assert "Stages out of order: tau1 is 0.5 and tau2 0.85" in text.inner_text()
    shown(editor, 0.95)
    editor.screenshot("stage-editor-wrong")
    editor.run(write, [stages, {"tau1": 0.9}])
    shown(editor, 0.9)
    assert "wrong" not in text.get_attribute("class")


def test_it_is_as_wide_as_its_node_beside_the_panel(editor, stages):
    if editor.version <= (1, 32):
        pytest.skip("this editor has no panel of properties")
    editor.select(stages)
    editor.set(RightSidePanel__IsOpen=True)
    editor.page.get_by_text("Parameters", exact=True).click()
    editor.page.get_by_text("INPUTS", exact=True).wait_for()
    editor.page.wait_for_timeout(500)
    editor.screenshot("stage-editor-panel")
    width = editor.run("(app, _, id) => app.graph.getNodeById(id).size[0]", stages)
    assert width - 40 < editor.page.locator(".subject-stages").bounding_box()["width"] < width
    assert not editor.page.get_by_text("stage_editor").count()


def test_keyframes_are_added_edited_and_removed(editor, stages):
    page = editor.page
    page.get_by_role("button", name="Add a keyframe").click()
    slider(editor, "keyframe 3, VAE tokens").wait_for()
    drag(editor, slider(editor, "keyframe 3, VAE tokens"), 0, 25)
    editor.screenshot("stage-editor-keyframe")
    prompt = editor.queued()
    frame, schedule = of_type(prompt, "SubjectStageKeyframe"), of_type(prompt, "SubjectStageSchedule")
    assert 0 < frame["vae_strength"] < 1 and frame["mllm_strength"] == 1 and frame["start"] in (0.47, 0.48)
    assert schedule == {"preset": "semantics_first", "clock": "flow_time", "tau1": 0.95, "tau2": 0.85}
    assert prompt[queued(editor)["stages"][0]]["class_type"] == "SubjectStageKeyframe"
    page.get_by_role("button", name="Remove the last keyframe").first.click()
    page.wait_for_function("() => !document.querySelector('.subject-stages .handle.up')")
    prompt = editor.queued()
    assert prompt[queued(editor)["stages"][0]]["class_type"] == "SubjectStageSchedule"


def test_a_keyframe_is_removed_while_the_server_answers(editor, stages):
    """The answer still tells of it."""
    page, held = editor.page, []
    page.get_by_role("button", name="Add a keyframe").click()
    handle = slider(editor, "keyframe 3, VAE tokens")
    handle.wait_for()
    page.route("**/subject_dla/stages", lambda route: held.append(route))
    drag(editor, handle, 0, 25)
    while not held:
        page.wait_for_timeout(50)
    page.get_by_role("button", name="Remove the last keyframe").first.click()
    held[0].continue_()
    page.unroute("**/subject_dla/stages")
    page.wait_for_function("() => !document.querySelector('.subject-stages .handle.up')")


@pytest.mark.every_editor
def test_our_sockets_have_colours_of_their_own(editor):
    """In dark and light palettes; a palette that names our types keeps its colours."""
    colours = """(app, _, types) => types.map((type) => [
        app.canvas.default_connection_color_byType[type],
        app.canvas.constructor.link_type_colors[type],
        getComputedStyle(document.body).getPropertyValue(`--color-datatype-${type}`).trim(),
    ])"""
    found = {}
    try:
        for palette in ("light", "dark"):
            editor.set(ColorPalette=palette)
            editor.page.wait_for_timeout(300)
            found[palette] = editor.run(colours, OURS)
            assert all(slot == link == variable for slot, link, variable in found[palette]), found
            assert len({slot for slot, *_ in found[palette]} - {""}) == len(OURS), found
    finally:
        editor.set(ColorPalette="dark")
    assert found["light"] != found["dark"]
    editor.run("""(app) => {
        app.canvas.default_connection_color_byType.DLA = "#123456"
    }""")
    assert editor.run(colours, ["DLA"])[0][0] == "#123456"
    editor.run("(app) => { app.canvas.default_connection_color_byType.DLA = '' }")
    assert editor.run(colours, ["DLA"]) == [found["dark"][OURS.index("DLA")]]


def test_a_run_shows_step_stage_strengths_and_time_left(editor):
    """In the Stage Schedule of the demo; the sampler keeps the host's progress and preview."""
    editor.load(workflow.read("demo"))
    editor.run(
        """(app, _, seed) => {  // with a seed of its own, else the server has the latent already
        app.graph._nodes.find((node) => node.type === "SubjectStagedSampler").widgets[0].value = seed
        window.told = []
        window.told.observer = new MutationObserver(() => {
            const text = document.querySelector(".subject-stages output")?.textContent
            if (text?.startsWith("step ") && text !== window.told.at(-1)) window.told.push(text)
        })
        window.told.observer.observe(document.body, {subtree: true, childList: true, characterData: true})
    }""",
        len(editor.renderer),
    )
    editor.page.locator(".subject-stages output").filter(has_text="steps, clock").wait_for()  # it knows its sampler
    editor.page.get_by_role("button", name="Run", exact=True).click()
    editor.page.wait_for_function("() => window.told.length > 3", timeout=120_000)
    editor.screenshot("sampling")
    steps = of_type(editor.queued(), "SubjectStagedSampler")["steps"]
    editor.page.wait_for_function(
        "(last) => window.told.at(-1)?.startsWith(last)", arg=f"step {steps}/{steps}, stage ", timeout=120_000
    )
    told = editor.run("() => window.told.observer.disconnect() ?? [...window.told]")
    assert len(told) == steps + 1 and len(set(told)) == len(told)  # each step once, and that it begins
    assert re.fullmatch(rf"step {steps - 1}/{steps}, stage \d: MLLM \d\.\d\d, VAE \d\.\d\d, \d+ s left", told[-2])


@pytest.mark.parametrize("stop", ["interrupted", "sampler removed"])
def test_the_time_left_goes_with_the_run(editor, stop):
    editor.load(workflow.read("demo"))
    change = """(app, _, [name, steps, seed]) => {
        const sampler = app.graph._nodes.find((node) => node.type === "SubjectStagedSampler")
        if (name === "removed") return app.graph.remove(sampler)
        for (const widget of sampler.widgets) widget.value = {steps, seed}[widget.name] ?? widget.value
    }"""
    editor.run(change, ["changed", 60, 100 * len(editor.renderer) + len(stop)])
    text = editor.page.locator(".subject-stages output")
    editor.press_run()
    text.filter(has_text=re.compile(r"^step \d+/60, .* left$")).wait_for(timeout=60_000)
    if stop == "interrupted":
        editor.run("() => window.comfyAPI.api.api.interrupt()")
    else:
        editor.run(change, ["removed", 0, 0])
    text.filter(has_not_text="left").wait_for(timeout=120_000)
    assert not text.inner_text().startswith("step ")
