"""The run of all benchmarks or faults: the table, the JSON object, and what a failure does."""

import json

import pytest
from subject_dla.tools import tables
from subject_dla.tools.faults._table import TABLE as FAULTS
from subject_dla.tools.perf._table import TABLE as BENCHMARKS
from subject_dla.tools.tables import Row, Table, run_all

ROWS = (
    Row("fast", "a fast thing", 1.0, "first"),
    Row("slow", "a slow thing", 1.0, "first"),
    Row("counted", "as counted", "predicted", "second", "±"),
    Row("lost", "what fails", 1.0, "third"),
)
SMALL = Table("subject_dla.tools.perf", "bench", "benchmark", ROWS, {"--full": ("second",)})


@pytest.mark.parametrize("table", [BENCHMARKS, FAULTS], ids=lambda table: table.session)
def test_every_row_has_a_file_and_every_key_one_row(table):
    measured_by = {name for row in table.rows for name in row.measured_by}
    assert measured_by <= set(table.names) and {name for names in table.take.values() for name in names} <= measured_by
    assert len({row.key for row in table.rows}) == len(table.rows)
    assert {row.limit for row in table.rows if row.sign != "±" and isinstance(row.limit, str)} <= {
        row.key for row in table.rows
    }


def test_all_are_run_and_one_that_fails_is_shown(monkeypatch, capsys):
    results = {
        "first": ({"benchmark": "first", "fast": 0.5, "slow": 1.5, "device": "cpu"}, ""),
        "second": ({"counted": 0.52, "predicted": 0.5}, ""),
        "third": ({}, "no accelerator"),
    }
    runs = []
    monkeypatch.setattr(tables, "_run", lambda table, name, options: runs.append((name, options)) or results[name])
    assert run_all(SMALL, ["--full"]) == 1
    assert runs == [("first", []), ("second", ["--full"]), ("third", [])]
    *table, last = capsys.readouterr().out.splitlines()
    assert cells(table) == [
        ["fast", "0.500", "≤ 1", "yes"],
        ["slow", "1.500", "≤ 1", "no"],
        ["counted", "0.520", "0.500 ± 5 %", "yes"],
        ["lost", "failed", "≤ 1", "no accelerator"],
    ]
    result = json.loads(last)
    assert result["slow"] == 1.5 and result["lost"] is None and result["device"] == "cpu"
    assert result["failed"] == {"third": "no accelerator"} and "benchmark" not in result
    results["third"] = ({"lost": 1.0}, "")
    assert run_all(SMALL, []) == 0
    results["third"] = ({"other": 1.0}, "")
    assert run_all(SMALL, []) == 1 and "no lost in its JSON object" in capsys.readouterr().out


def cells(table):
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in table[2:]]


def test_counts_of_several_files_are_added_and_compared(monkeypatch, capsys):
    rows = (
        Row("tried", "cases", 5, ("one", "two"), "≥"),
        Row("clear", "of them", "tried", ("one", "two"), "="),
        Row("restarts", "none", 0, "one"),
    )
    results = {
        "one": ({"tried": 4, "clear": 4, "restarts": 0, "unclear": []}, ""),
        "two": ({"tried": 2, "clear": 1, "unclear": ["a file"]}, ""),
    }
    monkeypatch.setattr(tables, "_run", lambda table, name, options: results[name])
    table = SMALL._replace(rows=rows, take={})
    assert run_all(table, []) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert cells(lines) == [
        ["tried", "6", "≥ 5", "yes"],
        ["clear", "5", "= 6", "no"],
        ["restarts", "0", "≤ 0", "yes"],
    ]
    result = json.loads(last)
    assert (result["tried"], result["clear"], result["unclear"]) == (6, 5, ["a file"])
    results["two"] = ({}, "killed")
    assert run_all(table, []) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert cells(lines)[:2] == [["tried", "failed", "≥ 5", "killed"], ["clear", "failed", "tried", "killed"]]
    assert json.loads(last)["tried"] is None


def test_an_interrupt_shows_what_was_measured(monkeypatch, capsys):
    def run(table, name, options):
        if name == "second":
            raise KeyboardInterrupt
        return {"fast": 0.5, "slow": 1.5}, ""

    monkeypatch.setattr(tables, "_run", run)
    assert run_all(SMALL, []) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["fast"] == 0.5 and result["failed"] == {"second": "interrupted", "third": "not run"}


@pytest.mark.parametrize("table", [BENCHMARKS, FAULTS], ids=lambda table: table.session)
def test_the_last_line_of_a_failure_is_its_reason(table):
    names = ", ".join(table.names)
    assert tables._run(table, "nothing", []) == ({}, f"Which {table.noun}? There are: {names}.")
    with pytest.raises(SystemExit, match="; found --fast"):
        run_all(table, ["--fast"])
    with pytest.raises(SystemExit, match="one option, --full; found --fast"):
        run_all(BENCHMARKS, ["--fast"])
