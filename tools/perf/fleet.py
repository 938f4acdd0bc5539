"""The benchmark over several servers against the same over one of them.

    nox -s bench -- fleet [--servers 2] [--cases 12] [--rounds 2]

Servers are processes on this machine, one thread each, with the models and the workflow of `batch`; `fleet` is
N * (time of N servers) / (time of one), the median over rounds, each on other seeds. It tells little where there are
fewer cores than servers and the process that shares out the pictures needs. Last line: one JSON object.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from ...common.console import say
from ...common.list_files import Example
from ..benchmark.runner import Benchmark
from ..benchmark.sets import cases
from ..benchmark.template import Template
from .batch import SUBJECT, build_models, graph, small_server


def main(argv: list[str]) -> None:
    """Measures and prints one JSON object. `argv`: the command line without the benchmark's name."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- fleet", description=__doc__.split("\n")[0])
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--cases", type=int, default=12, help="pictures of a run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="of a picture")
    options = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    comfyui, cores = Path(os.environ["COMFYUI_PATH"]), len(os.sched_getaffinity(0))
    if cores < options.servers:
        say(f"This machine has {cores} core(s) for {options.servers} servers, which cannot work at the same time.")

    seconds: dict[int, list[float]] = {1: [], options.servers: []}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work, ExitStack() as stack:
        models = build_models(comfyui, Path(work) / "models")
        servers = [small_server(comfyui, Path(work) / str(n), models) for n in range(options.servers)]
        clients = [stack.enter_context(server).client for server in servers]
        template = Template(graph("ours", "", 0, options.steps), clients[0].object_info())

        def run(name: str, used: list, count: int, seed: int) -> tuple[float, list[int]]:
            """Seconds of a run, and what each server made of it."""
            items = [Example("cat", f"the cat in a window, number {n}", (SUBJECT,)) for n in range(count)]
            out, quiet = Path(work) / "runs" / name, lambda text: None
            benchmark = Benchmark(used, template, out, root=SUBJECT.parent, say=quiet)
            started = time.perf_counter()
            result = benchmark.run(cases(items, seed=seed))
            assert result["made"] == count, result
            return time.perf_counter() - started, [worker.made for worker in benchmark.workers]

        for number, client in enumerate(clients):
            run(f"warm-up-{number}", [client], 2, -1 - number)
        for number in range(options.rounds):
            for used in ([clients[number % len(clients)]], clients)[:: 1 if number % 2 else -1]:
                took, made = run(f"{number}-{len(used)}", used, options.cases, 2 * number + (len(used) > 1))
                seconds[len(used)].append(took)
                say(f"round {number}: {len(used)} server(s) {took:.1f} s, pictures {made}")
    ratios = [options.servers * many / one for one, many in zip(seconds[1], seconds[options.servers])]
    result = {
        "benchmark": "fleet",
        "device": "cpu",
        "fleet": round(statistics.median(ratios), 3),
        "fleet_rounds": [round(ratio, 3) for ratio in ratios],
        "fleet_servers": options.servers,
        "fleet_cores": cores,
        "fleet_cases": options.cases,
        "fleet_seconds_of_one": round(statistics.median(seconds[1]), 2),
    }
    print(json.dumps(result))
