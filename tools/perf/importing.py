"""What the pack adds to a server's start: the host's own loading of it, after the host's own nodes.

    nox -s bench -- importing [--rounds 3]

Each round is a fresh process; the median is reported. Last line: one JSON object.
"""

import argparse
import asyncio
import json
import logging
import os
import statistics
import subprocess
import sys
import time

from ...common.bootstrap import ROOT, start_host


def main(argv: list[str]) -> None:
    """Measures and prints one JSON object. `argv`: the command line without the benchmark's name."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- importing", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.once:
        print(json.dumps(_load()))
        return

    command = [sys.executable, str(ROOT / "common" / "bootstrap.py"), "tools.perf", "importing", "--once"]
    rounds = []
    for _ in range(options.rounds):
        process = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        rounds.append(json.loads(process.stdout.splitlines()[-1]))
    seconds = statistics.median(one["import_seconds"] for one in rounds)
    print(json.dumps({"benchmark": "importing", **rounds[0], "import_seconds": seconds}))


def _load() -> dict[str, float]:
    """Loads the pack once, as a server does."""
    started = time.perf_counter()
    start_host(os.environ["COMFYUI_PATH"])
    from execution import nodes

    logging.disable()  # of those that lack a package
    asyncio.run(nodes.init_builtin_extra_nodes())
    logging.disable(logging.NOTSET)
    host = time.perf_counter() - started
    before = set(sys.modules)
    started = time.perf_counter()
    loaded = asyncio.run(nodes.load_custom_node(str(ROOT)))
    seconds = time.perf_counter() - started
    assert loaded, "the host did not load the pack"
    new = set(sys.modules) - before
    return {
        "import_seconds": round(seconds, 4),
        "import_modules": len(new),
        "import_modules_of_transformers": sum(name.startswith("transformers") for name in new),
        "import_modules_outside_the_pack": sum(not name.startswith(str(ROOT)) for name in new),
        "import_host_seconds": round(host, 1),
    }
