"""Tables of measured keys: what each should be, the files that measure them, and the run of them all.

Used by `tools/perf` (`nox -s bench`) and `tools/faults` (`nox -s faults`), which each have a `_table.py`.
"""

import argparse
import ast
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..common.bootstrap import ROOT
from ..common.console import say
from ..common.markdown import markdown

NEAR = 0.05  # what "±" allows


class Row(NamedTuple):
    """One key of the JSON objects that the files print, and what it should be.

    Attributes:
        key: Its name.
        what: Its description in the table.
        limit: A number, or the key of the same JSON object that it is compared with.
        files: One file of the folder, or several whose values are added.
        sign: "≤", "≥", "=", or "±" for within 5 %.
    """

    key: str
    what: str
    limit: float | str
    files: str | tuple[str, ...]
    sign: str = "≤"

    @property
    def measured_by(self) -> tuple[str, ...]:
        """The files that measure it."""
        return (self.files,) if isinstance(self.files, str) else self.files

    def verdict(self, result: dict[str, Any]) -> str:
        """Whether a JSON object has what this row asks for: "yes", "no", or "?" where its limit is missing."""
        value, limit = result[self.key], result.get(self.limit) if isinstance(self.limit, str) else self.limit
        if limit is None:
            return "?"
        if self.sign == "±":
            return "yes" if abs(value / limit - 1) <= NEAR else "no"
        return "yes" if {"≤": value <= limit, "≥": value >= limit, "=": value == limit}[self.sign] else "no"

    def to_reach(self, result: dict[str, Any]) -> str:
        """The limit as the table shows it."""
        limit = self.limit if isinstance(self.limit, float | int) else result.get(self.limit)
        if limit is None:
            return str(self.limit)
        return f"{limit:.3f} ± 5 %" if self.sign == "±" else f"{self.sign} {limit:g}"


class Table(NamedTuple):
    """The rows that the files of a folder measure.

    Attributes:
        package: Name of the folder's package, `__package__` of its modules.
        session: Name of the nox session.
        noun: What one file is called.
        rows: Each key once.
        take: By option, such as "--full", the files that take it.
    """

    package: str
    session: str
    noun: str
    rows: tuple[Row, ...]
    take: dict[str, tuple[str, ...]]

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return ROOT.joinpath(*self.package.split(".")[1:])

    @property
    def names(self) -> list[str]:
        """The files that can be run by name."""
        return sorted(file.stem for file in self.folder.glob("[a-z]*.py"))


def main(table: Table, argv: Sequence[str]) -> None:
    """`nox -s SESSION -- NAME [options]`: runs one file; without a name those of the table. Ends the process."""
    if argv[:1] in (["-h"], ["--help"]):
        options = f"{', '.join(table.take)} or -- NAME [options]" if table.take else "NAME [options]"
        print(f"nox -s {table.session} [-- {options}]\n\nWithout a name: all of the table, which takes long. Names:\n")
        for name in table.names:
            print(f"  {name:20} {_first_line(table.folder / name)}")
        print(f"\nOptions of one: nox -s {table.session} -- NAME --help")
        sys.exit()
    if not argv or argv[0].startswith("-"):
        sys.exit(run_all(table, list(argv)))
    if argv[0] not in table.names:
        sys.exit(f"Which {table.noun}? There are: {', '.join(table.names)}.")
    importlib.import_module(f"{table.package}.{argv[0]}").main(list(argv[1:]))
    sys.exit()


def _first_line(file: Path) -> str:
    """What a file of a table measures, by its docstring: importing it takes the host."""
    text = ast.get_docstring(ast.parse(file.with_suffix(".py").read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0]


def parser(session: str, module: str, text: str | None) -> argparse.ArgumentParser:
    """The command line of one file of a table, whose help is all that the file's docstring says.

    Args:
        session: Name of the nox session.
        module: The file's `__name__`.
        text: Its `__doc__`.
    """
    return argparse.ArgumentParser(
        prog=f"nox -s {session} -- {module.rpartition('.')[2]}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_all(table: Table, options: list[str]) -> int:
    """Runs every file of the table in a process of its own; prints the table and one JSON object of all keys.

    Args:
        table: What to run.
        options: Empty, or one of `table.take`, for the files that take it.

    Returns:
        The exit status: 0, or 1 where a file failed or Ctrl-C ended it. A limit that is not reached is no failure.
    """
    if options and (len(options) > 1 or options[0] not in table.take):
        known = f"there is one option, {', '.join(table.take)}" if table.take else "there are no options"
        sys.exit(f"Without a {table.noun}'s name {known}; found {' '.join(options)}.")
    results: dict[str, dict[str, Any]] = {}
    problems: dict[str, str] = {}
    for name in dict.fromkeys(name for row in table.rows for name in row.measured_by):
        if "interrupted" in problems.values():
            results[name], problems[name] = {}, "not run"
            continue
        say(f"{name} ...")
        try:
            result, problem = _run(table, name, [option for option in options if name in table.take[option]])
        except KeyboardInterrupt:  # what was measured before is not lost
            result, problem = {}, "interrupted"
        missing = [row.key for row in table.rows if name in row.measured_by and row.key not in result]
        if not problem and missing:
            problem = f"no {', '.join(missing)} in its JSON object"
        results[name] = result
        if problem:
            problems[name] = problem
        say(f"{name}: {problem or json.dumps(result)}")
    everything: dict[str, Any] = {}
    for result in results.values():
        for key, value in result.items():
            everything[key] = everything[key] + value if isinstance(value, list) and key in everything else value
    failed = {row: [problems[name] for name in row.measured_by if name in problems] for row in table.rows}
    for row, reasons in failed.items():
        if len(row.measured_by) != 1:
            everything[row.key] = None if reasons else sum(results[name][row.key] for name in row.measured_by)
        everything.setdefault(row.key, None)
    lines = [("what", "key", "measured", "to reach", "reached")]
    for row, reasons in failed.items():
        if reasons:
            lines.append((row.what, row.key, "failed", row.to_reach({}), "; ".join(reasons)))
        else:
            measured = everything[row.key]
            shown = str(measured) if isinstance(measured, int) else f"{measured:.3f}"
            lines.append((row.what, row.key, shown, row.to_reach(everything), row.verdict(everything)))
    print(markdown(lines))
    everything.pop(table.noun, None)
    devices = sorted({str(result["device"]) for result in results.values() if "device" in result})
    everything |= {"machine": f"{platform.platform()}, {os.cpu_count()} CPUs", "device": ", ".join(devices)}
    print(json.dumps(everything | {"failed": problems}))
    return 1 if problems else 0


def _run(table: Table, name: str, options: list[str]) -> tuple[dict[str, Any], str]:
    """The JSON object of a file and "", or {} and the last line of what it said."""
    module = ".".join(table.package.split(".")[1:])
    command = [sys.executable, str(ROOT / "common" / "bootstrap.py"), module, name, *options]
    last = ""
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                sys.stderr.write(line)
                last = line.strip() or last
        output.seek(0)
        printed = output.read().strip().splitlines()
    if process.returncode:
        return {}, last or f"exit status {process.returncode}"
    try:
        return dict(json.loads(printed[-1])), ""
    except (IndexError, ValueError):
        return {}, "its last line is not a JSON object"
