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
        backbone, options = self.backbone, self.training_options
        device, features, pooled = backbone.device, batch.features, batch.pooled
        guidance = options.guidance if backbone.family.takes_guidance else None
        with torch.autocast(device.type, torch.bfloat16, enabled=options.mixed_precision == "bf16"):
            t, clean, noise = batch.t.to(device), backbone.latent(batch.clean), batch.noise.to(device)
            context = None if features is None else aggregate(features, self.dla, device=device)
            more = dict(method=self.method, pooled=None if pooled is None else pooled.to(device), guidance=guidance)
            velocity = backbone.velocity(noisy(clean, noise, t), t, context, list(batch.references), **more)
            return losses(velocity, clean, noise) * weight(t, options.weighting)

    def untouched(self) -> Tensor:
        """Returns zero as a function of every parameter: data parallelism waits for a gradient of each."""
        return sum((parameter.sum() * 0.0 for parameter in self.parameters()), torch.zeros(()))
