"""What the pack is to reach: the one list of keys, limits and benchmarks, and the run of them all."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

from ...common.bootstrap import ROOT
from ...common.console import say
from ...common.markdown import markdown


class Row(NamedTuple):
    """One key of a benchmark's JSON and what it should be."""

    key: str
    what: str
    limit: float | str  # at most; a string: the key of the same JSON object that it equals within 5 %
    benchmark: str  # file of this folder

    def reached(self, result: dict[str, Any]) -> bool:
        """Whether a benchmark's JSON object has what this row asks for."""
        if isinstance(self.limit, str):
            return abs(result[self.key] / result[self.limit] - 1) <= 0.05
        return result[self.key] <= self.limit

    def to_reach(self, result: dict[str, Any]) -> str:
        """The limit as the table shows it."""
        if isinstance(self.limit, str):
            return f"{result[self.limit]:.3f} ± 5 %" if self.limit in result else self.limit
        return f"≤ {self.limit:g}"


TABLE = (
    Row("import_seconds", "importing the pack at server start, s", 0.10, "importing"),
    Row("step_overhead", "a step at strengths 1/1 with the patch over the host's", 1.01, "steps"),
    Row("step_overhead_guider", "the same with the guider", 1.01, "steps"),
    Row(
        "staged_over_both",
        "a run on the paper's schedule over one with both throughout",
        "staged_over_both_predicted",
        "staged",
    ),
    Row(
        "staged_over_both_2048", "the same with four times the MLLM tokens", "staged_over_both_2048_predicted", "staged"
    ),
    Row("strength_overhead", "a step at strengths between 0 and 1 over one at 1/1 (on a CPU: 1.05)", 1.10, "steps"),
    Row("region_overhead", "a step with two references bound to regions over one unbound", 1.10, "steps"),
    Row("dla_time", "the DLA with scores from heads over its plain form", 0.90, "dla"),
    Row("dla_subset_time", "every third layer over the plain form of all", 0.35, "dla"),
    Row("dla_memory", "its peak beyond inputs and outputs over the input", 0.25, "dla"),
    Row("batch_drift", "100 prompts on one subject: last ten over first ten", 1.05, "batch"),
    Row("batch_growth", "growth of the server's memory over them", 0.02, "batch"),
    Row(
        "million_start",
        "training: start to first step the second time (100,000 pairs; --full: a million), s",
        30,
        "million",
    ),
    Row("million_memory", "memory that it takes beyond the process before, GB", 1, "million"),
    Row("fleet", "a benchmark over N servers: N times its time over that of one", 1.15, "fleet"),
    Row("reencode", "a new prompt on references seen before over the first", 0.15, "encode"),
    Row("vae_encodes", "VAE encodes for a new prompt on the same reference", 0, "encode"),
)
TAKE_FULL: tuple[str, ...] = ("steps", "staged", "million", "dla", "encode")  # the benchmarks that know --full


def run_all(options: list[str]) -> int:
    """Runs every benchmark of the table in a process of its own; prints the table and one JSON object of all keys.

    Args:
        options: Empty, or `--full` for the benchmarks that take it.

    Returns:
        The exit status: 0, or 1 where a benchmark failed or Ctrl-C ended it. A limit that is not reached is no failure.
    """
    if options not in ([], ["--full"]):
        sys.exit(f"Without a benchmark's name there is one option, --full; found {' '.join(options)}.")
    results: dict[str, dict[str, Any]] = {}
    problems: dict[str, str] = {}
    for name in dict.fromkeys(row.benchmark for row in TABLE):
        if "interrupted" in problems.values():
            results[name], problems[name] = {}, "not run"
            continue
        say(f"{name} ...")
        try:
            result, problem = _run(name, options if name in TAKE_FULL else [])
        except KeyboardInterrupt:  # what was measured before is not lost
            result, problem = {}, "interrupted"
        missing = [row.key for row in TABLE if row.benchmark == name and row.key not in result]
        if not problem and missing:
            problem = f"no {', '.join(missing)} in its JSON object"
        results[name] = result
        if problem:
            problems[name] = problem
        say(f"{name}: {problem or json.dumps(result)}")
    lines = [("what", "key", "measured", "to reach", "reached")]
    for row in TABLE:
        result = results[row.benchmark]
        if row.benchmark in problems:
            lines.append((row.what, row.key, "failed", row.to_reach({}), problems[row.benchmark]))
        else:
            reached = "yes" if row.reached(result) else "no"
            lines.append((row.what, row.key, f"{result[row.key]:.3f}", row.to_reach(result), reached))
    print(markdown(lines))
    everything: dict[str, Any] = {key: value for result in results.values() for key, value in result.items()}
    for row in TABLE:
        everything.setdefault(row.key, None)
    everything.pop("benchmark", None)
    devices = sorted({str(result["device"]) for result in results.values() if "device" in result})
    everything |= {"machine": f"{platform.platform()}, {os.cpu_count()} CPUs", "device": ", ".join(devices)}
    print(json.dumps(everything | {"failed": problems}))
    return 1 if problems else 0


def _run(name: str, options: list[str]) -> tuple[dict[str, Any], str]:
    """The JSON object of a benchmark and "", or {} and the last line of what it said."""
    command = [sys.executable, str(ROOT / "common" / "bootstrap.py"), "tools.perf", name, *options]
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
