"""What training on a large list costs: from its start to the first step, and memory.

    nox -s bench -- million [--pairs 1000000]

A list of N pairs is written, each with a target and a reference of its own: 2 N paths, hard links to 256 small
pictures, since a million different ones would measure the disk. Then, each time in a process of its own: the host and
the small family's models are loaded, and from there on time and memory are taken until the first step is finished, at
the first start (every header is read) and twice at the second. What a start without large data takes is measured with
16 of the pairs.

The last line is one JSON object; `pairs` says for how many its `million_start` (the second start) and `million_memory`
(the most of all starts) are: for a million with --full, which takes several minutes, by default for 100,000.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from ...common.bootstrap import start_host
from ...common.console import say

ORIGINALS, FOLDER, LINKS = 256, 1000, 60_000  # pictures, pairs in a folder, most hard links of one file
SIZES = ((64, 64), (96, 64), (64, 96), (80, 64))


class Stop(Exception):
    """Ends a run after its first step."""


def main(argv: list[str]) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- million", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--full", action="store_true", help="a million pairs")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.start:
        print(json.dumps(first_step(options.start, options.start.parent / "run")))
        return
    count = 1_000_000 if options.full else options.pairs
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        say(f"writing a list of {count:,} pairs")
        write_list(root, "large", count)
        write_list(root, "small", 16)
        starts = {"small": _start(root / "small.jsonl")}
        for name in ("first", "second", "again"):
            shutil.rmtree(root / "run" / "output", ignore_errors=True)
            starts[name] = _start(root / "large.jsonl")
            say(f"{name} start: {starts[name]}")
        stored = sum(file.stat().st_size for file in (root / "run" / "cache" / "data").iterdir())
    second = min((starts["second"], starts["again"]), key=lambda start: start["seconds"])
    result = {"million_start": second["seconds"], "million_memory": max(start["peak_gb"] for start in starts.values())}
    print(json.dumps({**result, "pairs": count, "pictures": 2 * count, "index_bytes": stored, "starts": starts}))


def write_list(root: Path, name: str, count: int) -> None:
    """Writes NAME.jsonl, and its pictures to NAME/."""
    from PIL import Image

    originals = root / f"{name}-originals"
    originals.mkdir()
    copies = -(-2 * count // ORIGINALS // LINKS) or 1
    for number in range(ORIGINALS * copies):
        size, colour = SIZES[number % len(SIZES)], (number % 256, number * 7 % 256, number * 31 % 256)
        Image.new("RGB", size, colour).save(originals / f"{number}.jpg")
    made = 0
    with open(root / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            folder = f"{name}/subjects-{number // FOLDER:05d}"
            if number % FOLDER == 0:
                (root / folder).mkdir(parents=True)
            paths = [f"{folder}/{number:07d}-{part}.jpg" for part in ("target", "reference")]
            for path in paths:
                os.link(originals / f"{made % (ORIGINALS * copies)}.jpg", root / path)
                made += 1
            prompt = f"subject {number} on a wooden table in soft morning light, seen from the left, with a lantern"
            file.write(json.dumps({"prompt": prompt, "image_paths": paths[1:], "image_tgt_path": paths[0]}) + "\n")


def _start(data: Path) -> dict[str, float]:
    """Starts training in a process of its own; what it measured."""
    command = [sys.executable, str(Path(__file__).parents[2] / "common" / "bootstrap.py"), "tools.perf", "million"]
    found = subprocess.run([*command, "--start", str(data)], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def first_step(data: Path, folder: Path) -> dict[str, float]:
    """Seconds from the start of training to the end of its first step, and resident memory beyond that before."""
    start_host(os.environ["COMFYUI_PATH"])
    from ...tests.small.training import small_family, small_recipe
    from ...training.models import load_models
    from ...training.paths import RunPaths
    from ...training.recipe import Recipe
    from ...training.run import train

    models = small_family(folder / "models")
    recipe = Recipe.from_dict(small_recipe(models, data, data={"validation": 0.001}))
    files = (folder / "output" / f"{kind}.safetensors" for kind in ("dla", "lora"))
    paths, loaded = RunPaths(folder / "output" / data.stem, folder / "cache", *files), load_models(recipe)
    found: dict[str, float] = {}
    peak = Peak()

    def stop(progress) -> None:
        if progress.text:
            say(progress.line)
        if progress.seconds is not None:
            found.update(seconds=round(time.perf_counter() - started, 2), step_seconds=round(progress.seconds, 2))
            found.update(peak.end())
            raise Stop

    started = time.perf_counter()
    try:
        train(recipe, loaded, paths, stop)
    except Stop:
        return found
    raise AssertionError("the run ended without a step")


class Peak:
    """Resident memory of this process beyond what it was at first, looked at each 20 ms."""

    def __init__(self) -> None:
        self.before, self.most, self.ended = resident(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.ended.wait(0.02):
            self.most = max(self.most, resident())

    def end(self) -> dict[str, float]:
        """GB at the peak and now."""
        self.ended.set()
        self.thread.join()
        now = resident()
        return {
            "peak_gb": round((max(self.most, now) - self.before) / 1e9, 3),
            "resident_gb": round((now - self.before) / 1e9, 3),
        }


def resident() -> int:
    """Bytes of this process in memory, mapped files too."""
    import psutil

    return psutil.Process().memory_info().rss
