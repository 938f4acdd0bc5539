"""A run inside the graph: the host's progress bar and previews, its folders, its interrupt."""

from __future__ import annotations

import logging
import time
from math import ceil, inf
from types import SimpleNamespace

import comfy.model_management
import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from ..common.drawing.palette import PAPER, WIDTH
from ..common.drawing.sheet import contact_sheet, to_tensor
from ..loaders.dla import DLA, load_dla
from . import checkpoints as state
from .export import check_free
from .parts import Parts, homes, starts
from .recipe import Recipe
from .reporting.plots import validation_plot
from .reporting.progress import Progress
from .run import Run

log = logging.getLogger(__name__)
SECONDS = 5  # between pictures of a run on its node


def check(recipe: Recipe, whole: bool = True) -> None:
    """Raises ValueError where a run of these settings could neither begin nor go on, from files' headers alone. whole:
    the recipe holds all that the node will be given; else what may come by a link is left to the run itself."""
    if whole:
        starts(recipe)
        runs, _, places = homes()
        found = state.checkpoints(runs / recipe.run.name)
        facts = state.read_facts(found[-1]) if found else {}
        if facts:
            state.check_same_run(facts, recipe)
        check_free(SimpleNamespace(recipe=recipe, places=places, identity=facts.get("identity", "")))


def train_in_graph(recipe: Recipe, model, vae, mllm, clip=None) -> tuple[DLA, Tensor, str, Tensor | None]:
    """(DLA, plots (n, h, w, 3) in 0..1, report, last sample pictures (1, h, w, 3) or None). Raises what the host raises
    for an interrupt, once all is saved."""
    runs, cache, places = homes()
    board = Board(recipe)
    parts = Parts(model, vae, mllm, clip, *starts(recipe))
    # Hosts run nodes under inference mode, where nothing can be trained.
    with torch.inference_mode(False), torch.enable_grad():
        board.run = run = Run(recipe, parts, runs / recipe.run.name, places, board, cache=cache)
        try:
            result = run.train()
        except comfy.model_management.InterruptProcessingException:
            saved = "all is saved, queue again to go on" if run.step else "nothing was trained yet"
            log.info("%s: stopped at step %d, %s", recipe.run.name, run.step, saved)
            raise
    report = result.text()
    log.info("%s: %s", recipe.run.name, report)
    plots = [result.curve, *([validation_plot(result.validation)] if result.validation else [])]
    sheet = board.sheet()
    return load_dla(result.dla.name), batch(plots), report, None if sheet is None else to_tensor(sheet)


class Board:
    """What the node shows while it runs: the host's progress bar, and a picture with a line of text, the losses so far
    and the last sample pictures. Hears the run's Progress."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.run = recipe, None
        self.bar = comfy.utils.ProgressBar(recipe.steps)
        self.begun: tuple[int, float] | None = None  # first step here, and when
        self.text, self.shown = "", -inf

    def __call__(self, progress: Progress) -> None:
        now, picture = time.monotonic(), None
        if progress.loss is not None:
            self.text = self.line(progress, now)
        elif progress.text:
            log.info("%s: %s", self.recipe.run.name, progress.text)
            self.text = progress.text if progress.picture is None else self.text  # else a table
        if progress.loss is None or now - self.shown > SECONDS:
            page = self.page()
            picture, self.shown = ("JPEG", page, max(page.size)), now
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

    def page(self) -> Image.Image:
        """In the picture rather than as text on the node, which the editor would save among the node's values."""
        parts = [contact_sheet([(self.text, [])])]
        if self.run.losses:
            parts.append(self.run.curve())
        sheet = self.sheet()
        if sheet is not None:
            parts.append(sheet.resize((WIDTH, round(sheet.height * WIDTH / sheet.width)), Image.Resampling.LANCZOS))
        page, top = Image.new("RGB", (WIDTH, sum(part.height for part in parts)), PAPER), 0
        for part in parts:
            page.paste(part, (0, top))
            top += part.height
        return page

    def sheet(self) -> Image.Image | None:
        """The run's newest sample pictures."""
        newest = max((self.run.folder / "samples").glob("step-*.jpg"), default=None)
        return None if newest is None else Image.open(newest).convert("RGB")


def batch(pictures: list[Image.Image]) -> Tensor:
    """(n, h, w, 3) in 0..1: smaller ones stand on the largest's paper."""
    size = tuple(max(sides) for sides in zip(*(picture.size for picture in pictures)))
    pages = [Image.new("RGB", size, PAPER) for _ in pictures]
    for page, picture in zip(pages, pictures):
        page.paste(picture)
    return torch.cat([to_tensor(page) for page in pages])
