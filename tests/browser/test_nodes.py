"""The pack's nodes in the search, their help pages and their looks."""

import io
from itertools import combinations

import pytest
from PIL import Image

SOCKETS = ["SubjectLoadMLLM", "SubjectEncode", "SubjectLoadDLA", "SubjectStageSchedule", "SubjectLoadOrientation"]
# Where the dot of a node's first output is on the page.
DOT = """(app, _, id) => {
    const drawn = () => app.canvasPosToClientPos(app.graph.getNodeById(id).getConnectionPos(false, 0))
    const box = document.querySelector(`[data-slot-key="${id}-out-0"]`)?.getBoundingClientRect()
    return box ? [box.x + box.width / 2, box.y + box.height / 2] : drawn()
}"""
# What users call a reference; the first ones find Add Identity on hosts without aliases too.
WORDS = ["reference", "face", "uno"]
ALIASES = ["ipadapter", "consistent character", "kontext", "pulid", "multi subject"]
# Of the pictures and links of an element, the addresses of those that do not load. What the internet has is not asked.
DEAD = """async (element) => {
    const pictures = [...element.querySelectorAll("img")].map((one) => one.decode().then(() => [], () => [one.src]))
    const addresses = [...element.querySelectorAll("a")].map((one) => one.href)
    const asked = addresses.filter((address) => !address || address.startsWith(location.origin))
    const links = asked.map((address) => fetch(address).then((found) => found.ok ? [] : [address], () => [address]))
    return (await Promise.all([...pictures, ...links])).flat()
}"""


@pytest.fixture
def ours(editor) -> dict[str, dict]:
    return {name: node for name, node in editor.server.client.object_info().items() if name.startswith("Subject")}


@pytest.fixture
def once(editor):
    """For what is not drawn by the renderer."""
    if editor.renderer != "classic":
        pytest.skip("the same with each renderer")


def test_the_search_finds_each_node(editor, ours, once):
    find = editor.search()
    found = {node["display_name"]: find(node["display_name"]) for node in ours.values()}
    assert not {title: titles for title, titles in found.items() if title not in titles[:3]}
    words = WORDS + (ALIASES if "search_aliases" in ours["SubjectAddIdentity"] else [])
    found = {word: find(word) for word in words}
    find(words[0])
    editor.screenshot("search")
    assert not {word: titles for word, titles in found.items() if not any("Add Identity" in title for title in titles)}


def test_help(editor, ours, once):
    """In the editor's panel: our page, its pictures loaded, its links alive."""
    dead = {}
    for number, (name, node) in enumerate(ours.items()):
        editor.run("(app) => app.graph.clear()")
        title = node["display_name"].split(" (")[0]  # without the words for a host's search
        shown = editor.open_help(editor.add(name, 500 + 100 * (number % 2), 100), title)
        dead[name] = shown.evaluate(DEAD)
        editor.screenshot(f"help-{name}")
    assert not any(dead.values()), dead


@pytest.mark.parametrize("palette", ["dark", "light"])
def test_the_dots_of_our_sockets_differ(editor, palette):
    """As they are drawn: from each other, from grey, and from the node that they are on."""
    editor.set(ColorPalette=palette)
    nodes = [editor.add(kind, 100 + 450 * (place // 2), 60 + 330 * (place % 2)) for place, kind in enumerate(SOCKETS)]
    editor.page.wait_for_timeout(500)
    picture = Image.open(io.BytesIO(editor.screenshot(f"sockets-{palette}").read_bytes())).convert("RGB")
    editor.set(ColorPalette="dark")
    colours = [picture.getpixel(tuple(map(round, editor.run(DOT, node)))) for node in nodes]
    assert all(sum(abs(a - b) for a, b in zip(*pair)) > 80 for pair in combinations(colours, 2)), colours
    assert all(max(colour) - min(colour) > 40 for colour in colours), colours
