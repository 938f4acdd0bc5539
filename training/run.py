"""The training loop: the same one for the node and for the script."""

from __future__ import annotations

import csv
import math
import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from PIL import Image
from torch import nn

from ..dla.aggregator import DualLayerAggregator
from ..dla.checkpoint import load_dla
from ..loaders.dla import compute_dtype
from ..loaders.reference_latents import reference_method
from . import checkpoints as state
from .data.batches import STRATA, Batches
from .data.dataset import Collection, read_data
from .data.feature_cache import FeatureSource
from .data.latent_cache import LatentCache
from .dit.frozen import FrozenDiT
from .dit.lora import LoRA
from .dit.memory import estimate
from .export import check_free, export, places
from .flow import FlowTimes
from .optimizer import make_optimizer, rate
from .parts import Parts
from .recipe import Recipe, RecipeError
from .reporting.losses import Loss, table, write_table
from .reporting.plots import loss_curve, validation_plot
from .reporting.progress import Progress, Result
from .samples import sample_sheet
from .step import TrainingStep
from .validation import evaluate


class Run:
    """A run in its folder; `train` goes on from where the folder's newest checkpoint stands."""

    def __init__(
        self,
        recipe: Recipe,
        parts: Parts,
        folder: Path,
        places: tuple[Path, Path],
        listen: Callable[[Progress], None] = lambda _: None,
        accelerator=None,
        cache: Path | None = None,
    ):
        """folder: of checkpoints, losses and pictures. places: of the finished DLA and LoRA. listen: is told of each
        step and may raise to stop the run. accelerator: Hugging Face's, where there are several processes. cache: of
        latents and features, in `folder` if None. Raises ValueError for what cannot be trained, before anything is
        loaded."""
        self.recipe, self.parts, self.folder, self.places, self.listen = recipe, parts, folder, places, listen
        self.accelerator = accelerator
        self.process = accelerator.process_index if accelerator else 0
        self.processes = accelerator.num_processes if accelerator else 1
        self.main = self.process == 0
        options = recipe.training
        self.backbone = FrozenDiT(parts.model, options.checkpointing)
        self.method = reference_method(parts.model, "auto")
        source = recipe.data.validation_source
        self.data: Collection = read_data(
            Path(recipe.data.source),
            validation=Path(source) if source else recipe.data.validation,
            seed=options.seed,
            max_references=recipe.data.max_references,
            pairs_per_target=recipe.data.pairs_per_target,
        )
        most = max(len(example.references) for example in (*self.data.training, *self.data.validation))
        family = self.backbone.family
        if family.most_references is not None and most > family.most_references:
            raise RecipeError(
                f"An example has {most} references, {family.title} takes at most {family.most_references}. Set "
                f"data.max_references = {family.most_references}, which leaves such examples out."
            )
        self.dla = self._new_dla()
        self.lora = None
        if recipe.lora.rank:
            self.lora = LoRA(self.backbone.dit, family, recipe.lora.rank, recipe.lora.alpha or None, options.seed)
            if parts.start_lora is not None:
                self.lora.load(parts.start_lora)
            self.backbone.lora = self.lora
        self.module = TrainingStep(self.dla, self.lora, self.backbone, self.method, recipe).to(self.backbone.device)
        self.wrapped: nn.Module = accelerator.prepare_model(self.module) if self.processes > 1 else self.module
        self.optimizer = make_optimizer(recipe, self.dla, self.lora)
        cache = cache or folder / "cache"
        latents = LatentCache(parts.vae, cache / "latents")
        features = FeatureSource(
            parts.mllm,
            layers=self.dla.config.required_layers,
            clip=parts.clip,
            folder=cache / "features" if recipe.data.cache_features else None,
            image_size=recipe.data.mllm_image_size,
            images=recipe.data.mllm_images,
            keep=2 * max(recipe.data.encode_ahead, options.batch_size),
        )
        times = FlowTimes(options.times, options.shift or self.backbone.shift)
        make = (recipe, latents, features, times, self.method)
        self.batches = Batches(self.data.training, *make)
        self.held_out = Batches(self.data.validation, *make) if self.data.validation else None
        self.identity = uuid.uuid4().hex
        self.step = 0
        self.losses: list[float] = []
        self.validation: dict[int, list[Loss]] = {}
        self._prepared = -1
        self._whole = True  # no step is half applied

    def _new_dla(self) -> DualLayerAggregator:
        if self.parts.start_dla is not None:
            dla = load_dla(self.parts.start_dla, dtype=torch.float32)
            dla.config.check_mllm(self.parts.mllm.info)
            if dla.config.context_width != self.backbone.context_width:
                raise ValueError(
                    f"DLA '{self.parts.start_dla.name}' makes tokens {dla.config.context_width} wide, this diffusion "
                    f"model reads {self.backbone.context_width}. Start from another DLA, or from none."
                )
        else:
            config = self.recipe.dla_config(
                self.parts.mllm.info, self.backbone.context_width, self.backbone.family.name
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.recipe.training.seed)
                dla = DualLayerAggregator(config)
        dla.compute_dtype = compute_dtype(self.backbone.device, torch.float32)
        return dla.train().requires_grad_(True)

    # the run --------------------------------------------------------------------------------------------------------

    def train(self) -> Result:
        """Runs until `recipe.steps`. On any exception, an interrupt too, the last whole step is saved first."""
        self._resume()
        check_free(self)
        if self.lora is not None:
            self.lora.attach()
        try:
            self._announce()
            self._look()
            while self.step < self.recipe.steps:
                self._step()
                self._look()
            if self.main and not places(self)[0].exists():  # a finished run whose file was taken away
                export(self)
        finally:
            if self.lora is not None:
                self.lora.detach()
            if self.main and self._whole and self.step:
                self._save()
        return self._result()

    def _resume(self) -> None:
        found = state.checkpoints(self.folder)
        if not found:
            return
        facts = state.read_facts(found[-1])
        self._compare(facts)
        self.identity = facts["identity"]
        self.step = state.restore(found[-1], self.dla, self.lora, self.optimizer)
        self.losses = facts["losses"]
        self.validation = {int(k): [Loss(**row) for row in rows] for k, rows in facts["validation"].items()}
        self._say(f"Going on from step {self.step} ({found[-1].name})")

    def _compare(self, facts: dict) -> None:
        """Raises RecipeError where the checkpoint is of another run."""
        state.check_same_run(facts, self.recipe)
        now = self._facts()
        for name in ("mllm", "family"):
            if facts[name] != now[name]:
                raise RecipeError(
                    f"Run '{self.recipe.run.name}' was begun with {name} {facts[name]!r}, now it is {now[name]!r}. Load "
                    "that one to go on, or choose another run.name to begin a new one."
                )
        for name in ("start_dla", "start_lora"):
            before, new = facts["recipe"]["run"][name], now["recipe"]["run"][name]
            if before != new:
                self._say(
                    f"{name} is {new or 'none'} now, this run began from {before or 'none'}: it goes on from there."
                )
        if facts["data"]["fingerprint"] != now["data"]["fingerprint"]:
            self._say("The data have changed since this run began: it goes on, but not as it would have without.")

    def _announce(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        data, features = self.data, self.batches.features
        self._say(
            f"{len(data.training)} examples to train on, {len(data.validation)} held out, {len(data.problems)} left out; "
            f"{sum(p.numel() for p in self.module.parameters()):,} parameters learn"
        )
        for problem in data.problems:
            self._say(f"left out: {problem}")
        if self.recipe.data.cache_features and self.main:
            wanted = {(e.prompt, e.references) for e in (*data.training, *data.validation)}
            self._say(
                f"The MLLM's features will take {features.size(sorted(wanted)) / 2**30:.2f} GB in {features.folder}"
            )

    def _step(self) -> None:
        options = self.recipe.training
        started, total = time.perf_counter(), 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(options.accumulate):
            # counted so that n processes are one that accumulates n times as many passes
            position = (self.step * options.accumulate + part) * self.processes + self.process
            if position >= self._prepared:
                ahead = max(1, self.recipe.data.encode_ahead // options.batch_size) * self.processes
                self.batches.prepare(range(position, position + ahead, self.processes))
                self._prepared = position + ahead
                self.backbone.load(self._memory_required())
            batch = self.batches.at(position)
            last = part == options.accumulate - 1
            with nullcontext() if self.processes == 1 or last else self.accelerator.no_sync(self.wrapped):
                with self.backbone.gradients():
                    loss = self.wrapped(batch).mean() / options.accumulate
                    if self.processes > 1:
                        loss = loss + self.module.untouched().to(loss.device)
                        self.accelerator.backward(loss)
                    else:
                        loss.backward()
            total += float(loss.detach())
            comfy.model_management.throw_exception_if_processing_interrupted()
        if self.processes > 1:
            total = float(self.accelerator.reduce(torch.tensor(total, device=self.backbone.device), "mean"))
        self._expect_finite("loss", total)
        parameters = list(self.module.parameters())
        for parameter in parameters:  # none reached it in this step: a gradient of zero, whichever way it was run
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.clip_grad_norm_(parameters, options.clip_norm or math.inf)
        self._expect_finite("gradients' norm", float(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate(self.recipe, self.step)
        self._whole = False
        self.optimizer.step()
        self.step += 1
        self.losses.append(total)
        self._whole = True
        self.listen(Progress(self.step, self.recipe.steps, total, f"{time.perf_counter() - started:.2f} s/step"))

    def _expect_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise RuntimeError(
                f"The {what} is {value} at step {self.step + 1}. The last good checkpoint stays; lower the learning rate "
                f"(now {self.recipe.training.learning_rate:g}), or load MLLM and diffusion model in bf16 instead of fp16."
            )

    # now and then ---------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Validation, sample pictures and checkpoint, where this step has them."""
        options, end = self.recipe.run, self.step == self.recipe.steps

        def due(every: int) -> bool:
            return bool(every) and (self.step % every == 0 or end)

        if self.main and self.held_out is not None and due(options.validate_every) and self.step not in self.validation:
            self.validation[self.step] = evaluate(self.module, self.held_out, options.validation_examples)
            if self.step == min(self.validation):
                (self.folder / "validation.csv").unlink(missing_ok=True)
            write_table(self.folder / "validation.csv", self.step, self.validation[self.step])
            self._show(validation_plot(self.validation), "validation.png", table(self.validation[self.step]))
            self._prepared = -1
        if self.main and due(options.sample_every) and not self._sheet().exists():
            self._show(sample_sheet(self), self._sheet().relative_to(self.folder), "")
            self._prepared = -1
        if self.main and self.losses and (due(options.save_every) or due(options.validate_every)):
            self._show(self.curve(), "loss.png", "")
        if self.main and self.step and due(options.save_every):
            self._save()
        if self.processes > 1:
            self.accelerator.wait_for_everyone()

    def _sheet(self) -> Path:
        return self.folder / "samples" / f"step-{self.step:08d}.jpg"

    def _show(self, picture: Image.Image, name: str | Path, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        self.listen(Progress(self.step, self.recipe.steps, text=text, picture=picture))

    def curve(self) -> Image.Image:
        steps = range(1, len(self.losses) + 1)
        return loss_curve(steps, self.losses, list(self.held_out_losses().items()), self.recipe.run.name)

    def held_out_losses(self) -> dict[int, float]:
        return {step: self.held_out_loss(rows) for step, rows in sorted(self.validation.items())}

    def held_out_loss(self, rows: list[Loss]) -> float:
        """Mean over `rows`, each weighed as often as training meets its condition and its flow times."""
        t = self.batches.times(torch.linspace(0, 1, 10_001))
        often = [float(((t >= low) & (t < high)).float().mean()) for low, high in STRATA]
        stages = list(dict.fromkeys(row.stage for row in rows))
        shares = self.recipe.shares
        return sum(shares.get(row.condition, 0.0) * often[stages.index(row.stage)] * row.mean for row in rows)

    def _save(self) -> None:
        state.save(self.folder, self.step, self.dla, self.lora, self.optimizer, self._facts(), self.recipe.run.keep)
        with open(self.folder / "loss.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("step", "loss"), *enumerate(self.losses, 1)])
        export(self)

    def _result(self) -> Result:
        found = (self.validation, self.held_out_losses(), self.data.problems, self.curve())
        return Result(*places(self), self.step, self.losses, *found)

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint says of the run."""
        return {
            "identity": self.identity,
            "recipe": self.recipe.to_dict(),
            "mllm": self.parts.mllm.info.name,
            "family": self.backbone.family.name,
            "data": {
                "fingerprint": self.data.fingerprint,
                "training": len(self.data.training),
                "held_out": len(self.data.validation),
                "left_out": len(self.data.problems),
            },
            "losses": self.losses,
            "validation": {step: [vars(row) for row in rows] for step, rows in self.validation.items()},
        }

    def _memory_required(self) -> int:
        """Bytes to leave free beside the DiT's weights: computed for the largest pictures."""
        if comfy.model_management.is_device_cpu(self.backbone.device):
            return 0
        sizes = max(self.batches.sizes, key=lambda sizes: sum(w * h for w, h in sizes))
        (width, height), *references = sizes
        found = estimate(
            self.backbone.family,
            sizes=self.backbone.family.training.measure(self.backbone.dit),
            resolution=(width, height),
            references=len(references),
            reference_side=max((round((w * h) ** 0.5) for w, h in references), default=512),
            mllm=(self.parts.mllm.info.layers, self.parts.mllm.info.width),
            dla_parameters=sum(p.numel() for p in self.dla.parameters()),
            lora_rank=self.recipe.lora.rank,
            optimizer="adamw" if self.recipe.training.optimizer == "adamw" else "adamw8bit",
            batch_size=self.recipe.training.batch_size,
            checkpointing=self.recipe.training.checkpointing,
        )
        # what is trained is on the device from the first step on, its moments after it
        return found.passing + (found.trained if not self.optimizer.state else 0)

    def _say(self, text: str) -> None:
        if self.main:
            self.listen(Progress(self.step, self.recipe.steps, text=text))


def train(
    recipe: Recipe,
    parts: Parts,
    folder: Path,
    places: tuple[Path, Path],
    listen: Callable[[Progress], None] = lambda _: None,
    accelerator=None,
    cache: Path | None = None,
) -> Result:
    """A run from its settings to its finished files, or from where its folder stands; see Run."""
    # Hosts run nodes under inference mode, where nothing can be trained.
    with torch.inference_mode(False), torch.enable_grad():
        return Run(recipe, parts, folder, places, listen, accelerator, cache).train()
