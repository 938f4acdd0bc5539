"""docs/families.md: what the tests showed of each DiT family on each host.

A test says by a marker what it shows, and of which family if none of its parameters is one:

    @pytest.mark.shows("strengths", "regions")
    @pytest.mark.shows("trains", family="krea2", found="refused")

`nox -s tests -- --long -m shows --write-docs` writes the table of the host at COMFYUI_PATH, and fails where a cell
would say nothing; with `-k` or without `--long`, only the cells of the tests that ran. A run of all tests compares:
what the page says was found must be found again.
"""

import os
import re
import runpy
from collections import defaultdict
from pathlib import Path

import pytest

from ...common.markdown import markdown
from ...loaders.backbones import BACKBONES

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "families.md"
TABLE = re.compile(r"^## (ComfyUI .+)\n\n((?:\|.*\n)+)", re.MULTILINE)
OTHERS = {
    "flux3": "FLUX 3, by its name", "unknown": "one without a record", "reads none": "one that reads no references",
}  # fmt: skip
ROWS = {name: backbone.title for name, backbone in BACKBONES.items()} | {"klein": "FLUX.2 Klein"}
ROWS = dict(sorted(ROWS.items(), key=lambda row: row[1])) | OTHERS
COLUMNS = (
    "detected", "parity both", "context off", "references off", "strengths", "regions", "K/V cache",
    "stock context equal", "MLLM sources", "trains",
)  # fmt: skip
ABSENT = "not on this host"  # also how a test says why it is skipped
WORDS = ("run", "refused", "reported", "none", ABSENT, "not run")
UNASKED = [(row, column) for row in OTHERS.values() for column in COLUMNS[6:9]]  # of families that the pack lacks


def read_page() -> dict[str, dict[tuple[str, str], str]]:
    """Host -> (family, column) -> cell."""
    hosts = {}
    for host, table in TABLE.findall(PAGE.read_text("utf-8")):
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        hosts[host] = {(row, column): cell for row, *cells in rows for column, cell in zip(head[1:], cells)}
    return hosts


def write_page(hosts: dict[str, dict[tuple[str, str], str]]) -> None:
    """Replaces the tables; a family that is new to a host's is "not run" there."""
    parts = [TABLE.sub("", PAGE.read_text("utf-8")).strip()]
    for host in sorted(hosts, key=lambda host: [int(part) for part in re.findall(r"\d+", host)]):
        rows = [[row, *(hosts[host].get((row, column), WORDS[-1]) for column in COLUMNS)] for row in ROWS.values()]
        parts.append(f"## {host}\n\n{markdown([['family', *COLUMNS], *rows])}")
    PAGE.write_text("\n\n".join(parts) + "\n", "utf-8")


class FamiliesTable:
    """The pytest plugin; where tests run in several processes, the one that has all reports writes."""

    def __init__(self, config: pytest.Config):
        self.config, self.found = config, defaultdict(set, {cell: {"none"} for cell in UNASKED})

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """A marker's cells travel in its test's report."""
        for item in items:
            params = item.callspec.params.values() if hasattr(item, "callspec") else ()
            for mark in item.iter_markers("shows"):
                names = [mark.kwargs["family"]] if "family" in mark.kwargs else params
                families, word = [n for n in names if isinstance(n, str) and n in ROWS], mark.kwargs.get("found", "run")
                if len(families) != 1 or word not in WORDS or not {*mark.args} <= {*COLUMNS}:
                    expected = f"one of the families {', '.join(ROWS)}, of {COLUMNS} and of {WORDS}"
                    raise pytest.UsageError(f"{item.nodeid}: {mark} has families {families}, expected {expected}")
                item.user_properties += [("shows", (ROWS[families[0]], column, word)) for column in mark.args]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        absent = report.skipped and ABSENT in str(report.longrepr)
        for name, value in report.user_properties:
            if name == "shows" and (absent or report.when == "call" and report.passed):
                self.found[tuple(value[:2])].add(ABSENT if absent else value[2])

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, exitstatus: int):
        """Writes or compares after a run without failures; some of the tests write their cells alone."""
        yield
        option, host = self.config.option, TESTS / "host"
        covered = any(Path(argument).resolve() in (host, *host.parents) for argument in self.config.args)
        asked = covered and not option.keyword and option.markexpr in ("", "shows")
        whole = asked and option.long  # else some cells' tests were left out
        writes = option.write_docs and len(self.found) > len(UNASKED)
        if exitstatus or option.collectonly or hasattr(self.config, "workerinput") or not (asked or writes):
            return
        cells = {}
        for cell, words in self.found.items():  # what some of its tests found, others may lack on this host
            cells[cell] = "; ".join(word for word in WORDS if word in (words - {ABSENT} or words))
        empty = [f"{row}: {column}" for row in ROWS.values() for column in COLUMNS if not cells.get((row, column))]
        if whole and empty:
            pytest.exit(f"No test with the marker `shows` says anything of {', '.join(empty)}.", 1)
        file = Path(os.environ.get("COMFYUI_PATH", "")) / "comfyui_version.py"
        title = f"ComfyUI {option.host_title or runpy.run_path(str(file))['__version__']}"
        hosts = read_page()
        if writes:
            write_page(hosts | {title: cells if whole else {**hosts.get(title, {}), **cells}})
            return
        said = {cell: word for cell, word in hosts.get(title, {}).items() if word not in WORDS[-2:]}
        said = said if whole else {cell: word for cell, word in said.items() if cells.get(cell)}
        if wrong := [f"{': '.join(cell)}: {word}" for cell, word in said.items() if word != cells.get(cell)]:
            pytest.exit(f"{PAGE.name} says of {title} what was not found: {', '.join(wrong)}. See CONTRIBUTING.md.", 1)
