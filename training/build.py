"""From a recipe and its models to everything that the training loop uses: data, DLA, LoRA, optimizer, caches."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import torch
from torch.optim import Optimizer

from ..dla.aggregator import DualLayerAggregator
from ..dla.checkpoint import load_dla
from ..loaders.backbones import Backbone
from ..loaders.dla import compute_dtype
from ..loaders.reference_latents import reference_method
from .data.batches import Batches
from .data.dataset import Collection, read_data
from .data.feature_cache import FeatureSource
from .data.latent_cache import LatentCache
from .dit.frozen import FrozenDiT
from .dit.lora import LoRA
from .dit.memory import estimate
from .flow import FlowTimes
from .models import TrainingModels
from .optimizer import make_optimizer
from .recipe import Recipe, RecipeError
from .step import TrainingStep


class Components(NamedTuple):
    """Everything that the training loop uses."""

    data: Collection
    module: TrainingStep  # DLA, LoRA, DiT
    optimizer: Optimizer
    batches: Batches
    held_out: Batches | None


def build(
    recipe: Recipe, models: TrainingModels, cache: Path, say: Callable[[str], None] = lambda _: None
) -> Components:
    """Builds what a run trains with, its latents, features and the data's index in `cache`; loads no model.

    `say` gets lines about the data while they are read, and may raise to interrupt.
    Raises ValueError where the data cannot be trained on, or a file to start from does not fit.
    """
    options = recipe.training
    backbone = FrozenDiT(models.model, options.checkpointing)
    method = reference_method(models.model, "auto")
    data = _read_data(recipe, backbone.family, cache / "data", say)
    dla, lora = _make_dla(recipe, models, backbone), None
    if recipe.lora.rank:
        lora = LoRA(backbone.dit, backbone.family, recipe.lora.rank, recipe.lora.alpha or None, options.seed)
        if models.start_lora is not None:
            lora.load(models.start_lora)
        backbone.lora = lora
    module = TrainingStep(dla, lora, backbone, method, recipe).to(backbone.device)
    features = FeatureSource(
        models.mllm,
        layers=dla.config.required_layers,
        clip=models.clip,
        folder=cache / "features" if recipe.data.cache_features else None,
        image_size=recipe.data.mllm_image_size,
        images=recipe.data.mllm_images,
        keep=2 * max(recipe.data.encode_ahead, options.batch_size),
    )
    times = FlowTimes(options.times, options.shift or backbone.shift)
    latents, grid = LatentCache(models.vae, cache / "latents"), backbone.family.reference_grid
    inputs = (recipe, latents, features, times, method, grid)
    held_out = Batches(data.validation, *inputs) if data.validation else None
    return Components(data, module, make_optimizer(recipe, dla, lora), Batches(data.training, *inputs), held_out)


def required_memory(components: Components, recipe: Recipe, shards: int = 1) -> int:
    """Returns the bytes to leave free beside the DiT's weights for a training step with the largest images.

    Args:
        components: Of the run.
        recipe: Of the run.
        shards: Over how many processes what is trained is spread.
    """
    backbone = components.module.backbone
    if comfy.model_management.is_device_cpu(backbone.device):
        return 0
    (width, height), *references = components.batches.sizes.largest()
    found = estimate(
        backbone.family,
        sizes=backbone.family.training.measure(backbone.dit),
        resolution=(width, height),
        references=len(references),
        reference_side=max((round((w * h) ** 0.5) for w, h in references), default=512),
        dla=components.module.dla.config,
        lora_rank=recipe.lora.rank,
        optimizer="adamw" if recipe.training.optimizer == "adamw" else "adamw8bit",
        batch_size=recipe.training.batch_size,
        accumulate=recipe.training.accumulate,
        checkpointing=recipe.training.checkpointing,
        shards=shards,
    )
    # what is trained is on the device from the first step on, its moments after it
    return found.passing + (found.trained if not components.optimizer.state else 0)


def _read_data(recipe: Recipe, family: Backbone, cache: Path, say: Callable[[str], None]) -> Collection:
    options, source = recipe.data, recipe.data.validation_source
    validation, seed = Path(source) if source else options.validation, recipe.training.seed
    limits = dict(max_references=options.max_references, pairs_per_target=options.pairs_per_target)
    data = read_data(Path(options.source), validation=validation, seed=seed, cache=cache, say=say, **limits)
    most = max(data.training.most_references, data.validation.most_references)
    if family.most_references is not None and most > family.most_references:
        raise RecipeError(
            f"An example has {most} references, {family.title} takes at most {family.most_references}. Set "
            f"data.max_references = {family.most_references}, which leaves such examples out."
        )
    return data


def _make_dla(recipe: Recipe, models: TrainingModels, backbone: FrozenDiT) -> DualLayerAggregator:
    """The DLA to start from, or a new one."""
    if models.start_dla is not None:
        dla = load_dla(models.start_dla, dtype=torch.float32)
        dla.config.check_mllm(models.mllm.info)
        if dla.config.context_width != backbone.context_width:
            raise ValueError(
                f"DLA '{models.start_dla.name}' makes tokens {dla.config.context_width} wide, this diffusion "
                f"model reads {backbone.context_width}. Start from another DLA, or from none."
            )
    else:
        config = recipe.dla_config(models.mllm.info, backbone.context_width, backbone.family.name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.training.seed)
            dla = DualLayerAggregator(config)
    dla.compute_dtype = compute_dtype(backbone.device, torch.float32)
    return dla.train().requires_grad_(True)
