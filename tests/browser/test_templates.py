"""Our templates, as a person opens and runs them."""

import json

import pytest
from subject_dla.tests.small.editor import STATE
from subject_dla.tests.small.prompts import shrink
from subject_dla.tools.comfy_client import workflow
from subject_dla.tools.comfy_client.server import PACK
from subject_dla.tools.comfy_client.shipped import TITLES

QWEN_IMAGE_21, CACHE_21 = "qwen_image_2_1_staged", "QwenImage21Cache"
LONG = ("layer_roles",)  # to run; tests/server/test_workflows.py does
# Whether each node that a run gave pictures shows them.
PICTURES = """(nodes) => nodes.every((id) => {
    const node = window.comfyAPI.app.app.graph.getNodeById(id)
    const shown = [...document.querySelectorAll(`[data-node-id="${id}"] img`), ...node.imgs ?? []]
    return shown.some((image) => image.naturalWidth)
})"""


@pytest.fixture
def small_runs(editor):
    """Small sizes and few steps in whatever the editor queues, so that the templates stay as they are."""

    def change(route):
        sent = route.request.post_data_json
        shrink(sent["prompt"])
        route.continue_(post_data=json.dumps(sent))

    editor.page.route("**/api/prompt", change)
    yield
    editor.page.unroute("**/api/prompt")


@pytest.mark.in_turns("name")
@pytest.mark.parametrize("name", TITLES)
def test_each_template_is_opened_and_run(editor, small_runs, name, pytestconfig):
    """From the dialog: every node known, every link there, nothing reported; Run shows its pictures."""
    saved, info = workflow.read(name), editor.server.client.object_info()
    files = info["UNETLoader"]["input"]["required"]["unet_name"][0]
    if name == "train_dla_klein" and saved["nodes"][0]["widgets_values"][0] not in files:
        pytest.skip("not on this host: FLUX.2")
    editor.open_template(TITLES[name])
    count = "(count) => window.comfyAPI.app.app.graph.nodes.length === count"
    editor.page.wait_for_function(count, arg=len(saved["nodes"]))
    shown = editor.page.evaluate(STATE)
    if name == QWEN_IMAGE_21 and CACHE_21 not in info:
        assert shown["missing"] == [CACHE_21] and not shown["unlinked"]
        details = editor.page.get_by_role("button", name="View details")  # of a newer editor
        details.or_(editor.page.get_by_text(CACHE_21)).first.wait_for()
        editor.screenshot(f"template-{name}")
        pytest.skip("not on this host: Qwen-Image 2.1")
    assert not shown["missing"] and not shown["broken"] and not shown["unlinked"], shown
    if name in LONG and not pytestconfig.getoption("--every-editor"):
        return
    editor.fit(settle=0)  # while it runs
    with editor.page.expect_response("**/api/prompt") as queued:
        editor.press_run()
    outputs = editor.server.client.wait(queued.value.json()["prompt_id"], shown["output"])
    pictures = [int(key) for key, output in outputs.items() if output.get("images")]
    assert pictures or any(output.get("text") for output in outputs.values())
    editor.page.wait_for_function(PICTURES, arg=pictures)
    editor.screenshot(f"template-{name}")


def test_they_are_listed_in_their_order_and_found(editor):
    """The host lists them in that of the file system; the editor searches their names alone."""
    dialog = editor.open_templates()
    dialog.get_by_role("button", name=PACK).click()
    cards = dialog.locator("[data-testid^='template-workflow-']")
    dialog.get_by_test_id(f"template-workflow-{TITLES['demo']}").wait_for()

    def shown():
        ids = cards.evaluate_all("(cards) => cards.map((card) => card.dataset.testid)")
        return [title.removeprefix("template-workflow-") for title in ids]

    assert shown() == list(TITLES.values())
    found = {"consistent character": "batch_prompts", "reference": "several_subjects", "subject": "demo"}
    for words, name in found.items():
        dialog.get_by_role("textbox").first.fill(words)
        cards.nth(len(TITLES) - 1).wait_for(state="detached")
        editor.page.wait_for_timeout(500)
        assert TITLES[name] in shown(), words
    editor.screenshot("templates-search")
    dialog.get_by_test_id(f"template-workflow-{TITLES[name]}").click()
    dialog.wait_for(state="hidden")


def test_one_node_in_a_workflow_knows_its_steps(editor):
    editor.open_template(TITLES["qwen_image_edit_one_node"])
    editor.page.locator(".subject-stages output").filter(has_text="20 steps").wait_for()
    editor.fit()
    editor.screenshot("one-node")


def test_a_first_picture_and_its_graph_back(editor):
    """Install, Templates, demo, Run: a picture; dropped on an empty editor it brings its graph."""
    dialog = editor.open_templates()
    dialog.get_by_role("button", name=PACK).click()
    listed = {name: dialog.get_by_test_id(f"template-workflow-{title}") for name, title in TITLES.items()}
    for name, card in listed.items():
        card.scroll_into_view_if_needed()
        assert card.is_visible(), name
    listed["demo"].scroll_into_view_if_needed()
    editor.page.wait_for_timeout(1000)  # for the thumbnails
    editor.screenshot("templates")
    listed["demo"].click()
    dialog.wait_for(state="hidden")
    queued = editor.queued()
    editor.fit()
    editor.press_run()
    picture = editor.picture()
    editor.screenshot("first-picture")

    editor.clear()
    assert not editor.queued()
    editor.drop(picture["filename"], editor.server.client.fetch(picture))
    editor.page.wait_for_function("() => window.comfyAPI.app.app.graph.nodes.length")
    editor.fit()
    editor.screenshot("dropped")
    assert editor.queued() == queued
