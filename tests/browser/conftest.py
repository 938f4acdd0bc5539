"""Two editors, the host's own and the newest, in one browser; each test on both, in both ways that they draw nodes."""

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image
from playwright.sync_api import Locator, Page, TimeoutError
from subject_dla.common.bootstrap import ROOT
from subject_dla.tests.small.editor import LOAD, build_models, chromium, open_editor, small_server
from subject_dla.tools import environment
from subject_dla.tools.comfy_client.server import PACK, Server

SCREENSHOTS = ROOT / "output" / "browser"
IMAGES, WIDEST = ROOT / "docs" / "images", 1200  # px
# Screenshots that --write-docs writes into the docs, and the part of the page that is shown there.
SHOWN_IN_DOCS = {
    "templates-newest-nodes2": ("editor_templates", (59, 90, 1540, 870)),
    "first-picture-newest-nodes2": ("editor_first_picture", (150, 110, 1450, 780)),
    "stage-editor-dragged-newest-nodes2": ("editor_stages", (60, 120, 1200, 650)),
    "error-two-missing-files-newest-nodes2": ("editor_error", (62, 40, 1600, 640)),
    "help-SubjectApplyStages-en-own-classic": ("editor_help", (0, 36, 1000, 820)),
    "chinese-newest-nodes2": ("editor_chinese", (560, 36, 1600, 836)),
    "one-node-newest-nodes2": ("one_node_graph", (200, 105, 1400, 795)),
}
FRONT_ENDS = {"own": None, "newest": environment.obtain_front_end}
RENDERERS = {"classic": False, "nodes2": True}
TWO_EDITORS = (("own", "classic"), ("newest", "nodes2"))  # each front end and each renderer once
# Errors of the front end's own, by text or address.
OF_THE_FRONT_END = re.compile(
    r"core workflow templates|/templates/"  # its templates are not installed
    r"|fetching file size|https://(api\.comfy\.org|huggingface\.co)/"  # nor the internet
    r"|/userdata[/?]|/docs/\w+/en\.md|Jobs ?Api|/api/jobs"  # not there yet; not on an older host
    r"|400 \(Bad Request\) \S+/prompt$|Prompt ?Execution|primevue",  # a graph is refused; a search box closes
    re.IGNORECASE,
)
CARDS = "[data-testid^='template-workflow-']"
DISMISSED = ["vueNodesBannerDismissed", "comfy.vueNodesMigration.dismissed"]  # advice on the two renderers
SHOWN = """() => {
    const node = window.comfyAPI.app.app.graph.nodes.find((node) => node.type == "SaveImage")
    const shown = document.querySelector(`[data-node-id="${node.id}"] img`) ?? node.imgs?.[0]
    return shown?.naturalWidth
}"""
FONTS = """<fontconfig><include ignore_missing="yes">/etc/fonts/fonts.conf</include><dir>{font}</dir></fontconfig>"""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With several processes: the tests of a front end in one of them, which has its server and its page once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFrontEnd(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return re.search(r"\[(\w+)", nodeid).group(1)

    return ByFrontEnd(config, log)


def pytest_collection_modifyitems(config, items):
    """Leaves out the other two editors, unless a test is quick and on all of them, or all are asked for."""
    if config.getoption("--every-editor"):
        return
    left = [item for item in items if not (item.get_closest_marker("every_editor") or _is_one_of_two(item))]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def _is_one_of_two(item: pytest.Item) -> bool:
    given = getattr(item, "callspec", None)
    if not given or "front_end" not in given.params:
        return True
    editors, turns = TWO_EDITORS, item.get_closest_marker("in_turns")
    if turns:  # each value in one of the two, as they come
        editors = (TWO_EDITORS[given.indices[turns.args[0]] % 2],)
    return (given.params["front_end"], given.params["renderer"]) in editors


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    if report.failed and report.when == "call" and (editor := item.funcargs.get("editor")):
        editor.screenshot(f"failed-{item.originalname}")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    fonts = tmp_path_factory.mktemp("fonts") / "fonts.conf"
    fonts.write_text(FONTS.format(font=environment.obtain_chinese_font()))
    with chromium(FONTCONFIG_FILE=str(fonts)) as running:
        yield running


@pytest.fixture(scope="session")
def models(comfyui, tmp_path_factory, worker_id):
    """Made once for all processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "models"
    with FileLock(f"{folder}.lock"):
        return folder if folder.is_dir() else build_models(comfyui, folder)


@pytest.fixture(scope="session", params=FRONT_ENDS)
def front_end(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def server(comfyui, front_end, models, tmp_path_factory):
    root = FRONT_ENDS[front_end]
    arguments = ["--cache-lru", "1000"]  # what one renderer had run, the other shows
    arguments += ["--front-end-root", str(root())] if root else []
    with small_server(comfyui, tmp_path_factory.mktemp("host"), models, arguments) as running:
        yield running


@pytest.fixture(scope="session")
def pages(browser, server, front_end, request):
    """The editor's page by the language of its user's browser, opened once."""
    opened: dict[str, Editor] = {}

    def page(language: str) -> Editor:
        if language not in opened:
            new = browser.new_page(viewport={"width": 1600, "height": 900}, locale=language)
            new.set_default_timeout(60_000)
            new.add_init_script(f"for (const key of {DISMISSED}) localStorage.setItem(key, true)")
            opened[language] = Editor(new, server, front_end, request.config.getoption("--write-docs"))
            open_editor(new, server.address)
        return opened[language]

    return page


@pytest.fixture
def language() -> str:
    return "en"


@pytest.fixture(scope="session", params=RENDERERS)
def renderer(request) -> str:
    return request.param


@pytest.fixture
def editor(pages, renderer, language):
    """An empty graph in the front end, drawn by the renderer; an error that the page reports fails the test."""
    editor = pages(language)
    editor.errors.clear()
    editor.draw_by(renderer)
    editor.clear()
    yield editor
    assert not editor.errors, "\n".join(editor.errors)


class Editor:
    """A page with the editor, and what a person does there."""

    def __init__(self, page: Page, server: Server, front_end: str, write_docs: bool = False):
        self.page, self.server, self.front_end, self.renderer = page, server, front_end, ""
        self.write_docs = write_docs
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self._note(f"{error.message}\n{error.stack}"))
        page.on("console", lambda said: said.type == "error" and self._note(f"{said.text} {said.location['url']}"))

    def _note(self, text: str) -> None:
        if not OF_THE_FRONT_END.search(text):
            self.errors.append(text)

    @property
    def version(self) -> tuple[int, int]:
        """Of the front end."""
        major, minor = self.page.evaluate("window.__COMFYUI_FRONTEND_VERSION__").split(".")[:2]
        return int(major), int(minor)

    def run(self, function: str, argument=None):
        """What a JavaScript function of the app, the class LiteGraph and an argument returns."""
        call = f"""async (argument) => {{
            const app = window.comfyAPI.app.app
            return await ({function})(app, window.LiteGraph ?? window.comfyAPI.litegraph.LiteGraph, argument)
        }}"""
        return self.page.evaluate(call, argument)

    def set(self, **settings) -> None:
        """Settings by the last parts of their names: `VueNodes.Enabled` is `VueNodes__Enabled`."""
        for name, value in settings.items():
            change = "(app, _, [name, value]) => app.extensionManager.setting.set(name, value)"
            self.run(change, [f"Comfy.{name.replace('__', '.')}", value])

    def draw_by(self, renderer: str) -> None:
        if renderer != self.renderer:
            self.set(VueNodes__Enabled=RENDERERS[renderer])
            self.renderer = renderer

    def clear(self) -> None:
        """An empty graph at natural size, and nothing open beside it."""
        for _ in range(10):  # one dialog may cover another
            self.page.keyboard.press("Escape")
            if not self.page.get_by_role("dialog").count():
                break
            self.page.wait_for_timeout(200)
        close = self.page.get_by_role("dialog").get_by_role("button", name="Close")  # some do not heed the key
        if close.count():
            close.first.click()
        self.run("""async (app) => {
            await app.extensionManager.setting.set("Comfy.RightSidePanel.IsOpen", false).catch(() => {})  // not in 1.32
            app.clean()
            app.extensionManager.sidebarTab.activeSidebarTabId = null
            app.extensionManager.toast.removeAll?.()  // messages cover nodes; not in 1.32
            app.canvas.ds.scale = 1
            app.canvas.ds.offset = [80, 120]
            app.canvas.setDirty(true, true)
        }""")

    def fit(self, settle: int = 500) -> None:
        """The whole graph in view, after so many milliseconds."""
        self.run("(app) => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.page.wait_for_timeout(settle)

    def load(self, graph: dict) -> dict:
        """Loads a workflow; what of it the front end does not know, and what it would queue."""
        return self.page.evaluate(LOAD, graph)

    def add(self, kind: str, x: float, y: float) -> int:
        """Adds a node; its id."""
        return self.run("""async (app, LiteGraph, [kind, ...at]) => {
            const node = LiteGraph.createNode(kind)
            node.pos = at
            app.graph.add(node)
            app.canvas.draw(true, true)
            await new Promise((resolve) => requestAnimationFrame(resolve))
            return node.id
        }""", [kind, x, y])  # fmt: skip

    def queued(self) -> dict:
        """What Run would queue."""
        return self.run("async (app) => (await app.graphToPrompt()).output")

    def press_run(self) -> None:
        self.page.get_by_role("button", name="Run", exact=True).click()

    def picture(self) -> dict:
        """Waits until Save Image shows its picture, which must be in view; its file on the server."""
        self.page.wait_for_function(SHOWN, timeout=120_000)
        outputs = self.run("(app) => Object.values(app.nodeOutputs)")
        (picture,) = (one for output in outputs for one in output.get("images") or [] if one["type"] == "output")
        return picture

    def point(self, of_node: str, node: int) -> tuple[float, float]:
        """Where a point of a node, in the graph's units, is on the page."""
        return tuple(self.run(
            f"(app, _, id) => app.canvasPosToClientPos((({of_node})(app.graph.getNodeById(id))))", node
        ))  # fmt: skip

    def select(self, node: int) -> None:
        """Clicks the node's title."""
        self.page.mouse.click(*self.point("(node) => [node.pos[0] + node.size[0] / 2, node.pos[1] - 15]", node))

    def drop(self, name: str, content: bytes) -> None:
        """Drops a file on the canvas, as from a folder of the desktop."""
        data = self.page.evaluate_handle("""([name, content]) => {
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0))
            const data = new DataTransfer()
            data.items.add(new File([bytes], name, {type: "image/png"}))
            return data
        }""", [name, base64.b64encode(content).decode()])  # fmt: skip
        self.page.locator("#graph-canvas").dispatch_event("drop", {"dataTransfer": data})

    def open_templates(self) -> Locator:
        self.page.get_by_role("button", name="Templates").first.click()
        dialog = self.page.get_by_role("dialog")
        dialog.wait_for()
        return dialog

    def search(self) -> Callable[[str], list[str]]:
        """Opens the search for nodes; a function from words to the titles that are found, best first."""
        field = self.page.locator("input[role=combobox]:focus")
        for _ in range(3):  # while a search is being closed, a double click opens none
            self.page.mouse.dblclick(800, 600)
            try:
                field.wait_for(timeout=5_000)
                break
            except TimeoutError:
                continue

        def titles(words: str) -> list[str]:
            field.fill(words)
            self.page.wait_for_timeout(300)  # the search waits for the end of the typing
            texts = [option.inner_text() for option in self.page.get_by_role("option").all()]
            return [text.replace("\xa0", " ").split("\n")[0].strip() for text in texts if text.strip()]

        return titles

    def open_template(self, title: str) -> None:
        """Of our pack, from the dialog; some editors add cards as the list is scrolled."""
        dialog = self.open_templates()
        dialog.get_by_role("button", name=PACK).click()
        cards, card = dialog.locator(CARDS), dialog.get_by_test_id(f"template-workflow-{title}")
        cards.first.wait_for()
        for _ in range(20):
            if card.count():
                break
            cards.last.scroll_into_view_if_needed()
            self.page.wait_for_timeout(100)
        for patience in (5_000, 5_000, 60_000):  # a click while the list is drawn again is lost
            try:
                if dialog.is_visible():  # it closes late on a busy machine
                    card.click(timeout=patience)
                dialog.wait_for(state="hidden", timeout=patience)
                return
            except TimeoutError:
                if patience == 60_000:
                    raise

    def screenshot(self, name: str) -> Path:
        path = SCREENSHOTS / f"{name}-{self.front_end}-{self.renderer}.png"
        taken = self.page.screenshot(path=path)
        if self.write_docs and path.stem in SHOWN_IN_DOCS:
            file, part = SHOWN_IN_DOCS[path.stem]
            with Image.open(io.BytesIO(taken)) as picture:
                picture = picture.convert("RGB").crop(part)
            picture.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
            picture.save(IMAGES / f"{file}.jpg", quality=85, optimize=True)
        return path

    def open_help(self, node: int, title: str) -> Locator:
        """The help page of a node, by the button above it; the node may not be where the last click was."""
        self.select(node)
        self.page.get_by_test_id("info-button").click()
        shown = self.page.locator(".node-help-content")
        shown.get_by_role("heading", name=title, exact=True).wait_for()
        return shown
