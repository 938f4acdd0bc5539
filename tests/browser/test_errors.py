"""Mistakes are shown on the node where they are made: by refusing the graph before anything is loaded, or as a hint."""

import re

import pytest
from playwright.sync_api import TimeoutError
from subject_dla.tools.comfy_client import workflow

SCHEDULE, SAMPLER, PIPELINE = "SubjectStageSchedule", "SubjectStagedSampler", "SubjectLoadPipeline"
PROMPTS = "SubjectPromptList"  # in a template of its own
CASES = {  # case: changed widgets by node, the node that is marked, at which inputs, words of the message
    "flow times on the clock steps": (
        {SCHEDULE: {"preset": "paper", "clock": "steps", "tau1": 0.95, "tau2": 0.85}}, SCHEDULE, ["tau1"],
        "Stages out of order: tau1 is 0.95 and tau2 0.85"),
    "a sampler with steps of its own": (
        {SCHEDULE: {"preset": "paper", "clock": "steps", "tau1": 0.2, "tau2": 0.4},
         SAMPLER: {"sampler_name": "dpm_adaptive"}}, SAMPLER, ["sampler_name"],
        "the clock is steps, but dpm_adaptive chooses its own"),
    "no negative": ({SAMPLER: {"cfg": 3, "negative": None}}, SAMPLER, ["cfg"], "Staged Sampler: cfg is 3"),
    "two missing files": (
        {PIPELINE: {"mllm": "gone", "dla": "lost.safetensors"}}, PIPELINE, ["mllm", "dla"],
        "models/dla has no 'lost.safetensors'"),
    "a prefix outside the output folder": (
        {PROMPTS: {"prefix": "../x"}}, PROMPTS, ["prefix"], "prefix is '../x', with which a file's name leads out"),
}  # fmt: skip
CHANGE = """(app, _, changes) => {
    for (const [kind, values] of Object.entries(changes)) {
        const node = app.graph.nodes.find((node) => node.type == kind)
        for (const [name, value] of Object.entries(values)) {
            const widget = node.widgets.find((widget) => widget.name == name)
            widget ? widget.value = value : node.disconnectInput(node.findInputSlot(name))
        }
    }
}"""
# The nodes that are marked, at which inputs, and what the server says of them.
MARKED = """(app) => Object.entries(app.lastNodeErrors).map(([id, {errors}]) => [
    app.graph.getNodeById(id).type, errors.map(({extra_info}) => extra_info.input_name),
    errors.map(({details}) => details).join("\\n")
])"""


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_marked_on_its_node(editor, case):
    changes, node, inputs, words = CASES[case]
    editor.load(workflow.read("batch_prompts" if PROMPTS in changes else "demo"))
    editor.run(CHANGE, changes)
    with editor.page.expect_response("**/prompt"):
        editor.press_run()
    shown = editor.page.get_by_text(words).filter(visible=True).first
    details = editor.page.get_by_role("button", name="View details")
    details.or_(editor.page.get_by_role("dialog")).first.wait_for()
    if details.is_visible():  # newer editors show the text in a panel
        details.click()
        editor.page.get_by_role("button", name=re.compile("^Info for ")).first.click()
    shown.wait_for()
    editor.screenshot(f"error-{case}".replace(" ", "-"))
    ((marked, at, text),) = editor.run(MARKED)
    assert (marked, at) == (node, inputs) and text.count(words) == 1


def test_a_hint_is_written_on_its_node(editor):
    """And in a message and the log. Nodes 2.0 of 1.32 draws no text that a node, of any pack, writes as it runs."""
    drawn = editor.version > (1, 32) or editor.renderer == "classic"
    editor.load(workflow.read("demo"))
    editor.fit()
    words = "the prompt names image 2, but 1 image came in"
    hint = editor.page.get_by_text(f"Warning: {words}").filter(visible=True).first
    said = editor.server.log.read_text().count(words)
    for attempt in range(3):  # the front end drops a text that comes before it has the run's first message
        prompt = f"the duck of image 2, for {editor.front_end} {editor.renderer}, {attempt}"  # the same would not run
        editor.run(CHANGE, {"SubjectEncode": {"prompt": prompt}, SAMPLER: {"steps": 1}})
        editor.press_run()
        try:
            hint.wait_for(timeout=20_000 if attempt == 2 else 8_000) if drawn else editor.picture()
            break
        except TimeoutError:
            if attempt == 2:
                raise
    editor.screenshot("hint")
    editor.picture()
    message = editor.page.get_by_role("alert").filter(has_text=words).first
    message.wait_for()  # it stays when the run has ended
    assert f"Encode Subject: {words}" in editor.server.log.read_text()
    assert editor.server.log.read_text().count(words) > said
    if not drawn:
        assert not hint.is_visible(), "this editor shows it now: check it as in the others"
        editor.draw_by("classic")
        hint.wait_for()
