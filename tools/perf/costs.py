"""What a picture costs at 512, 1024 and 2048 px with 1 to 5 references: tokens, operations, and measured seconds.

    nox -s bench -- costs [--full] [--write-docs [FILE.json]]

Three ways to sample in 20 steps: both token groups throughout, staged on the paper's schedule, MLLM tokens alone.
References are squares of the picture's side, of 1024 px at most. Counted are tokens and operations: linear maps and
attention of the DiT's blocks, two per parameter and token of the MLLM, convolutions and attention of the VAE. Measured
are single steps through Apply Stages and the host's sampler, the best of two (one at 2048 px); a picture's seconds are
those times the number of such steps, and its encodes and decode. By default a double and a single block of FLUX.1 at
full width and 256 to 384 px, so that times can be compared with counts. With --full FLUX.1-dev and FLUX.2 Klein
4B with InternVL3-8B and Qwen3-VL-4B, whole, with random weights in bf16, on an accelerator. --write-docs draws
docs/images/costs.png and writes the table of docs/speed.md, from this run or from another's JSON. Last line: one JSON
object.
"""

import argparse
import gc
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import isnan, nan
from pathlib import Path
from typing import Any

from ...common.bootstrap import ROOT
from ...common.console import say
from ...common.markdown import markdown, replace_between
from ._measure import device_name, start

FAMILIES, SIZES, REFERENCES, STEPS = ("flux", "flux2"), (512, 1024, 2048), (1, 2, 3, 4, 5), 20
MEASURED = (1, 3, 5)  # numbers of references that --full times; the figure's lines join them
REFERENCE_SIDE = 1024  # px, at most
PROMPT_TOKENS = 64
KINDS = {"both": (1.0, 1.0), "mllm_only": (1.0, 0.0), "vae_only": (0.0, 1.0)}  # of a step: strengths
WAYS = {"both": "both", "staged": "paper", "mllm_only": "mllm_only"}  # to sample: their presets
TITLES = {"both": "both throughout", "staged": "staged as in the paper", "mllm_only": "MLLM tokens alone"}
BLOCKS = ((256, 1, "mllm_only"), (256, 1, "both"), (384, 1, "mllm_only"), (256, 3, "both"))  # px, references, kind
MLLM_FAMILIES = {"InternVL3-8B": "internvl", "Qwen3-VL-4B": "qwen3_vl", "Qwen2.5-VL / 4": "qwen2_5_vl"}
PADDED = 512  # context tokens of FLUX.2 at least
VAE_ENCODE, VAE_DECODE = 4.13e6, 9.46e6  # operations per px of the convolutions; FLUX.1's and FLUX.2's differ by 0.1 %
PAGE, FIGURE = ROOT / "docs" / "speed.md", ROOT / "docs" / "images" / "costs.png"
MARKS = "<!-- costs: nox -s bench -- costs --write-docs -->", "<!-- end of costs -->"


def main(argv: Sequence[str]) -> None:
    """Counts, measures and prints one JSON object. `argv`: the command line without the benchmark's name."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- costs", description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="time whole models, on an accelerator")
    parser.add_argument("--write-docs", nargs="?", const="", metavar="FILE.json", help="of a run; nothing = this one")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # --full's code with tiny models
    options = parser.parse_args(argv)
    if options.write_docs:
        write_docs(json.loads(Path(options.write_docs).read_text("utf-8").strip().splitlines()[-1]))
        return

    device = start(options.full)
    result: dict[str, Any] = {"benchmark": "costs", "device": device_name(device), "steps": STEPS}
    result["models"] = {family: counted(family) for family in FAMILIES}
    if options.full or options.tiny:
        for family in FAMILIES:
            time_model(family, result["models"][family], options.full)
            if family != FAMILIES[-1]:
                print(as_line(result), flush=True)  # a run that is cut gives numbers all the same
    else:
        result["blocks"] = time_blocks()
    if options.write_docs is not None:
        write_docs(result)
    print(as_line(result))


def as_line(result: dict[str, Any]) -> str:
    """JSON with numbers of four decimals."""
    return json.dumps(json.loads(json.dumps(result), parse_float=lambda text: round(float(text), 4)))


def counted(family: str) -> dict[str, Any]:
    """Tokens and operations of a family's release, a row for each size and number of references."""
    import comfy.samplers

    from ...loaders.backbones import BACKBONES
    from ...tests.small import dit

    backbone = BACKBONES[family]
    sampling = dit.tiny(family).get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", STEPS).tolist()
    rows = [count(backbone, sigmas, px, references) for px in SIZES for references in REFERENCES]
    return {"title": backbone.training.release, "mllm": backbone.training.mllm.name, "rows": rows}


def count(backbone, sigmas: list[float], px: int, references: int, sizes=None) -> dict[str, Any]:
    """Tokens of each group, tokens in the DiT by kind of step, and 10^12 operations of steps, parts and pictures."""
    from ...sampling.stages import preset
    from ...training.dit.memory import token_counts

    side = min(px, REFERENCE_SIDE)
    image, reference = token_counts(backbone, (px, px), references, side)
    mllm = backbone.training.mllm
    context = PROMPT_TOKENS + references * mllm_tokens(mllm.name)
    tokens, operations = count_step(backbone, context, px, references, side, sizes)
    step = {kind: number / 1e12 for kind, number in operations.items()}
    parts = {
        "mllm": 2 * mllm.parameters * context / 1e12,
        "vae_encode": references * vae_operations(VAE_ENCODE, side) / 1e12,
        "vae_decode": vae_operations(VAE_DECODE, px) / 1e12,
    }
    steps = {way: kinds_of_steps(preset(name), sigmas, image) for way, name in WAYS.items()}
    row = {"px": px, "references": references, "reference_px": side, "steps": steps, "step_tflop": step}
    row["tokens"] = {"context": context, "image": image, "reference": reference, "in_dit": tokens}
    row["tokens"]["mean"] = {way: sum(tokens[k] * n for k, n in found.items()) / STEPS for way, found in steps.items()}
    return row | {"parts_tflop": parts, "tflop": per_picture(steps, step, parts)}


def count_step(
    backbone, context: int, px: int, references: int, side: int, sizes=None
) -> tuple[dict[str, int], dict[str, float]]:
    """Tokens in the DiT, and operations of its step, by kind of step.

    Args:
        backbone: The family's record.
        context: MLLM tokens.
        px: Side of the picture.
        references: How many.
        side: Of each, px.
        sizes: Of the DiT; None = the release's.
    """
    from ...training.dit.flops import forward
    from ...training.dit.memory import token_counts

    image, reference = token_counts(backbone, (px, px), references, side)
    least = PADDED if backbone.pads_context else backbone.context_off_tokens
    tokens, operations = {}, {}
    for kind, (with_context, with_references) in KINDS.items():
        read = max(context if with_context else 0, least)
        tokens[kind] = read + image + (reference if with_references else 0)
        settings = dict(resolution=px, references=references if with_references else 0, reference_side=side)
        operations[kind] = sum(forward(backbone, sizes=sizes, context_tokens=read, **settings))
    return tokens, operations


def kinds_of_steps(stages: Any, sigmas: list[float], image: int) -> dict[str, int]:
    """How many steps of each kind a run has; image: its tokens."""
    from ...sampling.stages import plan

    names = {strengths: kind for kind, strengths in KINDS.items()}
    return dict(Counter(names[step.context, step.reference] for step in plan(stages, sigmas, image)))


def per_picture(steps: dict[str, dict[str, int]], step: dict[str, float], parts: dict[str, float]) -> dict[str, float]:
    """Of each way to sample: its steps and the parts that it needs; without VAE tokens no reference is encoded."""
    out = {}
    for way, found in steps.items():
        used = {name: cost for name, cost in parts.items() if name != "vae_encode" or way != "mllm_only"}
        out[way] = sum(step.get(kind, nan) * number for kind, number in found.items()) + sum(used.values())
    return out


def mllm_tokens(name: str) -> int:
    """Tokens of a square image at the default size of an MLLM."""
    from ...loaders.mllm.families import FAMILIES as families
    from ...loaders.mllm.vision import internvl_grid, qwen_grid

    family = families[MLLM_FAMILIES[name]]
    side = family.default_size
    grid = internvl_grid(side, side, family.vision, side, 1) if family.tiled else qwen_grid(side, side, family.vision)
    return grid.tokens


def vae_operations(convolutions: float, px: int) -> float:
    """Of one half of the VAE: operations per px, and its attention over 8 x 8 px in 512 channels."""
    return convolutions * px**2 + 4 * (px // 8) ** 4 * 512


def time_blocks() -> list[dict[str, Any]]:
    """Seconds and counts of steps through two blocks of FLUX.1 at full width, on this machine's processor."""
    from ...loaders.backbones import BACKBONES
    from ._models import random_dit

    model = random_dit("flux", dict(depth=1, depth_single_blocks=1))
    sizes = replace(BACKBONES["flux"].training.sizes, blocks=1, single=1)
    found: dict[tuple[int, int, str], dict[str, Any]] = {}
    for _ in range(2):  # the least of two rounds: the machine has other work
        for px, references, kind in BLOCKS:
            row = count(BACKBONES["flux"], [1.0, 0.0], px, references, sizes)
            seconds = time_steps(model, "flux", row, 1, (kind,))[kind]
            point = found.setdefault((px, references, kind), {"px": px, "references": references, "kind": kind})
            point |= {"tokens": row["tokens"]["in_dit"][kind], "tflop": row["step_tflop"][kind]}
            point["seconds"] = min(seconds, point.get("seconds", seconds))
            point["tflop_per_second"] = point["tflop"] / point["seconds"]
    return list(found.values())


def time_model(family: str, model: dict[str, Any], full: bool) -> None:
    """Puts the seconds of steps, parts and pictures into the rows of a family."""
    import torch

    from ...tests.small import dit
    from ._models import random_dit, release_sizes

    rows = [row for row in model["rows"] if row["references"] in MEASURED and (full or row["px"] == min(SIZES))]
    encoded = time_encodes(family, model["mllm"], full)
    free()
    halves = time_vae(family, {row["px"] for row in rows}, full)
    free()
    module = random_dit(family, release_sizes(family), torch.bfloat16) if full else dit.tiny(family)
    for row in rows:
        references = row["references"]
        seconds, row["tokens"]["context_measured"] = encoded[references]
        row["step_seconds"] = time_steps(module, family, row, 1 if row["px"] > 1024 else 2, tuple(KINDS))
        encode, decode = references * halves[row["reference_px"]][0], halves[row["px"]][1]
        row["parts_seconds"] = {"mllm": seconds, "vae_encode": encode, "vae_decode": decode}
        row["seconds"] = per_picture(row["steps"], row["step_seconds"], row["parts_seconds"])
        say(json.dumps({name: row[name] for name in ("px", "references", "step_seconds", "parts_seconds", "seconds")}))
    del module
    free()


def time_encodes(family: str, name: str, full: bool) -> dict[int, tuple[float, int]]:
    """Seconds of MLLM and DLA, and their tokens, by number of references."""
    import torch

    from ...loaders.conditioning import aggregate_conditioning
    from ._models import CONTEXT_WIDTHS, random_dla, random_mllm

    prompt, out = "a" + " a" * (PROMPT_TOKENS - 1), {}
    with tempfile.TemporaryDirectory() as folder:
        mllm = random_mllm(name, Path(folder), full)
        dla = random_dla(mllm, family, CONTEXT_WIDTHS[family])
        for references in MEASURED:
            images, found = [*torch.rand(references, REFERENCE_SIDE, REFERENCE_SIDE, 3)], []

            def encode(images: list, found: list) -> None:
                features = mllm.encode(prompt, images, layers=dla.config.required_layers)
                found.append(aggregate_conditioning(features, dla)[0][0])

            seconds = best(partial(encode, images, found), 2)
            out[references] = seconds, found[0].shape[1]
            say(f"{name}, {references} references: {out[references]}")
    return out


def time_vae(family: str, sides: set[int], full: bool) -> dict[int, tuple[float, float]]:
    """Seconds of encoding and of decoding a square picture, by its side in px."""
    import torch

    from ._models import random_vae

    vae, out = random_vae(family), {}
    for px in sorted(sides):
        pixels = torch.rand(1, px, px, 3)[:, :: 1 if full else 8, :: 1 if full else 8]
        latent = vae.encode(pixels)
        out[px] = best(partial(vae.encode, pixels), 2), best(partial(vae.decode, latent), 2)
    say(f"VAE: {out}")
    return out


def free() -> None:
    """Ends what no name holds any more, so that the next model is alone on the accelerator."""
    import comfy.model_management

    gc.collect()
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def time_steps(model: Any, family: str, row: dict, repeats: int, kinds: Sequence[str]) -> dict[str, float]:
    """Seconds of a step of each kind, the best of `repeats`, kinds in turn: guider, patch and DiT, without loading."""
    import comfy.sample
    import comfy.samplers
    import torch

    from ...loaders.backbones import BACKBONES
    from ...loaders.conditioning import values_of
    from ...loaders.dit import context_width
    from ...sampling.patch import apply_stages
    from ...sampling.stages import preset

    backbone = BACKBONES[family]
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    channels, scale = backbone.latent_channels, backbone.latent_downscale
    context = torch.randn(1, row["tokens"]["context"], context_width(model) or 0)
    sides = row["px"] // scale, row["reference_px"] // scale
    latent, *references = (
        torch.randn(1, channels, side, side) for side in (sides[0], *(sides[1:] * row["references"]))
    )
    mask = torch.ones(context.shape[:2], dtype=torch.bool)
    settings = dict(references=references, method=backbone.default_placement)
    condition = [[context, values_of(mask, backbone.counts_context, **settings)]]

    def sample(kind: str, model: Callable, x: Any, sigmas: Any, extra_args: dict) -> Any:
        with torch.no_grad():  # as in the host's own samplers
            seconds = best(lambda: model(x, sigmas[:1].expand(len(x)), **extra_args), 1)
        found[kind].append(seconds)
        return x

    for kind in [*kinds] * repeats:
        sampler = comfy.samplers.KSAMPLER(
            lambda model, x, sigmas, extra_args, kind=kind, **_: sample(kind, model, x, sigmas, extra_args)
        )
        staged = apply_stages(model, preset(kind))
        sigmas = torch.tensor([0.9, 0.0])
        comfy.sample.sample_custom(
            staged, latent, 1.0, sampler, sigmas, condition, condition, torch.zeros_like(latent), disable_pbar=True
        )
    return {kind: min(seconds) for kind, seconds in found.items()}


def best(work: Callable[[], Any], repeats: int) -> float:
    """Least seconds of so many runs, the accelerator's work included."""
    import torch

    def synchronize() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    seconds = []
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def write_docs(result: dict[str, Any]) -> None:
    """Draws the figure and writes the table of docs/speed.md."""
    from ...common.drawing.canvas import Canvas

    models = list(result["models"].values())
    high = 316
    canvas = Canvas(768, high * len(models) + 12)
    for number, model in enumerate(models):
        draw(canvas, model, number * high, last=number + 1 == len(models))
    canvas.picture().save(FIGURE, optimize=True)
    replace_between(PAGE, MARKS, table(result))


def draw(canvas: Any, model: dict[str, Any], top: int, last: bool) -> None:
    """Two panels of a model: tokens in the DiT, and seconds of a picture, or its operations where none are measured."""
    from ...common.drawing.axes import Axes
    from ...common.drawing.palette import BLUE, GREEN, PURPLE

    colours = {"both": PURPLE, "staged": GREEN, "mllm_only": BLUE}
    timed = any("seconds" in row for row in model["rows"])
    panels = (
        ("thousand tokens in the DiT, mean over steps", lambda row, way: row["tokens"]["mean"][way] / 1e3),
        ("seconds a picture", lambda row, way: row["seconds"][way] if "seconds" in row else nan)
        if timed
        else ("10^15 operations a picture", lambda row, way: row["tflop"][way] / 1e3),
    )
    canvas.text(12, top + 16, model["title"], size=14)
    canvas.legend([(TITLES[way], colour) for way, colour in colours.items()], 170, top + 16)
    for number, (title, value) in enumerate(panels):
        left = 64 + number * 380
        every = [value(row, way) for row in model["rows"] for way in WAYS]
        box = (left, top + 56, left + 268, top + 258)
        panel = Axes(canvas, box, REFERENCES, [one for one in every if not isnan(one)])
        panel.frame("references" if last else "", title)
        for px, (way, colour) in product(SIZES, colours.items()):
            rows = [row for row in model["rows"] if row["px"] == px and not isnan(value(row, way))]
            xs, ys = [row["references"] for row in rows], [value(row, way) for row in rows]
            panel.line(xs, ys, colour, 2)
            panel.points(xs, ys, colour)
            if ys and way != "staged":
                canvas.text(box[2] + 8, panel.at(xs[-1], ys[-1])[1], f"{px} px", colour)


def table(result: dict[str, Any]) -> str:
    """The markdown table: tokens, operations and, where they were measured, seconds."""
    heads = ["model", "px", "references", "MLLM + image + VAE tokens", "tokens in the DiT", "10^15 operations"]
    rows = [[*heads, "seconds a step", "seconds a picture"]]
    for model in result["models"].values():
        for row in model["rows"]:
            if row["references"] not in MEASURED:
                continue
            tokens = row["tokens"]
            three = [f"{tokens[group]:,}" for group in ("context", "image", "reference")]
            cells = [model["title"], str(row["px"]), str(row["references"]), " + ".join(three)]
            cells.append(" / ".join(f"{tokens['mean'][way]:,.0f}" for way in WAYS))
            cells.append(" / ".join(f"{row['tflop'][way] / 1e3:.2f}" for way in WAYS))
            steps, seconds = row.get("step_seconds"), row.get("seconds")
            cells.append(" / ".join(f"{steps[kind]:.2f}" for kind in KINDS) if steps else "–")
            cells.append(" / ".join(f"{seconds[way]:.1f}" for way in WAYS) if seconds else "–")
            rows.append(cells)
    device = f" Seconds: {result['device']}, bf16, random weights." if any(row[-1] != "–" for row in rows[1:]) else ""
    text = (
        "Tokens, operations and seconds of a picture: both throughout / staged / MLLM tokens alone; seconds of a step"
    )
    return f"{text}: with both, with MLLM tokens, with VAE tokens.{device}\n\n{markdown(rows)}"
