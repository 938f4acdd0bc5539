"""One pass: DLA, DiT, loss."""

import torch
from torch import Tensor, nn

from ..dla.aggregator import DualLayerAggregator
from ..dla.context import aggregate
from .data.batches import Batch
from .dit.frozen import FrozenDiT
from .dit.lora import LoRA
from .flow import losses, noisy, weight
from .recipe import Recipe


class TrainingStep(nn.Module):
    """DLA and LoRA, whose parameters are trained, and the loss through the frozen DiT; data parallelism wraps it."""

    def __init__(
        self, dla: DualLayerAggregator, lora: LoRA | None, backbone: FrozenDiT, method: str | None, recipe: Recipe
    ):
        super().__init__()
        self.dla, self.lora = dla, lora
        self._frozen = (backbone,)  # in a tuple: not a submodule
        self.method, self.training_options = method, recipe.training

    @property
    def backbone(self) -> FrozenDiT:
        """The frozen DiT."""
        return self._frozen[0]

    def forward(self, batch: Batch) -> Tensor:
        """Returns the weighted flow-matching losses (b,), fp32."""
        mixed = self.training_options.mixed_precision == "bf16"
        with torch.autocast(self.backbone.device.type, torch.bfloat16, enabled=mixed):
            return self._losses(batch)

    def _losses(self, batch: Batch) -> Tensor:
        backbone, options = self.backbone, self.training_options
        t = batch.t.to(backbone.device)
        clean, noise = backbone.latent(batch.clean), batch.noise.to(backbone.device)
        context = None
        if batch.features is not None:
            context = aggregate(batch.features, self.dla, device=backbone.device)
        velocity = backbone.velocity(
            noisy(clean, noise, t),
            t,
            context,
            list(batch.references),
            method=self.method,
            pooled=None if batch.pooled is None else batch.pooled.to(backbone.device),
            guidance=options.guidance if backbone.family.takes_guidance else None,
        )
        return losses(velocity, clean, noise) * weight(t, options.weighting)

    def untouched(self) -> Tensor:
        """Returns zero as a function of every parameter: data parallelism waits for a gradient of each."""
        return sum((parameter.sum() * 0.0 for parameter in self.parameters()), torch.zeros(()))
