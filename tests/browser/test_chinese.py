"""The pack in Chinese, in a browser whose user reads it."""

import json

import pytest
from subject_dla.common.bootstrap import ROOT

NODES = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
# How many different pictures the letters of a text make in a font: those that it lacks are all one box.
PICTURES = """(_, __, [text, font]) => {
    const canvas = document.createElement("canvas")
    const context = canvas.getContext("2d", {willReadFrequently: true})
    const draw = (letter) => {
        canvas.width = canvas.height = 48
        context.font = `32px ${font}`
        context.fillText(letter, 4, 36)
        return context.getImageData(0, 0, 48, 48).data.join()
    }
    return new Set(text.map(draw)).size
}"""
# The texts of a node as it is drawn, and the fonts.
NODE = """(app, LiteGraph, id) => {
    const node = app.graph.getNodeById(id)
    const element = document.querySelector(`[data-node-id="${id}"]`)
    const drawn = [node.title, ...[...node.widgets, ...node.outputs].map((one) => one.label)].join("\\n")
    return element ? [element.innerText, getComputedStyle(element).fontFamily] : [drawn, LiteGraph.NODE_FONT]
}"""


@pytest.fixture
def language() -> str:
    return "zh-CN"


def test_chinese_is_shown_with_a_font_that_has_it(editor):
    names = NODES["SubjectStageSchedule"]
    node = editor.add("SubjectStageSchedule", 600, 100)
    page = editor.open_help(node, names["display_name"])
    editor.screenshot("chinese")
    shown = [(page.inner_text(), page.evaluate("(element) => getComputedStyle(element).fontFamily"))]
    if editor.version > (1, 32):  # which puts its own translation in place of that of every pack, but for the help
        shown.append(editor.run(NODE, node))
        groups = [names, *names["inputs"].values(), *names["outputs"].values()]
        for name in (group.get("display_name") or group["name"] for group in groups):
            assert name in shown[-1][0]
    for text, font in shown:
        letters = sorted({letter for letter in text if "\u4e00" <= letter <= "\u9fff"})
        assert len(letters) > 5
        assert editor.run(PICTURES, [letters, font]) == len(letters), (letters, font)
