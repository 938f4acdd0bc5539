"""What a schedule gives to each step of one sampler run, as a picture and as text."""

from itertools import groupby

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..common.drawing.palette import COLOURS, FAINT, INK, PAPER, WIDTH
from .clock import REFERENCE_TOKENS
from .stages import PlannedStep, Stages, plan
from .tokens import grid

HEIGHT = 320
LEFT, RIGHT, TOP, ROW, GAP = 84, 20, 44, 84, 34


def preview(stages: Stages, model, sigmas: Tensor, latent: dict | None = None) -> tuple[Tensor, str]:
    """(plot (1, h, w, 3) in 0..1, text) for a run over `sigmas` of `model`; `latent` gives the token count."""
    patch = getattr(model.model.diffusion_model, "patch_size", 2)
    frames, rows, columns = grid(latent["samples"].shape, patch) if latent else (1, REFERENCE_TOKENS, 1)
    tokens = frames * rows * columns
    steps = plan(stages, sigmas, tokens)
    text = describe(stages, steps, tokens)
    pixels = numpy.asarray(draw(stages, steps, tokens), dtype=numpy.float32) / 255
    return torch.from_numpy(pixels)[None], text


def describe(stages: Stages, steps: list[PlannedStep], tokens: int) -> str:
    """One line per stage of the run."""
    if not steps:
        return "No steps: the sampler's sigmas are empty."
    lines = [f"{len(steps)} steps, clock {stages.clock.describe(tokens)}"]
    for (context, reference), group in groupby(steps, key=lambda s: (round(s.context, 3), round(s.reference, 3))):
        group = list(group)
        first, last = group[0], group[-1]
        lines.append(
            f"steps {first.step + 1}-{last.step + 1} ({len(group)}), flow time {first.sigma:.3f} to {last.sigma:.3f}: "
            f"MLLM {context:g}, VAE {reference:g}"
        )
    used = {(s.context > 0, s.reference > 0) for s in steps}
    for pair in stages.variants():
        if pair in used:
            continue
        names = " and ".join(name for name, on in zip(("MLLM", "VAE"), pair) if on) or "neither"
        lines.append(
            f"No step falls into the stage with {names}: use more steps, another scheduler or other thresholds."
        )
    return "\n".join(lines)


def draw(stages: Stages, steps: list[PlannedStep], tokens: int) -> Image.Image:
    """Two rows of bars over the steps, bar height = strength (1 = full row), thresholds as vertical lines."""
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default()
    count = max(len(steps), 1)
    step = (WIDTH - LEFT - RIGHT) / count
    pen.text((LEFT, 14), f"{len(steps)} steps - clock: {stages.clock.name}", INK, font)
    for row, (name, label) in enumerate((("context", "MLLM tokens"), ("reference", "VAE tokens"))):
        top = TOP + row * (ROW + GAP)
        pen.text((8, top + ROW // 2 - 6), label, INK, font)
        pen.rectangle((LEFT, top, WIDTH - RIGHT, top + ROW), outline=FAINT)
        for s in steps:
            height = ROW * min(getattr(s, name), 1.0)
            if height > 0:
                left = LEFT + s.step * step
                pen.rectangle(
                    (left + 0.5, top + ROW - height, left + step - (1.5 if step > 4 else 0), top + ROW),
                    COLOURS["mllm" if name == "context" else "vae"],
                )
    bottom = TOP + 2 * ROW + GAP
    every = max(1, round(count / 12))
    for s in steps:
        if s.step % every == 0:
            left = LEFT + s.step * step
            pen.text((left + 1, bottom + 6), str(s.step + 1), INK, font)
            pen.text((left + 1, bottom + 20), f"{s.sigma:.2f}", (120, 120, 128), font)
    pen.text((8, bottom + 6), "step", INK, font)
    pen.text((8, bottom + 20), "flow time", (120, 120, 128), font)
    for start in stages.starts(tokens)[1:]:
        first = next((s for s in steps if stages.clock.reached(s.position, start)), None)
        if first is not None:
            x = LEFT + first.step * step
            pen.line((x, TOP - 6, x, bottom), INK, 1)
            pen.text((x + 3, TOP - 16), f"{start:.3g}", INK, font)
    return image
