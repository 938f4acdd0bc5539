"""Features to the context tokens that a DiT reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from .aggregator import MAX_CHUNK_BYTES, DualLayerAggregator
from .config import TEMPLATES
from .features import Features, Grids, Modality, StockContext


@dataclass(frozen=True, eq=False)
class Context:
    """Context tokens for a DiT, compacted: dropped tokens are left out, shorter prompts are padded on the right."""

    tokens: Tensor  # (B, T', context width) floating, zeros at padding, or what a stock context holds there
    attention_mask: Tensor  # (B, T') bool, False = padding
    modality: Tensor  # (B, T') uint8, Modality; TEMPLATE at padding
    image_index: Tensor  # (B, T') int16, 0-based reference image of an image token, -1 for other tokens
    grids: Grids | None = None  # as in Features

    def row(self, index: int) -> Context:
        """One prompt of the batch, without padding."""
        keep = self.attention_mask[index]
        return self._map(lambda value: value[index : index + 1, keep], self.grids and self.grids[index : index + 1])

    def to(self, device: torch.device) -> Context:
        """The same on another device."""
        return self._map(lambda value: value.to(device), self.grids)

    def _map(self, change: Callable[[Tensor], Tensor], grids: Grids | None) -> Context:
        values = change(self.tokens), change(self.attention_mask), change(self.modality), change(self.image_index)
        return Context(*values, grids)


def kept_tokens(features: Features, template: str = "auto") -> Tensor:
    """Which tokens go to the DiT, (B, T) bool.

    A prompt of which nothing is left (an empty negative) keeps its last token, since a DiT cannot do without context.

    Args:
        features: Of B prompts.
        template: "auto" = as the MLLM's stock model: "keep", or, where info.drop_leading_template, without what comes
            before the user's turn (features.prefix, else the leading template tokens but for the marker in front of an
            image); "keep" = all but padding; "drop" = no template token at all (UniFusion). Others raise ValueError.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template is {template!r}, expected one of {', '.join(TEMPLATES)}.")
    mask, is_template = features.attention_mask, features.modality == Modality.TEMPLATE
    if template == "keep" or template == "auto" and not features.info.drop_leading_template:
        return mask
    if template == "drop":
        keep = mask & ~is_template
    else:
        prefix = features.prefix if features.prefix is not None else _leading_template(features)
        positions = torch.arange(mask.shape[1], device=mask.device)
        keep = mask & (positions >= torch.tensor(prefix, device=mask.device)[:, None])
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)
    empty = ~keep.any(dim=1)
    keep[empty, last[empty]] = True
    return keep


def aggregate(
    features: Features,
    dla: DualLayerAggregator | None = None,
    *,
    template: str | None = "auto",
    vit_blend: float | None = 0.0,
    device: torch.device | None = None,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
) -> Context:
    """Context tokens for a DiT, in the features' dtype, on the device that computed them.

    Args:
        features: Of B prompts.
        dla: None = the stock conditioning: the layers that the MLLM's own DiT reads, see StockContext.
        template: See kept_tokens; "auto" or None = the DLA's setting, which may itself be "auto".
        vit_blend: Share of layer 0 (the ViT's features) at image tokens; 0 or None = the DLA's setting.
        device: Where to compute; None = where the DLA is.
        max_chunk_bytes: See DualLayerAggregator.forward.

    Raises:
        ValueError: If DLA and features do not belong together, or if the result is not finite.
    """
    if vit_blend is not None and not 0 <= vit_blend <= 1:
        raise ValueError(f"vit_blend is {vit_blend}, expected a number from 0 to 1.")
    if template in (None, "auto"):
        template = dla.config.template if dla is not None else "auto"
    keep = kept_tokens(features, template)
    if dla is not None:
        tokens = dla(features, keep, vit_blend=vit_blend or 0.0, device=device, max_chunk_bytes=max_chunk_bytes)
    else:
        stock = features.stock or StockContext()
        if stock.padding and template == "auto":
            keep = keep | ~features.attention_mask
        tokens = _stock_tokens(features, stock, keep, vit_blend or 0.0).to(device or features.hidden_states.device)
    if not bool(tokens.isfinite().all()):
        raise ValueError(
            f"The context tokens are not finite. The features of {features.info.name} hold NaN or infinity, as an MLLM "
            "run in fp16 may produce: load it with weight dtype bf16 or fp32."
        )

    length = int(keep.sum(dim=1).max())
    order = (~keep).int().argsort(dim=1, stable=True)[:, :length]  # kept tokens first, in their order

    def compact(value: Tensor, padding: int) -> Tensor:
        value, index = value.to(tokens.device), order.to(tokens.device)
        return value.gather(1, index).masked_fill(~mask, padding)

    mask = (keep & features.attention_mask).gather(1, order).to(tokens.device)
    modality, image_index = compact(features.modality, int(Modality.TEMPLATE)), compact(features.image_index, -1)
    tokens = tokens.gather(1, order.to(tokens.device)[..., None].expand(-1, -1, tokens.shape[2]))
    return Context(tokens, mask, modality, image_index, features.grids)


def _stock_tokens(features: Features, stock: StockContext, keep: Tensor, vit_blend: float) -> Tensor:
    """Tokens (B, T, layers C) as the stock DiT reads them, zeros at tokens not kept."""
    dtype, layers = features.hidden_states.dtype, [features.layer(n) for n in stock.numbers(features.info.layers)]
    if vit_blend:
        image = (keep & (features.modality == Modality.IMAGE)).to(layers[0].device)[..., None]
        seen = features.layer(0).float()
        layers = [torch.where(image, torch.lerp(x.float(), seen, vit_blend).to(dtype), x) for x in layers]
    tokens = rearrange(layers, "m b t c -> b t (c m)" if stock.interleaved else "m b t c -> b t (m c)")
    return tokens.masked_fill(~keep.to(tokens.device)[..., None], 0)


def _leading_template(features: Features) -> list[int]:
    """Per prompt, the position of the first token of the user's turn, worked out from modalities."""
    prefix = []
    for modality, mask in zip(features.modality.tolist(), features.attention_mask.tolist()):
        given = [i for i, kind in enumerate(modality) if mask[i] and kind != Modality.TEMPLATE]
        first = given[0] if given else len(modality)
        if given and modality[first] == Modality.IMAGE and first > 0 and mask[first - 1]:
            first -= 1  # e.g. <|vision_start|>, which belongs to the image
        prefix.append(first)
    return prefix
