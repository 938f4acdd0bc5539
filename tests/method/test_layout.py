"""Who imports whom: nothing upward and no circle, as docs/architecture.md draws it, read from the source text."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACK = "subject_dla"
HOST = {"app", "comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview"}
HOST |= {"node_helpers", "nodes", "server", "utils"}
BELOW = {  # folder -> the folders that it may import, besides itself
    "common": set(),
    "dla": {"common"},
    "loaders": {"common", "dla"},
    "sampling": {"common", "dla", "loaders"},
    "evaluation": {"common", "dla", "loaders"},
    "training": {"common", "dla", "loaders", "sampling"},
    "nodes": {"common", "dla", "loaders", "sampling", "evaluation", "training"},
    "tools": {"common", "evaluation"},
    "tools/perf": {"common", "dla", "loaders", "sampling", "evaluation", "training", "nodes", "tools", "tests"},
    "tools/faults": {
        "common",
        "dla",
        "loaders",
        "sampling",
        "evaluation",
        "training",
        "nodes",
        "tools",
        "tests",
        "demo",
    },
    "demo": {"common", "dla", "loaders", "sampling", "evaluation", "training", "nodes", "tools"},
}
WITHOUT_HOST = ("common/", "dla/", "evaluation/", "sampling/", "tools/")
WITH_HOST = ("common/bootstrap.py", "tools/perf/", "tools/faults/") + tuple(
    f"sampling/{name}.py" for name in ("patch", "image_guidance", "guider", "sample")
)


def module_file(root: Path, module: Path | str) -> Path | None:
    """The file of a module given as a path below the root, None where there is none."""
    return next((file for file in (root / f"{module}.py", root / module / "__init__.py") if file.is_file()), None)


def imports(root: Path, file: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, inner ones too: of the pack's as paths below the root, of others as `/name`."""
    package = file.parent.relative_to(root).parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, "/" + alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"/{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            target = Path(*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            found = {target / a.name if module_file(root, target / a.name) else target for a in node.names}
            yield from ((node.lineno, module.as_posix()) for module in found)
        elif isinstance(node, ast.Call):
            if getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
                yield from ((node.lineno, f"/{a.value}") for a in node.args[:1] if isinstance(a, ast.Constant))


def sources(root: Path) -> list[Path]:
    """Every source file of the pack, tests left out."""
    return sorted(file for folder in BELOW if "/" not in folder for file in (root / folder).rglob("*.py"))


def wrong_imports(root: Path) -> list[str]:
    """Imports that the layout does not allow, as file:line and the reason."""
    wrong = []
    for file in sources(root):
        name = file.relative_to(root).as_posix()
        own = name.split("/")[0]
        below = BELOW["/".join(name.split("/")[:2]) if name.startswith(("tools/perf/", "tools/faults/")) else own]
        for line, target in imports(root, file):
            top = target.lstrip("/").split("/")[0].split(".")[0]
            if not target.startswith("/"):
                if top not in (own, *below):
                    wrong.append(f"{name}:{line} imports {target}")
            elif top == "nodes" and name != "loaders/host.py":
                wrong.append(f"{name}:{line} imports the host's nodes.py, which is for loaders/host.py alone")
            elif top == PACK or (top in BELOW and top not in HOST):
                wrong.append(f"{name}:{line} imports {target[1:]} by its absolute name")
            elif top in HOST and name.startswith(WITHOUT_HOST) and not name.startswith(WITH_HOST):
                wrong.append(f"{name}:{line} imports the host's {target[1:]}")
    return wrong


def circle(root: Path) -> list[str]:
    """The files of one import circle, [] where there is none."""
    graph = {}
    for file in sources(root):
        targets = {module_file(root, target) for _, target in imports(root, file) if not target.startswith("/")}
        graph[file] = targets - {None, file}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [file.relative_to(root).as_posix() for file in error.args[1]]
    return []


def test_no_import_points_upward_and_none_in_a_circle():
    assert wrong_imports(ROOT) == [] and circle(ROOT) == []


def test_every_folder_with_code_is_in_the_layout():
    folders = {file.relative_to(ROOT).parts[0] for file in ROOT.glob("[!.]*/**/*.py")}
    assert folders - {"output"} == {folder for folder in BELOW if "/" not in folder} | {"tests"}


WRONG = {
    "upward": ("dla/config.py", "from ..loaders import vae", "imports loaders/vae"),
    "upward, inside": ("dla/config.py", "def f():\n    from ..loaders.vae import load", "imports loaders/vae"),
    "upward, beside": ("sampling/patch.py", "from ..evaluation import identity", "imports evaluation"),
    "a module of the root": ("dla/config.py", "from .. import WEB_DIRECTORY", "imports ."),
    "absolute": ("loaders/vae.py", "import subject_dla.dla.config", "by its absolute name"),
    "absolute, from": ("loaders/vae.py", "from dla import config", "by its absolute name"),
    "the host's nodes": ("loaders/vae.py", "import nodes", "for loaders/host.py alone"),
    "the host's nodes, by a call": ("nodes/load.py", "importlib.import_module('nodes')", "for loaders/host.py alone"),
    "the host in the method": ("dla/config.py", "import comfy.utils as u", "imports the host's comfy.utils"),
    "the host in a clock": ("sampling/clock.py", "from comfy import ops", "imports the host's comfy.ops"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_import_is_found(tmp_path, case):
    name, text, reason = WRONG[case]
    for file in ("dla/config.py", "loaders/vae.py", "loaders/host.py", "sampling/patch.py", name):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("import torch\n")
    (tmp_path / "loaders/host.py").write_text("import nodes\n")
    (tmp_path / "sampling/patch.py").write_text("import comfy.utils\nfrom ..loaders import vae\n")
    assert wrong_imports(tmp_path) == []
    (tmp_path / name).write_text(text)
    (found,) = wrong_imports(tmp_path)
    assert found.startswith(f"{name}:") and reason in found


def test_a_circle_is_found(tmp_path):
    (tmp_path / "dla").mkdir()
    for name, text in (("a", "from . import b"), ("b", "def f():\n    from .c import x"), ("c", "from .a import y")):
        (tmp_path / "dla" / f"{name}.py").write_text(text)
    assert set(circle(tmp_path)) == {"dla/a.py", "dla/b.py", "dla/c.py"}
    (tmp_path / "dla" / "c.py").write_text("")
    assert circle(tmp_path) == []
