"""Makes the pack importable as `subject_dla`, as the host does, and marks each test with its folder's depth."""

import os
import runpy
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

# `python -m pytest` puts the working directory there, where the folder `nodes` covers the host's `nodes.py`
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
runpy.run_path(str(ROOT / "common" / "bootstrap.py"))["import_pack"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write the tables of docs/ that tests make")
    parser.addoption("--long", action="store_true", help="also the tests marked `long`")
    parser.addoption("--every-editor", action="store_true", help="browser tests: all in both renderers of both editors")
    parser.addoption("--host-title", help="name of a private host in the tables of docs/, in place of its version")


def pytest_configure(config: pytest.Config) -> None:
    from subject_dla.tests.small.families_table import FamiliesTable

    config.pluginmanager.register(FamiliesTable(config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(item.path.relative_to(TESTS).parts[0])
    if not config.getoption("--long") and not any("::" in argument for argument in config.args):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture(scope="session")
def comfyui() -> Path:
    folder = Path(os.environ.get("COMFYUI_PATH", ""))
    assert (folder / "main.py").is_file(), f"COMFYUI_PATH is {str(folder)!r}, expected a checkout; nox sets it"
    return folder
