"""The run of all benchmarks: the table, the JSON object, and what a failure does."""

import json
from pathlib import Path

import pytest
from subject_dla.tools.perf import _table
from subject_dla.tools.perf._table import TABLE, TAKE_FULL, Row, run_all

ROWS = (
    Row("fast", "a fast thing", 1.0, "first"),
    Row("slow", "a slow thing", 1.0, "first"),
    Row("counted", "as counted", "predicted", "second"),
    Row("lost", "what fails", 1.0, "third"),
)


def test_every_row_has_a_benchmark_and_every_key_one_row():
    files = {file.stem for file in Path(_table.__file__).parent.glob("[a-z]*.py")}
    assert {row.benchmark for row in TABLE} <= files and set(TAKE_FULL) <= {row.benchmark for row in TABLE}
    assert len({row.key for row in TABLE}) == len(TABLE)


def test_all_are_run_and_one_that_fails_is_shown(monkeypatch, capsys):
    results = {
        "first": ({"benchmark": "first", "fast": 0.5, "slow": 1.5, "device": "cpu"}, ""),
        "second": ({"counted": 0.52, "predicted": 0.5}, ""),
        "third": ({}, "no accelerator"),
    }
    runs = []
    monkeypatch.setattr(_table, "TABLE", ROWS)
    monkeypatch.setattr(_table, "TAKE_FULL", ("second",))
    monkeypatch.setattr(_table, "_run", lambda name, options: runs.append((name, options)) or results[name])
    assert run_all(["--full"]) == 1
    assert runs == [("first", []), ("second", ["--full"]), ("third", [])]
    *table, last = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table[2:]]
    assert cells == [
        ["fast", "0.500", "≤ 1", "yes"],
        ["slow", "1.500", "≤ 1", "no"],
        ["counted", "0.520", "0.500 ± 5 %", "yes"],
        ["lost", "failed", "≤ 1", "no accelerator"],
    ]
    result = json.loads(last)
    assert result["slow"] == 1.5 and result["lost"] is None and result["device"] == "cpu"
    assert result["failed"] == {"third": "no accelerator"}
    results["third"] = ({"lost": 1.0}, "")
    assert run_all([]) == 0
    results["third"] = ({"other": 1.0}, "")
    assert run_all([]) == 1 and "no lost in its JSON object" in capsys.readouterr().out


def test_an_interrupt_shows_what_was_measured(monkeypatch, capsys):
    def run(name, options):
        if name == "second":
            raise KeyboardInterrupt
        return {"fast": 0.5, "slow": 1.5}, ""

    monkeypatch.setattr(_table, "TABLE", ROWS)
    monkeypatch.setattr(_table, "_run", run)
    assert run_all([]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["fast"] == 0.5 and result["failed"] == {"second": "interrupted", "third": "not run"}


def test_the_last_line_of_a_failure_is_its_reason():
    assert _table._run("nothing", []) == ({}, "Which benchmark? There are: " + _names() + ".")
    with pytest.raises(SystemExit, match="one option, --full; found --fast"):
        run_all(["--fast"])


def _names():
    return ", ".join(sorted(file.stem for file in Path(_table.__file__).parent.glob("[a-z]*.py")))
