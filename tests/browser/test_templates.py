"""Our templates, as a person opens and runs them."""

import json

from subject_dla.tools.comfy_client import workflow
from subject_dla.tools.comfy_client.server import PACK
from subject_dla.tools.comfy_client.shipped import TITLES

NOT_ON_EVERY_HOST = {"qwen_image_2_1_staged": "QwenImage21Cache"}


def test_each_template_opens_whole(editor):
    """Every node known, every link there, nothing reported."""
    faults, known = {}, editor.server.client.object_info()
    for name in TITLES:
        if NOT_ON_EVERY_HOST.get(name, "KSampler") not in known:
            continue
        saved = workflow.read(name)
        shown = editor.load(saved)
        editor.page.wait_for_timeout(300)
        editor.screenshot(f"template-{name}")
        found = {key: shown[key] for key in ("missing", "broken", "unlinked") if shown[key]}
        if shown["count"] != len(saved["nodes"]) or editor.errors:
            found |= {"nodes": shown["count"], "errors": list(editor.errors)}
            editor.errors.clear()
        if found:
            faults[name] = found
    assert not faults, json.dumps(faults, indent=1)


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
