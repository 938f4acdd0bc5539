"""Runs a benchmark on any ComfyUIs, and makes the paper's table from score files.

From the pack's folder:

    python tools/benchmark run SET --workflow FILE --server http://127.0.0.1:8188 --out FOLDER
    python tools/benchmark score NAME=PATH ... [--paper]

SET is DreamBench's folder, a list as UNO's or XVerseBench's, or a folder of one's own subjects with --prompts.
Several --server share the pictures. The same command continues a stopped run. The last line of standard output is one
JSON object.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

if not __package__:  # started by its path, as `python tools/benchmark`
    import runpy

    runpy.run_path(str(Path(__file__).parents[2] / "common" / "bootstrap.py"))["run"]("tools.benchmark")

from ...common.console import say  # noqa: E402

LOCAL = "http://127.0.0.1:8188"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python tools/benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="generates a benchmark's pictures")
    run.add_argument("set", type=Path, metavar="SET", help="folder, or .json or .jsonl list")
    run.add_argument("--workflow", type=Path, required=True, metavar="FILE", help="from the editor or in API format")
    run.add_argument(
        "--server",
        action="append",
        metavar="ADDRESS",
        help=f"may be repeated, or be a list with commas; user:password@ and a path are understood (default: {LOCAL})",
    )
    run.add_argument("--header", action="append", default=[], metavar="NAME: VALUE", help="for all servers: an API key")
    run.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="pictures and ledger.jsonl")
    run.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt on each line; {subject} is its class")
    run.add_argument("--images", type=Path, metavar="FOLDER", help="where a list's paths start")
    run.add_argument("--references", type=positive, default=1, metavar="N", help="the subject's, with each prompt (1)")
    run.add_argument("--seeds", type=positive, default=1, metavar="N", help="pictures of each prompt (1)")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="another one gives other pictures (0)")
    run.add_argument("--limit", type=positive, default=0, metavar="N", help="only the first N prompts")
    run.add_argument("--prompt-node", metavar="ID", help="node of the prompt, if it is not found by itself")
    run.add_argument("--ahead", type=positive, default=2, metavar="N", help="jobs in a server's queue at a time (2)")
    run.add_argument("--patience", type=float, default=3600, metavar="SECONDS", help="wait for lost servers (3600)")
    score = commands.add_parser("score", help="the paper's table with 95 %% intervals")
    score.add_argument("sources", nargs="+", metavar="[NAME=]PATH", help="score files and folders of runs")
    score.add_argument("--paper", action="store_true", help="adds the rows of the paper's table")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """An option's number, at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text}, expected 1 or more")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = arguments(argv)
    from ..comfy_client.client import HostError, WorkflowError

    for number in (signal.SIGTERM, *([signal.SIGHUP] if os.name == "posix" else [])):
        signal.signal(number, signal.default_int_handler)  # a plain kill clears the server's queue, too
    try:
        result = run(options) if options.command == "run" else score(options.sources, options.paper)
    except (ValueError, OSError, HostError, WorkflowError) as error:
        say(f"\n{error}")
        return 1
    except KeyboardInterrupt:
        say("\nStopped; the pictures so far are kept. The same command continues the run.")
        return 130
    print(json.dumps(result), flush=True)
    return 1 if result.get("failed") else 0


def run(options: argparse.Namespace) -> dict:
    """Generates the pictures; returns counts, and the scores where the workflow measures."""
    from ..comfy_client import workflow
    from .ledger import RunError
    from .runner import Benchmark
    from .servers import ask, check_equal, clients
    from .sets import cases, read_set
    from .template import Template

    found = read_set(options.set, prompts=options.prompts, images=options.images, references=options.references)
    for problem in found.problems:
        say(f"left out: {problem}")
    wanted = cases(found.items, seeds=options.seeds, seed=options.seed, limit=options.limit)
    servers = ask(clients(options.server or [LOCAL], options.header))
    up = [server for server in servers if not server.problem]
    if not up:
        silent = "\n".join(
            f"{server.client.address} does not answer as a ComfyUI ({server.problem})." for server in servers
        )
        raise RunError(f"{silent}\nStart it, or name another --server.")
    source, info = workflow.read(options.workflow), next((server.nodes for server in up if server.nodes), {})
    if not info and "nodes" in source:
        raise RunError("No server shows its nodes (/object_info): export the workflow from the editor in API format.")
    template = Template(workflow.to_api(source, info, options.workflow), info, options.prompt_node)
    check_equal(up, template.prompt)
    most = len(template.loaders)
    if all(len(case.item.references) > most for case in wanted):
        raise RunError(f"{options.workflow.name} has {most} Load Image nodes, fewer than any prompt has references.")
    facts = {"workflow": options.workflow.name, "set": str(options.set.resolve()), "layout": found.layout}
    versions = list(dict.fromkeys(server.version for server in up))
    facts["host"] = ", ".join(versions)
    say(f"{found.layout}: {len(wanted)} pictures by {options.workflow.stem}")
    for server in up:
        say(f"on ComfyUI {server.version} at {server.client.address}")
    if len(versions) > 1:
        say("The servers are of different versions: pictures may differ in their last bits.")
    more = {"prefetch": options.ahead, "patience": options.patience, "say": say}
    benchmark = Benchmark([one.client for one in servers], template, options.out, root=found.root, facts=facts, **more)
    for worker, server in zip(benchmark.workers, servers):
        if server.problem:  # it is looked for again, but no case is to wait for its answer
            worker.problem, worker.away_since, worker.times_lost = server.problem, time.monotonic(), 1
            say(f"{server.client.address} does not answer ({server.problem}); waiting for it.")
    result = benchmark.run(wanted)
    say(f"{result['pictures']} of {result['cases']} pictures in {options.out}, {result['failed']} failed")
    result["servers"] = {worker.client.address: worker.made for worker in benchmark.workers}
    result["lost"] = {w.client.address: w.out or w.problem for w in benchmark.workers if not w.usable}
    for worker in benchmark.workers:
        if worker.times_lost or worker.out:
            end = worker.out or (f"lost at the end ({worker.problem})" if worker.problem else "back at the end")
            say(f"{worker.client.address}: {worker.made} pictures, lost {worker.times_lost} time(s), {end}.")
    if (options.out / "scores").is_dir():
        result["scores"] = score([str(options.out)])
    else:
        say("No scores: the workflow holds no score nodes (docs/systems.md says how to measure the pictures).")
    return {**result, "left_out": len(found.problems), "out": str(options.out.resolve())}


def score(sources: list[str], paper: bool = False) -> dict:
    """Prints the table; returns its values."""
    from .score_table import as_json, read_systems, score_table

    systems = read_systems(sources)
    say(score_table(systems, paper))
    return as_json(systems)


if __name__ == "__main__":
    sys.exit(main())
