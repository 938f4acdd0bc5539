"""Weights that a DLA's pooling gives to the MLLM's layers, per token, and a description of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dla.ablation import groups
from ..dla.features import ImageGrid, MLLMInfo, Modality

MODALITIES = {Modality.TEXT: "text", Modality.IMAGE: "image", Modality.TEMPLATE: "template"}


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """Weights of one prompt's pooling: T tokens, M pooled layers."""

    weights: Tensor  # (T, M) fp32, rows of tokens that are not kept are zero
    layers: tuple[int, ...]  # layer numbers of the columns
    kept: Tensor  # (T,) bool, tokens that go to the DiT
    modality: Tensor  # (T,) uint8, Modality
    image_index: Tensor  # (T,) int16
    info: MLLMInfo
    grids: tuple[ImageGrid, ...] | None = None  # of each reference image; None = not known

    def of(self, modality: Modality) -> Tensor:
        """Weights (n, M) of the kept tokens of a modality, in their order."""
        return self.weights[self.kept & (self.modality == modality)]

    def mean_layer(self, weights: Tensor) -> Tensor:
        """Centre of gravity (n,) of weights (n, M): layer numbers averaged by the weights' magnitudes."""
        size = weights.abs()
        numbers = torch.tensor(self.layers, dtype=size.dtype, device=size.device)
        return (size * numbers).sum(dim=1) / size.sum(dim=1).clamp(min=1e-12)

    def image(self, index: int) -> Tensor:
        """Weights (n, M) of every token of reference image `index` (0-based). Raises ValueError where none is kept."""
        tokens = self.image_index == index
        if not bool((tokens & self.kept).any()):
            count = int(self.image_index.max()) + 1
            raise ValueError(
                f"Layer Weights: reference image {index + 1} has no token in these features, which hold {count}"
                " reference image(s). Set image_number to one of them, in the order of Encode Subject's inputs."
            )
        return self.weights[tokens]


def describe(found: LayerWeights, name: str = "") -> str:
    """A line per modality: tokens, mean layer, the layers that weigh most, and the shares of the paper's groups."""
    lines = [f"{name or 'DLA'}: pools layers {found.layers[0]}-{found.layers[-1]} ({len(found.layers)})"]
    for kind, title in MODALITIES.items():
        weights = found.of(kind)
        if not len(weights):
            continue
        mean, shares = weights.mean(dim=0), weights.abs()
        shares = (shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-12)).mean(dim=0)
        best = mean.abs().argsort(descending=True, stable=True)[:3].tolist()
        centre = found.mean_layer(weights)
        spread = f" +- {float(centre.std()):.1f} over tokens" if len(weights) > 1 else ""
        top = ", ".join(f"{found.layers[i]} ({float(mean[i]):.3f})" for i in best)
        parts = {}
        for part, numbers in groups(found.info.layers).items():
            at = [i for i, layer in enumerate(found.layers) if min(layer, found.info.layers) in numbers]
            span = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else numbers[0]
            parts[f"{part} ({span})"] = float(shares[at].sum())
        thirds = ", ".join(f"{part} {share:.2f}" for part, share in parts.items())
        lines.append(
            f"{title}, {len(weights)} tokens: mean layer {float(centre.mean()):.2f}{spread}; most weight on {top};"
            f" share of {thirds}"
        )
    return "\n".join(lines)
