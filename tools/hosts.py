"""The tests on several hosts: `nox -s hosts -- PATH…` prints a matrix and, last, one JSON object.

Each ComfyUI checkout runs the whole suite with each version of transformers, then the workflows on a real server with
each option of ComfyUI's that changes memory or caches. The logs are in output/hosts/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from . import environment

OUTPUT = environment.ROOT / "output" / "hosts"
TRANSFORMERS = ("4.57.*", "")  # the oldest supported, and what pip resolves for the host
FLAGS = (
    "--lowvram", "--novram", "--fast", "--disable-dynamic-vram", "--cache-none", "--cache-lru 10",
)  # fmt: skip
ACCELERATOR_ONLY = ("--lowvram", "--novram")  # the host takes neither together with --cpu
WORKFLOWS = ("tests/server/test_workflows.py", "-k", "test_workflow or further_prompt or first_shipped")
# A file's tests in one process, which has its fixtures once; files with long tests first, so that both end together.
TOGETHER = ("--numprocesses=2", "--dist=loadfile", "--no-loadscope-reorder")
SUITE = tuple(str(environment.ROOT / "tests" / folder) for folder in ("server", "host", "method"))
COUNTS = ("passed", "failed", "error", "skipped")


def main(arguments: Sequence[str]) -> int:
    """Runs them; the exit code is 1 where a test failed or did not start."""
    options = _options(arguments)
    rows = []
    for path in options.paths or [""]:
        if path:
            os.environ["COMFYUI_PATH"] = str(Path(path).expanduser().resolve())
        for transformers in options.transformers:
            rows.append(_run(transformers, "", options.tests))
            print(_line(rows[-1]), flush=True)
        for flags in options.flags:
            rows.append(_run("", flags, WORKFLOWS))
            print(_line(rows[-1]), flush=True)
    print(json.dumps({"hosts": rows}))
    return int(any(row["failed"] or row["error"] or row["problem"] for row in rows))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("nox -s hosts --", description=__doc__)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="ComfyUI checkouts; none: the registry's host")
    parser.add_argument(
        "--transformers",
        action="append",
        help="a version, such as '4.57.*'; may be given again; without it 4.57.* and the newest",
    )
    parser.add_argument(
        "--flags",
        action="append",
        help=f"as --flags='--cache-lru 10'; may be given again; --flags= tries none; without it {', '.join(FLAGS)}",
    )
    parser.add_argument("--tests", default="", help="pytest's arguments, in place of the whole suite")
    options = parser.parse_args(arguments)
    options.tests = options.tests.split()
    options.transformers = options.transformers or TRANSFORMERS
    options.flags = FLAGS if options.flags is None else [one for one in options.flags if one]
    return options


def _run(transformers: str, flags: str, tests: Sequence[str]) -> dict:
    """One row: the suite, or `tests`, in the environment of COMFYUI_PATH and this transformers."""
    row = {"transformers": transformers or "newest", "flags": flags, "problem": "", **dict.fromkeys(COUNTS, 0)}
    found = environment.prepare(transformers)
    versions = "import comfyui_version, transformers as t; print(comfyui_version.__version__, t.__version__)"
    asked = subprocess.run([found.python, "-c", versions], cwd=found.comfyui, capture_output=True, text=True)
    row["host"], row["transformers"] = asked.stdout.split() if not asked.returncode else ("?", row["transformers"])
    environ = {**os.environ, "COMFYUI_PATH": str(found.comfyui), "OMP_NUM_THREADS": "1", "HOST_FLAGS": flags}
    if flags in ACCELERATOR_ONLY and not _has_accelerator(found.python):
        return {**row, "not_tried": "needs an accelerator", "seconds": 0}
    if flags and not _knows(found.comfyui, flags):
        return {**row, "not_tried": "not on this host", "seconds": 0}
    command = [str(found.python), "-m", "pytest", "-q", *TOGETHER, "--long", *(tests or SUITE)]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    log = OUTPUT / re.sub(r"[^\w.-]+", "_", f"{row['host']}-{row['transformers']}-{flags or 'suite'}.log")
    started = time.monotonic()
    with open(log, "wb") as out:
        code = subprocess.run(command, cwd=environment.ROOT, env=environ, stdout=out, stderr=out).returncode
    last = log.read_text(encoding="utf-8", errors="replace").rstrip().rsplit("\n", 1)[-1]
    row |= {name.rstrip("s"): int(count) for count, name in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)}
    row["seconds"] = round(time.monotonic() - started)
    if code not in (0, 1):
        row["problem"] = f"pytest ended with {code}: {log}"
    return row


def _has_accelerator(python: Path) -> bool:
    return not subprocess.run([python, "-c", "import torch; assert torch.accelerator.is_available()"]).returncode


def _knows(comfyui: Path, flags: str) -> bool:
    return f'"{flags.split()[0]}"' in (comfyui / "comfy" / "cli_args.py").read_text(encoding="utf-8")


def _line(row: dict) -> str:
    result = row.get("not_tried") or row["problem"] or ", ".join(f"{row[n]} {n}" for n in COUNTS if row[n])
    what = row["flags"] or "whole suite"
    return f"| {row['host']:8} | {row['transformers']:8} | {what:24} | {result} | {row['seconds'] / 60:.1f} min |"
