"""A run inside the graph: from a node's inputs, with the host's progress bar, previews, folders and interrupt."""

import logging
import time
from math import inf
from pathlib import Path

import comfy.model_management
import comfy.utils
from PIL import Image
from torch import Tensor

from ..common.drawing.palette import PAPER, WIDTH
from ..common.drawing.sheet import contact_sheet, to_batch, to_tensor
from ..common.picture_files import open_picture
from ..loaders.dla import DLA, load_dla
from .checkpoints import check_same_run, newest_state
from .export import check_free
from .inputs import BESIDE, NONE, TRAINING_STAGES, find_source
from .models import TrainingModels, find_lora, start_files
from .paths import RunPaths, run_paths
from .recipe import Recipe, RecipeError
from .reporting.plots import validation_plot
from .reporting.progress import History, Progress
from .run import train

log = logging.getLogger(__name__)
SECONDS = 5  # between previews on the node


def check_inputs(*, data=None, name=None, stage=None, start_lora=NONE, options="", **widgets) -> None:
    """Checks the node's inputs before any model is loaded, from files' headers alone; a linked input is None.

    Raises ValueError where a run of these settings could neither begin nor resume; a link is left to the run.
    """
    if start_lora not in (None, NONE, BESIDE):
        find_lora(start_lora)
    source = None if data is None else find_source(data)
    given = {"name": name, "stage": stage, "start_lora": start_lora, "options": options}
    recipe = _recipe(source, **given, **widgets)
    if None not in (data, *given.values(), widgets.get("lora_rank"), widgets.get("seed")):
        start_files(recipe)
        paths = run_paths(recipe)
        state = newest_state(paths.output_dir) or {}
        if state:
            check_same_run(state, recipe)
        check_free(paths, state.get("identity", ""))


def train_in_graph(
    model, vae, mllm, *, data: str, dla: DLA | None = None, clip=None, start_lora: str = NONE, **widgets
) -> tuple[DLA, Tensor, str, Tensor | None]:
    """Returns the trained DLA, plots (n, h, w, 3) in 0..1, a report, and the last sample sheet (1, h, w, 3) or None.

    Raises the host's InterruptProcessingException for an interrupt, once all is saved, and ValueError where the
    settings, data or files cannot be used.
    """
    if start_lora == BESIDE and dla is None:
        raise ValueError(f"Train DLA: start_lora is {BESIDE!r}, but no DLA is connected. Connect one, or set {NONE}.")
    recipe = _recipe(find_source(data), dla=dla, start_lora=start_lora, **widgets)
    paths, name = run_paths(recipe), recipe.run.name
    preview = Preview(recipe, paths)
    try:
        result = train(recipe, TrainingModels(model, vae, mllm, clip, *start_files(recipe)), paths, preview)
    except comfy.model_management.InterruptProcessingException:
        step = preview.history.step if preview.history else 0
        saved = "all is saved, queue again to resume" if step else "nothing was trained yet"
        log.info("%s: stopped at step %d, %s", name, step, saved)
        raise
    report, history, sheet = result.text(), result.history, newest_samples(paths)
    log.info("%s: %s", name, result.headline)  # what else is in the report was logged when it happened
    plots = [history.curve(), *([validation_plot(history.validation)] if history.validation else [])]
    return load_dla(result.dla.name), to_batch(plots), report, None if sheet is None else to_tensor(sheet)


class Preview:
    """A callback that shows on the node the host's progress bar, a line of text, the losses and the newest samples."""

    def __init__(self, recipe: Recipe, paths: RunPaths):
        self.name, self.paths = recipe.run.name, paths
        self.history: History | None = None
        self.bar = comfy.utils.ProgressBar(recipe.steps)
        self.text, self.shown = "", -inf

    def __call__(self, progress: Progress) -> None:
        """Updates bar and preview."""
        now, picture, self.history = time.monotonic(), None, progress.history
        message = progress.seconds is None
        if message and progress.text:
            log.info("%s: %s", self.name, progress.text)
        if not message or progress.text and progress.picture is None:  # else it is a table
            self.text = progress.line
        if message or now - self.shown > SECONDS:
            page = self._page(progress.history)
            picture, self.shown = ("JPEG", page, max(page.size)), now
        self.bar.update_absolute(progress.step, progress.steps, picture)

    def _page(self, history: History) -> Image.Image:
        """In the image rather than as text on the node, which the editor would save among the node's values."""
        parts = [contact_sheet([(self.text, [])])]
        if history.losses:
            parts.append(history.curve())
        sheet = newest_samples(self.paths)
        if sheet is not None:
            parts.append(sheet.resize((WIDTH, round(sheet.height * WIDTH / sheet.width)), Image.Resampling.LANCZOS))
        page, top = Image.new("RGB", (WIDTH, sum(part.height for part in parts)), PAPER), 0
        for part in parts:
            page.paste(part, (0, top))
            top += part.height
        return page


def newest_samples(paths: RunPaths) -> Image.Image | None:
    """Opens the run's newest sample sheet."""
    newest = max(paths.samples.glob("step-*.jpg"), default=None)
    return None if newest is None else open_picture(newest).convert("RGB")


def _recipe(
    source: Path | None, *, name, stage, lora_rank=None, dla=None, start_lora=NONE, options="", **widgets
) -> Recipe:
    """The node's inputs as a Recipe; None: linked, so not known yet."""
    if stage not in (None, *TRAINING_STAGES):
        raise RecipeError(f"Train DLA: stage is {stage!r}, expected {' or '.join(TRAINING_STAGES)}.")
    own = ("steps", "learning_rate", "resolution", "batch_size", "accumulate", "seed")
    values = {key: widgets.get(key) for key in own}
    values |= {"stage": stage and TRAINING_STAGES.index(stage) + 1, "rank": lora_rank}
    values["start_dla"] = getattr(dla, "name", None)
    values["start_lora"] = {NONE: "", BESIDE: values["start_dla"]}.get(start_lora, start_lora)
    values = {key: value for key, value in values.items() if value is not None}
    return Recipe.from_widgets(source or Path("linked"), "linked" if name is None else name, options or "", values)
