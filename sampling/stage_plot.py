"""What a schedule gives to each step of one sampler run, as a picture and as text."""

from collections.abc import Sequence
from itertools import groupby

from PIL import Image
from torch import Tensor

from ..common.drawing.canvas import Canvas
from ..common.drawing.palette import BLUE, FAINT, GREY, INK, ORANGE, WIDTH
from ..common.drawing.sheet import to_tensor
from ..loaders.backbones import backbone_of
from ..loaders.dit import dit_of
from ..loaders.protocols import Model
from .clock import REFERENCE_TOKENS
from .stages import PlannedStep, Stages, plan
from .tokens import grid, patch_size

HEIGHT = 304
LEFT, RIGHT, TOP, ROW, GAP = 92, 20, 44, 84, 34


def preview(
    stages: Stages, model: Model, sigmas: Sequence[float] | Tensor, latent: dict | None = None
) -> tuple[Tensor, str]:
    """(plot (1, h, w, 3) in 0..1, text) for a run over `sigmas` of `model`; `latent` gives the token count."""
    patch = patch_size(dit_of(model.model), backbone_of(model))
    frames, rows, columns = grid(latent["samples"].shape, patch) if latent else (1, REFERENCE_TOKENS, 1)
    tokens = frames * rows * columns
    steps = plan(stages, sigmas, tokens)
    text = describe(stages, steps, tokens)
    return to_tensor(draw(stages, steps, tokens)), text


def describe(stages: Stages, steps: list[PlannedStep], tokens: int) -> str:
    """One line per stage of the run."""
    if not steps:
        return "No steps: the sampler's sigmas are empty."
    lines = [f"{len(steps)} steps, clock {stages.clock.describe(tokens)}"]
    for (context, reference), group in groupby(steps, key=lambda s: (round(s.context, 3), round(s.reference, 3))):
        found = list(group)
        first, last = found[0], found[-1]
        lines.append(
            f"steps {first.step + 1}-{last.step + 1} ({len(found)}), flow time {first.sigma:.3f} to {last.sigma:.3f}: "
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
    canvas = Canvas(WIDTH, HEIGHT)
    count = max(len(steps), 1)
    step = (WIDTH - LEFT - RIGHT) / count
    bottom, gap = TOP + 2 * ROW + GAP, 0.5 if step > 4 else 0
    canvas.text(LEFT, 20, f"{len(steps)} steps - clock: {stages.clock.name}")
    for row, (name, label, colour) in enumerate(
        (("context", "MLLM tokens", BLUE), ("reference", "VAE tokens", ORANGE))
    ):
        floor = TOP + row * (ROW + GAP) + ROW
        canvas.text(8, floor - ROW / 2, label)
        canvas.rectangle((LEFT, floor - ROW, WIDTH - RIGHT, floor), outline=FAINT)
        for s in steps:
            height = ROW * min(getattr(s, name), 1.0)
            if height > 0:
                left = LEFT + s.step * step
                canvas.rectangle((left + gap, floor - height, left + step - gap, floor), colour)
    canvas.text(8, bottom + 13, "step")
    canvas.text(8, bottom + 28, "flow time", GREY)
    for s in steps[:: max(1, round(count / 12))]:
        middle = LEFT + (s.step + 0.5) * step
        canvas.text(middle, bottom + 13, str(s.step + 1), anchor="mm")
        canvas.text(middle, bottom + 28, f"{s.sigma:.2f}", GREY, anchor="mm")
    for start in stages.starts(tokens)[1:]:
        first = next((s for s in steps if stages.clock.reached(s.position, start)), None)
        if first is not None:
            x = LEFT + first.step * step
            canvas.line([(x, TOP - 8), (x, bottom)], INK)
            canvas.text(x + 4, TOP - 8, f"{start:.3g}")
    return canvas.picture()
