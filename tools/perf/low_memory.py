"""Peak memory of each part of a picture on cards of 12, 16 and 24 GB with models at full size, and seconds.

    nox -s bench -- low_memory --full [--models klein flux_fp8 flux_bf16 flux_novram] [--seconds 600] [--write-docs]

A large card plays a small one: the process may allocate no more than the budget (beyond is an out-of-memory error), and
what CUDA reports of free and total memory, by which the host decides what to load, is the small card's. The host is as
after `python main.py`: it loads a model in part where it does not fit; a set of models is run with --novram, too.
Weights are random, in their dtype, in the processor's memory. A run is what a workflow does: MLLM, DLA, Add Identity,
Apply Stages with the paper's schedule, KSampler, VAE Decode; 1024 px, one reference of 1024 px, 6 steps. Peaks are of
tensors; they count weights that the host leaves on the card because there is room, so that the working memory, the peak
above what stays after the part, is given beside them. A set of models is made once, in a process of its own, and
measured from the largest card to the smallest. Last line: one JSON object.
"""

import argparse
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ...common.bootstrap import ROOT, start_host
from ...common.console import say
from ...common.markdown import markdown, replace_between
from ._measure import device_name

BUDGETS, SIDE, STEPS, GIB = (24, 16, 12), 1024, 6, 2**30
TIMEOUT = 150  # seconds for one set of models
LEAST = 36 * GIB  # what cards that are sold as 40 GB have at least
PAGE = ROOT / "docs" / "speed.md"
MARKS = "<!-- low_memory: nox -s bench -- low_memory --full --write-docs -->", "<!-- end of low_memory -->"
PROMPT = "The cat of the picture sits on a red chair in front of a window, in the evening."


class Models(NamedTuple):
    """One set of models and how the host is started."""

    title: str
    family: str
    mllm: str
    fp8: bool = False
    options: tuple[str, ...] = ()  # of the host's command line
    budgets: tuple[int, ...] = BUDGETS


MODELS = {
    "klein": Models("FLUX.2 Klein 4B, Qwen3-VL-4B", "flux2", "Qwen3-VL-4B"),
    "flux_fp8": Models("FLUX.1-dev fp8, InternVL3-8B", "flux", "InternVL3-8B", fp8=True),
    "flux_bf16": Models("FLUX.1-dev, InternVL3-8B", "flux", "InternVL3-8B"),
    "flux_novram": Models("the same with --novram", "flux", "InternVL3-8B", options=("--novram",), budgets=(12,)),
}


def main(argv: Sequence[str]) -> None:
    """Measures and prints one JSON object. `argv`: the command line without the benchmark's name."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- low_memory", description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="whole models, on an accelerator; there is no other size")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--seconds", type=float, default=600, help="for all sets of models; later ones are left out")
    parser.add_argument("--write-docs", nargs="?", const="", metavar="FILE.json", help="of a run; nothing = this one")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # the same code, on a processor
    parser.add_argument("--child", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.write_docs:
        write_docs(json.loads(Path(options.write_docs).read_text("utf-8").strip().splitlines()[-1]))
        return
    if options.child:
        run_models(MODELS[options.child], options.full)
        return

    import torch

    total = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0
    if not options.tiny and not (options.full and total >= LEAST):
        found = f"--full is {'given' if options.full else 'missing'}, "
        found += f"the card has {total / GIB:.0f} GiB" if total else "PyTorch sees no card"
        sys.exit(f"low_memory plays small cards on a large one: {found}; expected --full and a card of 40 GB or more.")
    end = time.monotonic() + options.seconds
    result: dict[str, Any] = {"benchmark": "low_memory", "device": "", "px": SIDE, "steps": STEPS, "rows": []}
    for name in options.models:
        result["rows"] += list(measured(name, options.tiny, min(TIMEOUT, end - time.monotonic())))
        result["device"] = next((row["device"] for row in result["rows"] if "device" in row), "")
        print(json.dumps(result), flush=True)  # a run that is cut gives numbers all the same
    if options.write_docs is not None:
        write_docs(result)


def measured(name: str, tiny: bool, seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each budget, as far as a process of its own came in the time that there is."""
    command = [sys.executable, str(ROOT / "common" / "bootstrap.py"), __name__.split(".", 1)[1].rsplit(".", 1)[0]]
    command += ["low_memory", "--child", name, *(["--full"] if not tiny else [])]
    end, rows = f"{seconds:.0f} s were over", {}
    with tempfile.TemporaryFile("w+") as out:
        try:
            if seconds > 0:
                end = f"exit {subprocess.run(command, stdout=out, timeout=seconds, check=False).returncode}"
        except subprocess.TimeoutExpired:
            pass
        out.seek(0)
        rows = {row["budget"]: row for row in map(json.loads, out.read().splitlines())}
    for budget in MODELS[name].budgets:
        row = {"budget": budget, "parts": {}, "fits": None, "error": f"not measured: {end}"} | rows.get(budget, {})
        yield {"models": name, "title": MODELS[name].title, **row}


def run_models(models: Models, full: bool) -> None:
    """Builds a set of models and prints a line of JSON after each part of each budget; a budget's last one counts."""
    import torch

    cuda = torch.cuda.is_available()  # a tiny run on one tries the small cards, too
    start_host(os.environ["COMFYUI_PATH"], models.options, cpu=not cuda)
    import comfy.model_management as management

    from ...tests.small import dit
    from ._models import CONTEXT_WIDTHS, random_dit, random_dla, random_mllm, random_vae, release_sizes

    logging.getLogger().setLevel(logging.INFO)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        mllm = random_mllm(models.mllm, Path(folder), full)
    dtype = torch.float8_e4m3fn if models.fp8 else torch.bfloat16
    model = random_dit(models.family, release_sizes(models.family), dtype) if full else dit.tiny(models.family)
    width = CONTEXT_WIDTHS[models.family] if full else 24
    dla, vae = random_dla(mllm, models.family, width), random_vae(models.family)
    say(f"{models.title}: made in {time.perf_counter() - started:.0f} s")
    emulate = small_card() if cuda else lambda gib: None
    for budget in models.budgets:
        management.unload_all_models()
        gc.collect()
        management.soft_empty_cache()
        emulate(budget)
        row: dict[str, Any] = {"budget": budget, "device": device_name(management.get_torch_device()), "parts": {}}
        try:
            picture(models, mllm, model, dla, vae, SIDE if full else 64, row)
            row |= {"fits": True, "error": ""}
        except management.OOM_EXCEPTION as error:
            row |= {"fits": False, "error": f"{[*row['parts']][-1]}: {str(error).split('. ')[0]}"}
        row["seconds"] = round(sum(part["seconds"] for part in row["parts"].values()), 2)
        print(json.dumps(row), flush=True)


def small_card() -> Callable[[int], None]:
    """A function that makes this process's card one of so many GiB, as CUDA reports it and as the allocator may use."""
    import torch

    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()  # what CUDA itself and others on the card take

    def emulate(gib: int) -> None:
        size = gib * GIB
        torch.cuda.set_per_process_memory_fraction((size - context) / total)
        torch.cuda.mem_get_info = lambda device=None: (max(0, size - context - torch.cuda.memory_reserved()), size)

    return emulate


def picture(models: Models, mllm: Any, model: Any, dla: Any, vae: Any, side: int, row: dict[str, Any]) -> None:
    """One picture by the functions behind the nodes; each part is put into `row` as it ends."""
    import comfy.sample
    import torch

    from ...loaders.backbones import BACKBONES
    from ...loaders.conditioning import aggregate_conditioning
    from ...loaders.mllm import encode_subject
    from ...loaders.reference_latents import add_identity
    from ...sampling.patch import apply_stages
    from ...sampling.stages import preset

    image, backbone = torch.rand(1, side, side, 3), BACKBONES[models.family]
    cells = side // backbone.latent_downscale
    empty = torch.zeros(1, backbone.latent_channels, cells, cells)
    noise = comfy.sample.prepare_noise(empty, 0)
    with torch.inference_mode():
        with part(row, "MLLM"):
            features = encode_subject(mllm, PROMPT, [image], dla)
        with part(row, "DLA"):
            positive = aggregate_conditioning(features, dla)
        with part(row, "VAE encode"):
            positive = add_identity(positive, model, vae, image, size=side)
        with part(row, "sampling"):
            staged = apply_stages(model, preset("paper"))
            run = (STEPS, 1.0, "euler", "simple", positive, positive)  # as the node KSampler calls it
            sampled = comfy.sample.sample(staged, noise, *run, empty, disable_pbar=True, seed=0)
        with part(row, "VAE decode"):
            pixels = vae.decode(sampled)
    assert pixels.shape[1:] == image.shape[1:]
    row["finite"] = bool(pixels.isfinite().all())


@contextmanager
def part(row: dict[str, Any], name: str) -> Iterator[None]:
    """Measures a part: GiB of tensors at their peak and after it, of the allocator at its peak, seconds."""
    import torch

    cuda, lines = torch.cuda.is_available(), HostLines()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    logging.getLogger().addHandler(lines)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(lines)
        if cuda:
            torch.cuda.synchronize()
        kinds = ("max_memory_allocated", "memory_allocated", "max_memory_reserved")
        peak, after, reserved = (getattr(torch.cuda, kind)() / GIB if cuda else 0.0 for kind in kinds)
        row["parts"][name] = {
            "peak_gib": round(peak, 2),
            "working_gib": round(peak - after, 2),
            "reserved_gib": round(reserved, 2),
            "seconds": round(time.perf_counter() - started, 2),
            "host": lines.found,
        }
        say(json.dumps({"budget": row["budget"], name: row["parts"][name]}))
        print(json.dumps(row), flush=True)


class HostLines(logging.Handler):
    """What the host logs of loading, and of running out of memory."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:  # noqa: D102
        text = record.getMessage()
        if any(word in text for word in ("loaded completely", "loaded partially", "out of memory", "OOM")):
            self.found.append(text)


def write_docs(result: dict[str, Any]) -> None:
    """Writes the table of docs/speed.md."""
    names = ("MLLM", "DLA", "VAE encode", "sampling", "VAE decode")
    lines = [["models", "card, GB", *names, "whole run", "fits"]]
    for row in result["rows"]:
        parts = row["parts"]
        cells = [in_words(parts[name]) if name in parts else "–" for name in names]
        peak = max((found["peak_gib"] for found in parts.values()), default=0)
        fits = {True: "yes", False: f"no; {row['error']}", None: row["error"]}[row["fits"]]
        whole = f"{peak:.1f}; {row['seconds']:.1f} s" if parts and "seconds" in row else "–"
        lines.append([row["title"], str(row["budget"]), *cells, whole, fits])
    text = f"{result['device']}, {result['px']} px, one reference of as much, {result['steps']} steps. GiB at the peak "
    text += "(working memory, above what stays on the card); seconds with loading."
    replace_between(PAGE, MARKS, f"{text}\n\n{markdown(lines)}")


def in_words(part: dict[str, Any]) -> str:
    """A cell of the table."""
    return f"{part['peak_gib']:.1f} ({part['working_gib']:.1f}); {part['seconds']:.1f} s"
