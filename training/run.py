"""The training loop: the same one for the node and for the script.

A run is a sequence of phases, of which each brings the models that it needs onto the device: encode ahead (VAE, MLLM),
train (DiT with what is trained), validate (VAE and MLLM, then DiT), sample (all), save (none).
"""

import csv
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from PIL import Image
from torch import nn

from ..common.files import replacing, save_text
from .build import build, required_memory
from .checkpoints import begun_scores, check_same_run, resume, save
from .data.batches import Batch, PassPlan
from .export import check_free, export, provenance
from .models import TrainingModels
from .optimizer import rate
from .paths import RunPaths
from .processes import Moments, Processes, full
from .recipe import Recipe, RecipeError
from .reporting.losses import finite_problem, table, write_table
from .reporting.plots import validation_plot
from .reporting.progress import LEFT_OUT, SHOWN, History, Progress, Result
from .samples import sample_sheet
from .validation import evaluate, frequencies

MARKS = ("fingerprint", "content")  # of the data; 0.1.0's states have the first alone
UNSEEN = ("source", "validation_source", "cache_features", "encode_ahead")  # settings of data that change no example
COUNTED = 10_000  # most examples whose features' size is estimated one by one


def train(
    recipe: Recipe,
    models: TrainingModels,
    paths: RunPaths,
    callback: Callable[[Progress], None] = lambda _: None,
    accelerator: Any = None,
) -> Result:
    """Trains from a run's settings to its finished files, resuming from its newest checkpoint if there is one.

    On any exception, an interrupt too, the last whole step is saved first. `callback` is called after each step, and
    with messages and plots; it may raise to stop the run. `accelerator` is Hugging Face's, for several processes.

    Raises ValueError before anything is trained or written, where the settings, data or files cannot be used.
    """
    processes = Processes(accelerator)
    # Hosts run nodes under inference mode, where nothing can be trained.
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        processes.from_main(lambda: stack.enter_context(paths.alone()))
        stack.enter_context(processes.interrupts())
        return _Run(recipe, models, paths, callback, processes).train()


class _Run:
    """The loop and its state."""

    def __init__(self, recipe, models, paths, callback, processes):
        self.models, self.paths, self.callback = models, paths, callback
        self.processes, self.main = processes, processes.main
        self.history, self._said = History(recipe.run.name, {}), set[str]()
        scores = processes.from_main(lambda: begun_scores(paths.output_dir))
        self.recipe = recipe
        if models.start_dla is None and scores not in (None, given := recipe.dla.scores):
            self.recipe = replace(recipe, dla=replace(recipe.dla, scores=scores))
            self._say(f"dla.scores is {given} now, this run began with {scores}, and continues so.")
        with processes.main_first():  # one indexes the data for all
            self.components = build(self.recipe, models, paths.cache_dir, self._say_of_data)
        self.data, self.module, self.optimizer, self.batches, self.held_out = self.components
        self.wrapped: nn.Module = self.module  # what training passes call
        self.history.weights = frequencies(self.recipe.shares, self.batches.times)
        self._encoded: deque[PassPlan] = deque()  # the coming passes whose inputs are encoded, the DiT on the device
        self._invalid: list[str] = []  # validations whose losses are no numbers
        self._consistent = True  # weights, moments and losses are those of the same step

    def train(self) -> Result:
        """Runs all phases until `recipe.steps`."""
        self._check_same_data()
        self._resume()
        ended = False
        if self.module.lora is not None:
            self.module.lora.attach()
        try:
            self._announce()
            self._say("loading the MLLM and the VAE, encoding the first examples")
            self._between_steps()
            started, first = time.perf_counter(), self.history.step
            while self.history.step < self.recipe.steps:
                self._train_step()
                seconds = (time.perf_counter() - started) / (self.history.step - first)
                self.callback(Progress(self.history, self.recipe.steps, seconds))
                if self.processes.stopped:
                    raise KeyboardInterrupt
                self._between_steps()
            ended = True
        finally:
            if self.module.lora is not None:
                self.module.lora.detach()
            # sharded weights are saved by all processes together: not where one of them failed
            if self._consistent and self.history.step and (ended or not self.processes.apart):
                self._save()
        return Result(self.paths.dla, self.paths.lora, self.history, self._problems())

    # before the first step ------------------------------------------------------------------------------------------

    def _check_same_data(self) -> None:
        """Raises RecipeError where the main process reads other data than this one."""
        counts = len(self.data.training), len(self.data.validation)
        expected = self.processes.from_main(lambda: counts)
        if counts != expected:
            raise RecipeError(
                f"data.source: process {self.processes.rank} reads {counts[0]} examples to train on and {counts[1]} "
                f"held out, expected the main process's {expected[0]} and {expected[1]}. Give every machine the same "
                "files, or a folder that all share."
            )

    def _resume(self) -> None:
        """Takes over the newest checkpoint, which the main process alone reads, and prepares for several processes."""
        moments: Moments = {}

        def read() -> dict[str, Any]:
            trained = (self.module.dla, self.module.lora, self.optimizer)
            found = resume(self.paths.output_dir, self._check_same_run, *trained)
            if found is not None:
                for problem in found.problems:
                    self._say(problem)
                self.history.restore(found.state)
                moments.update(found.moments)
                self._say(f"Resuming from step {self.history.step} ({found.checkpoint.name})")
            check_free(self.paths, self.history.identity)
            return self.history.to_dict()

        self.history.restore(self.processes.from_main(read))
        self.wrapped = self.processes.prepare(self.module, self.optimizer)
        self.processes.load_moments(self.optimizer, moments)

    def _check_same_run(self, state: dict) -> None:
        """Raises RecipeError where the checkpoint is of another run."""
        check_same_run(state, self.recipe)
        now = self._state()
        for name in ("mllm", "family"):
            if state[name] != now[name]:
                raise RecipeError(
                    f"Run '{self.recipe.run.name}' was begun with {name} {state[name]!r}, now it is {now[name]!r}. "
                    "Load that one to resume, or choose another run.name to begin a new one."
                )
        for name in ("start_dla", "start_lora"):
            before, new = state["recipe"].get("run", {}).get(name, ""), now["recipe"]["run"][name]
            if before != new:
                self._say(f"{name} is {new or 'none'} now, this run began from {before or 'none'}, and continues so.")
        if any(state["data"].get(name, given) != given for name in MARKS for given in [now["data"][name]]):
            self._say("The data have changed since this run began: it continues with the new ones.")
        for name, new in now["recipe"]["data"].items():
            before = state["recipe"].get("data", {}).get(name, new)
            if before != new and name not in UNSEEN:
                self._say(f"data.{name} is {new} now, this run had {before}: it continues with {new}.")

    def _announce(self) -> None:
        data, features = self.data, self.batches.features
        self._say(
            f"{len(data.training)} examples to train on, {len(data.validation)} held out, {len(data.problems)} left "
            f"out; {sum(p.numel() for p in self.module.parameters()):,} parameters are trained"
        )
        if self.processes.count > 1:
            each = "its share" if self.processes.sharded else "all"
            self._say(f"{self.processes.count} processes, each with {each} of what is trained")
        for problem in data.problems[:SHOWN]:
            self._say(f"left out: {problem}")
        if len(data.problems) > SHOWN and self.main:
            save_text(self.paths.output_dir / LEFT_OUT, "\n".join(data.problems))
            self._say(f"left out: {len(data.problems) - SHOWN:,} more, all of them in {LEFT_OUT} of the run's folder")
        if self.recipe.data.cache_features and self.main:
            count = len(data.training) + len(data.validation)
            step = -(-count // COUNTED)  # of many examples, some evenly spaced ones stand for all
            some = (side[row] for side in (data.training, data.validation) for row in range(0, len(side), step))
            size = features.size(sorted({(e.prompt, e.references) for e in some})) * step / 2**30
            self._say(f"The MLLM's features will take {size:.2f} GB in {features.folder}")

    # phases ---------------------------------------------------------------------------------------------------------

    def _encode_ahead(self, position: int) -> None:
        """Plans and encodes this process's passes from `position` on; afterwards the DiT has the device."""
        count = max(1, self.recipe.data.encode_ahead // self.recipe.training.batch_size)
        known = len(self.batches.problems)
        self._encoded.extend(self.batches.plan(position + i * self.processes.count) for i in range(count))
        for problem in self.batches.problems[known:]:
            self._say(f"left out, the next example of its sizes takes its place: {problem}")
        self.batches.encode(self._encoded)
        self._say("loading the diffusion model")
        self.module.backbone.load(required_memory(self.components, self.recipe, self.processes.shards))

    def _train_step(self) -> None:
        options, step = self.recipe.training, self.history.step
        self.optimizer.zero_grad(set_to_none=True)
        loss = sum(self._pass(step * options.accumulate + part) for part in range(options.accumulate))
        loss = self.processes.mean(loss, self.module.backbone.device)
        self._expect_finite("loss", loss)
        parameters = list(self.module.parameters())
        for parameter in parameters:  # without a gradient in this step: zero, whichever way it was run
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = full(nn.utils.clip_grad_norm_(parameters, options.clip_norm or math.inf))
        self._expect_finite("gradients' norm", float(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate(self.recipe, step)
        self._consistent = False
        self.optimizer.step()
        self.history.losses.append(loss)
        self._consistent = True

    def _pass(self, number: int) -> float:
        """Accumulates the gradients of pass `number` of this process; returns its share of the step's loss."""
        if not self._encoded:
            # counted so that n processes are one that accumulates n times as many passes
            self._encode_ahead(number * self.processes.count + self.processes.rank)
        batch: Batch = self.batches.load(self._encoded.popleft())
        last = (number + 1) % self.recipe.training.accumulate == 0
        with self.processes.training_pass(self.wrapped, last), self.module.backbone.gradients():
            loss = self.wrapped(batch).mean() / self.recipe.training.accumulate
            if self.processes.count > 1:
                loss = loss + self.module.untouched().to(loss.device)
            loss.backward()
        comfy.model_management.throw_exception_if_processing_interrupted()
        return float(loss.detach())

    def _expect_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise RuntimeError(
                f"The {what} is {value} at step {self.history.step + 1}. The last good checkpoint stays; lower the "
                f"learning rate (now {self.recipe.training.learning_rate:g}), or load MLLM and diffusion model in bf16 "
                "instead of fp16."
            )

    def _between_steps(self) -> None:
        """Runs the phases that are due at this step."""
        options, step = self.recipe.run, self.history.step

        def due(every: int) -> bool:
            return bool(every) and (step % every == 0 or step == self.recipe.steps)

        sheet = self.paths.samples / f"step-{step:08d}.jpg"
        validates = self.held_out is not None and due(options.validate_every) and step not in self.history.validation
        samples = due(options.sample_every)
        if validates or samples:
            with self.processes.whole(self.module, self.module.backbone.device):
                if validates:
                    self._validate()
                if samples and self.main and not sheet.exists():
                    self._sample(sheet)
        if self.main and step and (due(options.save_every) or due(options.validate_every)):
            self._show(self.history.curve(), self.paths.output_dir / "loss.png")
        if step and due(options.save_every):
            self._save()
        self.processes.wait()

    def _validate(self) -> None:
        self._encoded.clear()  # the DiT leaves the device, and other features take these passes' memory
        step, history, file = self.history.step, self.history.validation, self.paths.output_dir / "validation.csv"
        losses = evaluate(self.module, self.held_out, self.recipe.run.validation_examples, self.processes)
        if problem := finite_problem(losses):
            self._invalid.append(f"the validation of step {step}, {problem}")
            self._say(f"left out: {self._invalid[-1]}")
            return
        if self.main:
            if not history:
                file.unlink(missing_ok=True)
            write_table(file, step, losses)
        history[step] = losses  # not before they are in the table: it would lack them for good
        if not self.main:
            return
        self._show(validation_plot(history), file.with_suffix(".png"), table(history[step]))

    def _sample(self, sheet: Path) -> None:
        self._encoded.clear()  # as in _validate
        examples = self.held_out or self.batches
        self._show(sample_sheet(self.recipe, self.module, examples, self.models.vae), sheet)

    def _save(self) -> None:
        """Writes checkpoint, losses and finished files in the main process; all come here, for sharded weights."""
        folder, step, module = self.paths.output_dir, self.history.step, self.module
        moments = self.processes.moments(self.optimizer)
        with self.processes.whole(module):
            if self.main:
                save(folder, step, module.dla, module.lora, moments, self._state(), self.recipe.run.keep)
                with replacing(folder / "loss.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerows([("step", "loss"), *enumerate(self.history.losses, 1)])
                self._export()

    def _export(self) -> None:
        made = provenance(self.recipe, self.history, self.module.backbone.family.name, len(self.data.training))
        export(self.paths, self.module.dla, self.module.lora, self.recipe.run.dtype, made)

    # reports --------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside weights and moments."""
        data = self.data
        counts = {"training": len(data.training), "held_out": len(data.validation), "left_out": len(data.problems)}
        return {
            **self.history.to_dict(),
            "recipe": self.recipe.to_dict(),
            "mllm": self.models.mllm.info.name,
            "family": self.module.backbone.family.name,
            "data": {"fingerprint": data.fingerprint, "content": data.content, **counts},
        }

    def _problems(self) -> tuple[str, ...]:
        """A line for everything that was left out, also while the run drew its examples."""
        held_out = self.held_out.problems if self.held_out is not None else ()
        return (*self._invalid, *self.data.problems, *self.batches.problems, *held_out)

    def _say_of_data(self, text: str) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if text:
            self._say(text)

    def _say(self, text: str) -> None:
        """Each message once in a process's part of a run."""
        if self.main and text not in self._said:
            self._said.add(text)
            self.callback(Progress(self.history, self.recipe.steps, text=text))

    def _show(self, picture: Image.Image, path: Path, text: str = "") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:  # a sheet that is there is not drawn again
            picture.save(temporary, Image.registered_extensions()[path.suffix])
        self.callback(Progress(self.history, self.recipe.steps, text=text, picture=picture))
