"""The pictures of the help pages: each node as the editor draws it, between its neighbours in a template.

nox -s browser -- tests/browser/test_help_pictures.py --write-docs
"""

import io

import pytest
from PIL import Image
from subject_dla.common.bootstrap import ROOT
from subject_dla.tools.comfy_client import workflow
from subject_dla.tools.comfy_client.shipped import TITLES, shipped

DOCS = ROOT / "web" / "docs"
PAGES = sorted(page.stem for page in DOCS.glob("*.md"))
MARGIN, WIDTH, HEIGHT = 90, 1100, 760  # px on the page, around the node and at most
# Puts a node of the graph, by id, at natural size into view; its box on the page.
CENTRE = """async (app, _, id) => {
    const node = app.graph.getNodeById(id), {ds} = app.canvas
    ds.scale = 1
    ds.offset = [420 - node.pos[0], 170 - node.pos[1]]
    app.canvas.draw(true, true)
    await new Promise((resolve) => setTimeout(resolve, 600))
    const [x, y] = app.canvasPosToClientPos([node.pos[0], node.pos[1] - 30])
    return [x, y, node.size[0], node.size[1] + 30]
}"""


def in_a_template(kind: str) -> tuple[dict, int] | None:
    """A shipped workflow with a node of that class, and the node's id."""
    for name in TITLES:
        saved = workflow.read(shipped(name))
        for node in saved["nodes"]:
            node.get("properties", {}).pop("models", None)  # the front end would ask to fetch them
        found = [node["id"] for node in saved["nodes"] if node["type"] == kind]
        if found and name != "qwen_image_2_1_staged":  # of which the host lacks nodes
            return saved, found[0]
    return None


def test_each_help_page_shows_its_node(editor, request):
    if (editor.front_end, editor.renderer) != ("own", "classic"):
        pytest.skip("the pictures are of one front end")
    for name in PAGES:
        path = DOCS / name / "node.jpg"
        for page in (DOCS / f"{name}.md", DOCS / name / "zh.md"):
            assert f"]({name}/node.jpg)" in page.read_text(encoding="utf-8"), page
        if request.config.getoption("--write-docs"):
            draw(editor, name, path)
        with Image.open(path) as picture:
            assert picture.width > 300 and path.stat().st_size < 60_000, path


def draw(editor, kind: str, path) -> None:
    found = in_a_template(kind)
    editor.clear()
    node = editor.add(kind, 0, 0) if found is None else found[1]
    if found:
        editor.load(found[0])
        editor.page.keyboard.press("Escape")
    x, y, width, height = editor.run(CENTRE, node)
    left, top = max(60, x - MARGIN), max(60, y - MARGIN // 2)
    clip = {"x": left, "y": top, "width": min(width + 2 * MARGIN, WIDTH), "height": min(height + MARGIN, HEIGHT)}
    with Image.open(io.BytesIO(editor.page.screenshot(clip=clip))) as picture:
        picture.convert("RGB").save(path, quality=80, optimize=True)
