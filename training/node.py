"""A run inside the graph: the host's progress bar and previews, its folders, its interrupt."""

from __future__ import annotations

import logging

import comfy.utils
import numpy
import torch
from PIL import Image
from torch import Tensor

from ..loaders.dla import DLA, load_dla
from .loop import Parts, Progress, train
from .parts import homes, starts
from .plots import validation_plot
from .recipe import Recipe

log = logging.getLogger(__name__)
PREVIEW_SIDE = 1024


def train_in_graph(recipe: Recipe, model, vae, mllm, clip=None) -> tuple[DLA, Tensor, str]:
    """(DLA, plots (n, h, w, 3) in 0..1, report). Raises what the host raises for an interrupt, once all is saved."""
    runs, cache, places = homes()
    bar = comfy.utils.ProgressBar(recipe.steps)

    def listen(progress: Progress) -> None:
        if progress.text and progress.loss is None:
            log.info("%s: %s", recipe.run.name, progress.text)
        picture = ("JPEG", progress.picture, PREVIEW_SIDE) if progress.picture is not None else None
        bar.update_absolute(progress.step, recipe.steps, picture)

    parts = Parts(model, vae, mllm, clip, *starts(recipe))
    result = train(recipe, parts, runs / recipe.run.name, places, listen, cache=cache)
    plots = [result.curve] + ([validation_plot(result.validation)] if result.validation else [])
    return load_dla(result.dla.name), _images(plots), result.text()


def _images(pictures: list[Image.Image]) -> Tensor:
    """One batch: smaller ones stand on the largest's white."""
    width, height = (max(getattr(picture, side) for picture in pictures) for side in ("width", "height"))
    pages = []
    for picture in pictures:
        page = Image.new("RGB", (width, height), "white")
        page.paste(picture)
        pages.append(torch.from_numpy(numpy.asarray(page, dtype=numpy.float32) / 255))
    return torch.stack(pages)
