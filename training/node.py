"""A run inside the graph: the host's progress bar and previews, its folders, its interrupt."""

from __future__ import annotations

import logging
import sys
import time
from math import ceil, inf
from types import SimpleNamespace

import comfy.model_management
import comfy.utils
import numpy
import torch
from PIL import Image
from torch import Tensor

from ..loaders.dla import DLA, load_dla
from . import state
from .export import check_free
from .loop import Run
from .parts import Parts, homes, starts
from .plots import PAPER, WIDTH, validation_plot
from .recipe import Recipe
from .result import Progress

log = logging.getLogger(__name__)
SECONDS = 5  # between pictures of a run on its node
SIDE = 2048  # longest side of one in px


def check(recipe: Recipe, whole: bool = True) -> None:
    """Raises ValueError where a run of these settings could neither begin nor go on, from files' headers alone. whole:
    the recipe holds all that the node will be given; else what may come by a link is left to the run itself."""
    starts(recipe)
    if whole:
        runs, _, places = homes()
        found = state.checkpoints(runs / recipe.run.name)
        facts = state.read_facts(found[-1]) if found else {}
        if facts:
            state.check_same_run(facts, recipe)
        check_free(SimpleNamespace(recipe=recipe, places=places, identity=facts.get("identity", "")))


def train_in_graph(
    recipe: Recipe, model, vae, mllm, clip=None, node: str | None = None
) -> tuple[DLA, Tensor, str, Tensor | None]:
    """(DLA, plots (n, h, w, 3) in 0..1, report, last sample pictures (1, h, w, 3) or None). node: its id in the graph,
    for a line of text on it. Raises what the host raises for an interrupt, once all is saved."""
    runs, cache, places = homes()
    board = Board(recipe, node)
    parts = Parts(model, vae, mllm, clip, *starts(recipe))
    # Hosts run nodes under inference mode, where nothing can be trained.
    with torch.inference_mode(False), torch.enable_grad():
        board.run = run = Run(recipe, parts, runs / recipe.run.name, places, board, cache=cache)
        try:
            result = run.train()
        except comfy.model_management.InterruptProcessingException:
            board.say(f"Stopped at step {run.step}" + (", all saved: queue again to go on" if run.step else ""))
            raise
    report = result.text()
    board.say(report.split("\n")[0])
    plots = [result.curve, *([validation_plot(result.validation)] if result.validation else [])]
    sheet = board.sheet()
    return load_dla(result.dla.name), batch(plots), report, None if sheet is None else batch([sheet])


class Board:
    """What the node shows while it runs: the host's progress bar, a line of text, and a picture of the losses so far over
    the last sample pictures. Hears the run's Progress."""

    def __init__(self, recipe: Recipe, node: str | None):
        self.recipe, self.node, self.run = recipe, node, None
        self.bar = comfy.utils.ProgressBar(recipe.steps)
        self.begun: tuple[int, float] | None = None  # first step here, and when
        self.spoken = self.shown = -inf

    def __call__(self, progress: Progress) -> None:
        now, picture = time.monotonic(), None
        if progress.loss is None and progress.picture is not None:
            log.info("%s", progress.text)  # a table
        elif progress.loss is None:
            self.say(progress.text)
        elif now - self.spoken > 1 or progress.step == progress.steps:
            self.write(self.line(progress, now))
            self.spoken = now
        if progress.picture is not None or (progress.loss is not None and now - self.shown > SECONDS):
            page = self.page() or progress.picture
            picture, self.shown = ("JPEG", page, SIDE), now
        self.bar.update_absolute(progress.step, progress.steps, picture)

    def line(self, progress: Progress, now: float) -> str:
        text = f"step {progress.step:,} of {progress.steps:,}, loss {progress.loss:.4f}"
        first, start = self.begun = self.begun or (progress.step, now)
        if progress.step > first:
            seconds = (now - start) / (progress.step - first)
            minutes = ceil(seconds * (progress.steps - progress.step) / 60)
            text += f", {seconds:.2f} s a step"
            if minutes:
                text += f", {minutes // 60} h {minutes % 60} min left" if minutes >= 60 else f", {minutes} min left"
        return text

    def say(self, text: str) -> None:
        """To the log, and its first line to the node."""
        if text:
            log.info("%s: %s", self.recipe.run.name, text)
            self.write(text.split("\n")[0])

    def write(self, text: str) -> None:
        """On the node, where there is a server."""
        server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        if server is not None and self.node is not None:
            server.send_progress_text(text, self.node)

    def page(self) -> Image.Image | None:
        """Loss curve, then the newest sheet; None where there is neither."""
        sheet = self.sheet()
        parts = [self.run.curve()] if self.run.losses else []
        if sheet is not None:
            parts.append(sheet.resize((WIDTH, round(sheet.height * WIDTH / sheet.width)), Image.Resampling.LANCZOS))
        if not parts:
            return None
        page = Image.new("RGB", (WIDTH, sum(part.height for part in parts)), PAPER)
        for number, part in enumerate(parts):
            page.paste(part, (0, sum(above.height for above in parts[:number])))
        return page

    def sheet(self) -> Image.Image | None:
        """The run's newest sample pictures."""
        newest = max((self.run.folder / "samples").glob("step-*.jpg"), default=None)
        return None if newest is None else Image.open(newest).convert("RGB")


def batch(pictures: list[Image.Image]) -> Tensor:
    """(n, h, w, 3) in 0..1: smaller ones stand on the largest's paper."""
    width, height = (max(getattr(picture, side) for picture in pictures) for side in ("width", "height"))
    pages = []
    for picture in pictures:
        page = Image.new("RGB", (width, height), PAPER)
        page.paste(picture)
        pages.append(torch.from_numpy(numpy.asarray(page, dtype=numpy.float32) / 255))
    return torch.stack(pages)
