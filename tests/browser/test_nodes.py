"""The pack's nodes in the search, their help pages and their looks."""

import io
import json
from itertools import combinations

import pytest
from PIL import Image
from subject_dla.common.bootstrap import ROOT

SOCKETS = ["SubjectLoadMLLM", "SubjectEncode", "SubjectLoadDLA", "SubjectStageSchedule", "SubjectLoadOrientation"]
# Where the dot of a node's first output is on the page.
DOT = """(app, _, id) => {
    const drawn = () => app.canvasPosToClientPos(app.graph.getNodeById(id).getConnectionPos(false, 0))
    const box = document.querySelector(`[data-slot-key="${id}-out-0"]`)?.getBoundingClientRect()
    return box ? [box.x + box.width / 2, box.y + box.height / 2] : drawn()
}"""
# What users call a reference: they find Add Identity on hosts without aliases too.
WORDS = ["reference", "face", "uno", "ipadapter", "kontext", "pulid", "multi subject", "consistent character"]
# Of the pictures and links of an element, the addresses of those that do not load. What the internet has is not asked.
DEAD = """async (element) => {
    const pictures = [...element.querySelectorAll("img")].map((one) => one.decode().then(() => [], () => [one.src]))
    const addresses = [...element.querySelectorAll("a")].map((one) => one.href)
    const asked = addresses.filter((address) => !address || address.startsWith(location.origin))
    const links = asked.map((address) => fetch(address).then((found) => found.ok ? [] : [address], () => [address]))
    return (await Promise.all([...pictures, ...links])).flat()
}"""
# Of the parts of an element, the first words of those that do not fit into its width.
CUT = """(element) => {
    const {right} = element.getBoundingClientRect()
    const fits = (one) => one.getBoundingClientRect().right <= right + 1
        && (getComputedStyle(one).display == "inline" || one.scrollWidth <= one.clientWidth + 1)
    const parts = [element, ...element.querySelectorAll("*")]
    return parts.filter((one) => !fits(one)).map((one) => one.innerText.slice(0, 40))
}"""
# How many times as high as what is seen of it an element is.
SCREENS = """async (element) => {
    await Promise.all([...element.querySelectorAll("img")].map((one) => one.decode()))
    let panel = element
    while (!["auto", "scroll"].includes(getComputedStyle(panel).overflowY)) panel = panel.parentElement
    return element.scrollHeight / panel.clientHeight
}"""
CHINESE = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))


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
    found = {word: find(word) for word in WORDS}
    find(WORDS[-1])
    editor.screenshot("search")
    assert not {word: titles for word, titles in found.items() if not any("Add Identity" in title for title in titles)}


def test_what_the_search_finds_by_other_words_is_the_node_itself(editor, ours):
    """Also where the host has no aliases: there the browser has more names for it."""
    find = editor.search()
    find("ipadapter")
    editor.page.get_by_role("option").filter(has_text="Add").filter(has_text="Identity").first.click()
    editor.page.mouse.click(900, 300)  # where it is put
    state = "(app) => app.graph.nodes.map((node) => [node.type, node.title, node.comfyClass, node.widgets.length])"
    expected = ["SubjectAddIdentity", ours["SubjectAddIdentity"]["display_name"], "SubjectAddIdentity"]
    ((*added, widgets),) = editor.run(state)
    assert added == expected and widgets >= 3
    editor.screenshot("search-added")
    saved = editor.run("(app) => app.graph.serialize()")
    assert [node["type"] for node in saved["nodes"]] == ["SubjectAddIdentity"]
    assert [node["class_type"] for node in editor.queued().values()] == ["SubjectAddIdentity"]


@pytest.mark.in_turns("language")
@pytest.mark.parametrize("language", ["en", "zh-CN"])
def test_help(editor, ours, language):
    """In the editor's panel as it opens: our page, its pictures loaded, its links alive, nothing cut, two screens."""
    dead, cut, screens = {}, {}, {}
    for number, (name, node) in enumerate(ours.items()):
        editor.run("(app) => app.graph.clear()")
        title = node["display_name"].split(" (")[0]  # without the words for a host's search
        title = CHINESE[name]["display_name"] if language != "en" else title
        shown = editor.open_help(editor.add(name, 500 + 100 * (number % 2), 100), title)
        dead[name], cut[name] = shown.evaluate(DEAD), shown.evaluate(CUT)
        screens[name] = shown.evaluate(SCREENS)
        editor.screenshot(f"help-{name}-{language}")
    assert not any(dead.values()), dead
    assert not any(cut.values()), {name: found for name, found in cut.items() if found}
    assert max(screens.values()) <= 2, {name: found for name, found in screens.items() if found > 2}


@pytest.mark.every_editor
@pytest.mark.parametrize("palette", ["dark", "light"])
def test_the_dots_of_our_sockets_differ(editor, palette):
    """As they are drawn: from each other, from grey, and from the node that they are on."""
    editor.set(ColorPalette=palette)
    places = [(100, 60), (100, 390), (550, 60), (550, 390), (1000, 390)]  # not where messages are shown
    nodes = [editor.add(kind, *place) for place, kind in zip(places, SOCKETS, strict=True)]
    editor.page.wait_for_timeout(500)
    picture = Image.open(io.BytesIO(editor.screenshot(f"sockets-{palette}").read_bytes())).convert("RGB")
    editor.set(ColorPalette="dark")
    colours = [picture.getpixel(tuple(map(round, editor.run(DOT, node)))) for node in nodes]
    assert all(sum(abs(a - b) for a, b in zip(*pair)) > 80 for pair in combinations(colours, 2)), colours
    assert all(max(colour) - min(colour) > 40 for colour in colours), colours
