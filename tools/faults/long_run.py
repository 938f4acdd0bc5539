"""1,000 prompts of varying settings through one server: memory, time, and every picture as it is alone.

    nox -s faults -- long_run [--prompts 1000] [--again 100] [--timed 60] [--alone 10] [--log FILE]

Subject, prompt, schedule, strength, sampler and seed of each prompt are drawn at random, from a seed; so are size,
batch, steps and CFG, but the same in each block of 200, so that blocks cost the same. `long_run_growth` compares the
medians of the server's memory (RSS) over the last block and over the block after the warm-up, `long_run_blocks` their
medians of the processor's seconds that the server took for a prompt, which other work on the machine changes.
Afterwards a second server draws `--again` of the settings in another order; then both draw `--timed` new ones in turns:
`long_run_slowdown` is the median of the first server's processor's seconds over the second's. At last `--alone` of the
settings are drawn each on a server of its own, which draws nothing else. Last line: one JSON object.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from ...common.console import say
from ...sampling.stages import PRESETS
from ..comfy_client.client import Client, WorkflowError
from ..comfy_client.server import Server
from ..tables import parser
from ._server import Settings, draw, graph, small_server, upload_pictures

BLOCK, WARM_UP = 200, 100
TOYS = ("the toy", "the duck", "the boat", "the car", "the train", "the truck")
PLACES = ("on grass", "on sand", "in the snow", "on a road", "at night", "on a blue carpet")
VIEWS = ("from the front", "from the right", "from the back", "from the left", "from high above", "")
CLOCKS = ("flow_time", "flow_time_resolution", "steps")


def main(argv: list[str]) -> None:
    """Measures and prints one JSON object. `argv`: the command line without the file's name."""
    parsed = parser("faults", __name__, __doc__)
    parsed.add_argument("--prompts", type=int, default=1000, metavar="N", help="on the first server (1000)")
    parsed.add_argument("--again", type=int, default=100, metavar="N", help="of them on a second, reordered (100)")
    parsed.add_argument("--timed", type=int, default=60, metavar="N", help="new ones, on both in turns (60)")
    parsed.add_argument("--alone", type=int, default=10, metavar="N", help="of them on a server each (10)")
    parsed.add_argument("--log", type=Path, metavar="FILE", help="gets a line of JSON for each prompt")
    options = parsed.parse_args(argv)
    drawn = settings(options.prompts)
    block = min(BLOCK, options.prompts // 3)
    warm_up = min(WARM_UP, options.prompts - 2 * block)
    pick = random.Random(1)
    again = pick.sample(range(options.prompts), min(options.again, options.prompts))
    alone = pick.sample(range(options.prompts), min(options.alone, options.prompts))

    differing, ratios = 0, []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        with small_server(Path(work) / "long") as server, small_server(Path(work) / "again") as second:
            run = Run(server, options.log)
            for number, one in enumerate(drawn):
                run.draw(number, one)
            younger = Run(second, None)
            for number in again:
                younger.draw(number, drawn[number])
                differing += _differs(run, younger, number, "in another order")
            for number, one in enumerate(settings(options.timed, seed=1), options.prompts):
                for each in (run, younger)[:: 1 if number % 2 else -1]:
                    each.draw(number, one)
                differing += _differs(run, younger, number, "on the second server")
                ratios.append(run.seconds[-1] / younger.seconds[-1])
        for number in alone:
            with small_server(Path(work) / f"alone-{number}") as server:
                one = Run(server, None)
                one.draw(number, drawn[number])
                differing += _differs(run, one, number, "alone")

    first, last = slice(warm_up, warm_up + block), slice(options.prompts - block, options.prompts)

    def ratio(values: list[float]) -> float:
        return round(statistics.median(values[last]) / statistics.median(values[first]), 4)

    wanted = {number: one.batch_size for number, one in enumerate(drawn)}
    missing = sum(max(0, count - len(run.pictures.get(number, []))) for number, count in wanted.items())
    result = {
        "long_run_prompts": options.prompts,
        "long_run_pictures": sum(len(run.pictures.get(number, [])) for number in wanted),
        "long_run_missing": missing,
        "long_run_growth": round(ratio(run.bytes) - 1, 4),
        "long_run_slowdown": round(statistics.median(ratios), 4),
        "long_run_blocks": ratio(run.seconds),
        "long_run_compared": len(again) + options.timed + len(alone),
        "long_run_compared_alone": len(alone),
        "long_run_differing": differing,
        "long_run_seconds": round(statistics.median(run.clock), 3),
        "long_run_megabytes": [round(run.bytes[number] / 2**20) for number in (0, warm_up, options.prompts - 1)],
        "long_run_failures": run.failures[:10],
        "device": "cpu",
    }
    print(json.dumps(result))


def settings(count: int, seed: int = 0) -> list[Settings]:
    """Settings of so many prompts; size, batch, steps and CFG are the same in each block."""
    draw = random.Random(seed)
    costs: list[dict[str, Any]] = [
        dict(
            width=draw.choice((80, 96, 112, 128)),
            height=draw.choice((96, 112, 144)),
            batch_size=draw.choice((1, 1, 1, 2, 3)),
            steps=draw.choice((3, 4, 6)),
            cfg=draw.choice((1.0, 2.5)),
        )
        for _ in range(BLOCK)
    ]
    found = []
    for number in range(count):
        if number % BLOCK == 0:
            draw.shuffle(costs)
        clock = draw.choice(CLOCKS)
        tau1, tau2 = draw.uniform(0.5, 0.98), draw.uniform(0.1, 0.5)
        if clock == "steps":  # which run upwards
            tau1, tau2 = tau2, tau1
        found.append(
            Settings(
                subject=draw.choice([f"toy-{n}.png" for n in range(1, 6)] + ["chelsea.jpg", "coffee.jpg"]),
                prompt=" ".join((draw.choice(TOYS), draw.choice(PLACES), draw.choice(VIEWS))).strip(),
                preset=draw.choice(sorted(PRESETS)),
                clock=clock,
                tau1=round(tau1, 2),
                tau2=round(tau2, 2),
                strength=draw.choice((1.0, 1.0, 0.5, 0.0, 1.5)),
                sampler_name=draw.choice(("euler", "heun", "dpmpp_2m")),
                seed=draw.randrange(2**32),
                **costs[number % BLOCK],
            )
        )
    return found


def _differs(run: Run, other: Run, number: int, how: str) -> int:
    same = run.pictures.get(number) == other.pictures.get(number)
    if not same:
        say(f"prompt {number}: another picture {how}")
    return int(not same)


class Run:
    """The prompts of one server: what each took, and checksums of its pictures."""

    def __init__(self, server: Server, log: Path | None):
        import psutil

        self.client: Client = server.client
        upload_pictures(self.client)
        self.info, self.log = self.client.object_info(), log
        self.process = psutil.Process(server.process.pid).children()[0]
        self.pictures: dict[int, list[str]] = {}
        self.bytes: list[float] = []
        self.seconds: list[float] = []
        self.clock: list[float] = []
        self.failures: list[str] = []

    def draw(self, number: int, settings: Settings) -> None:
        """Draws one prompt and notes time, memory and pictures."""
        prompt = graph(settings, self.info, f"long-{number:04d}")
        before, started = sum(self.process.cpu_times()[:2]), time.perf_counter()
        try:
            self.pictures[number] = draw(self.client, prompt)
        except WorkflowError as error:
            self.failures.append(f"prompt {number}, {settings}: {error}")
            say(self.failures[-1])
        self.clock.append(time.perf_counter() - started)
        self.seconds.append(sum(self.process.cpu_times()[:2]) - before)
        self.bytes.append(self.process.memory_info().rss)
        line = {"prompt": number, "seconds": self.seconds[-1], "clock": self.clock[-1], "bytes": self.bytes[-1]}
        if self.log:
            with self.log.open("a") as file:
                file.write(json.dumps(line | {"pictures": self.pictures.get(number)}) + "\n")
        if number % 50 == 0:
            say(f"prompt {number}: {self.seconds[-1]:.2f} s, {self.bytes[-1] / 2**20:.0f} MB")
