"""Checks the paper's claims on the demo's family, on pictures of held-out toys that the oracle measures.

nox -s evidence                  writes docs/evidence.md; the last line of standard output is one JSON object
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from ...common import bootstrap
from ...common.bootstrap import ROOT
from ..family.layout import MODELS
from .results import ResultStore
from .rows import ROWS

WORKERS = 2


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="nox -s evidence --", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help="a ComfyUI checkout")
    add("--work", type=Path, default=ROOT / ".cache" / "evidence", help="data and results; what is there is reused")
    add("--models", type=Path, default=MODELS, help="a models folder with another family of these names")
    add("--cases", type=float, default=1.0, help="share of each set's cases, for a quick look")
    add("--page", type=Path, default=ROOT / "docs" / "evidence.md", help="the file to write")
    add("--record", action="store_true", help="write results whose weights do not ship to evidence/recorded.json")
    add("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cases != 1:  # the results of a quick look are separate
        options.work /= f"cases-{options.cases}"
    options.work.mkdir(parents=True, exist_ok=True)
    store, data = ResultStore(options.work, options.models), options.work / "data"
    if options.worker is not None:
        bootstrap.start_host(options.comfyui)
        from .draw import draw_rows

        draw_rows(
            store, [row for row in ROWS if store.has_weights(row)][options.worker :: WORKERS], data, options.cases
        )
        return 0
    started = time.monotonic()
    test = data / "test.json"
    known = {entry["set"] for entry in json.loads(test.read_text(encoding="utf-8"))} if test.exists() else set()
    program = [sys.executable, bootstrap.__file__]
    if {row.cases for row in ROWS} - known:
        arguments = ["demo.family.data", str(data), "--examples", "0"]
        subprocess.run([*program, *arguments], check=True, stdout=sys.stderr)
    command = [*program, "demo.evidence.run", *sys.argv[1:], "--comfyui", str(options.comfyui), "--worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two processes of one thread are faster than one of two
    workers = [
        subprocess.Popen([*command, str(number)], env=environment, stdout=sys.stderr) for number in range(WORKERS)
    ]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        return 1
    from .sections import write_page

    if options.record:
        shipped = ResultStore(options.work, MODELS)
        store.record([row for row in ROWS if not shipped.has_weights(row)])
    print(json.dumps(write_page(options.page, store, data, time.monotonic() - started)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
