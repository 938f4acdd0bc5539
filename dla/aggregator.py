"""Dual Layer Aggregator: hidden states of all layers in, one context embedding per token out."""

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import DLAConfig
from .features import Features, Modality
from .pooling import HeadScoredPooling, LayerwiseAttentionPooling, TorchOperations, TransformerBlock, chunk_length

MAX_CHUNK_BYTES = 256 * 2**20


class DualLayerAggregator(nn.Module):
    """Pools the layers of every token, text and image tokens apart, and maps the result to the DiT's context width.

    Template tokens count as text. A new one (not loaded) is exactly the last layer: bit for bit where the widths are
    equal, else zero padded or cut. Its layers come from `operations`: None = TorchOperations, or classes in their
    place, such as ComfyUI's, whose weights are to be loaded; `placement` is the device and dtype of their weights.

    Source: the paper's Dual Layer Aggregator; starting as the last layer is our choice.
    """

    compute_dtype: torch.dtype | None = None  # of the linear maps; None = that of the weights

    def __init__(self, config: DLAConfig, *, operations: Any = None, **placement: Any):
        super().__init__()
        self.config = config
        width, make = config.mllm.width, operations or TorchOperations
        settings = dict(operations=make, **placement)
        names = {"dual": ("text", "image"), "shared": ("shared",), "last": ()}[config.modalities]
        sizes: dict[str, Any] = dict(
            width=width, layers=len(config.pooled_layers), heads=config.heads, blocks=config.blocks
        )

        def pooling() -> nn.Module:
            if config.scores == "heads":
                return HeadScoredPooling(**sizes, **settings)
            return LayerwiseAttentionPooling(**sizes, pooling=config.pooling, **settings)

        self.pooling: Any = nn.ModuleDict({name: pooling() for name in names})
        self.refiner: Any = nn.ModuleList(
            TransformerBlock(width, config.heads, mlp=True, **settings) for _ in range(config.refiner_blocks)
        )
        self.project: Any = None
        if config.context_width != width:
            self.project = make.Linear(width, config.context_width, bias=False, **placement)
        if operations in (None, TorchOperations):
            self.start_as_last_layer()

    def start_as_last_layer(self) -> None:
        """Make the module exactly the last pooled layer."""
        for pooling in self.pooling.values():
            pooling.start_as_last_layer()
        for block in self.refiner:
            block.start_as_identity()
        if self.project is not None:
            nn.init.eye_(self.project.weight)

    def forward(
        self,
        features: Features,
        keep: Tensor | None = None,
        *,
        vit_blend: float = 0.0,
        device: torch.device | None = None,
        max_chunk_bytes: int = MAX_CHUNK_BYTES,
    ) -> Tensor:
        """Context tokens (B, T, context width) in the features' dtype, zeros at tokens not kept.

        Args:
            features: Of B prompts.
            keep: (B, T) bool, tokens to work on; None = all but padding.
            vit_blend: Share of layer 0 at image tokens; 0 = the config's.
            device: Where to compute, chunk by chunk, and where the result stays; None = where the weights are.
            max_chunk_bytes: Bound on the intermediate results of the pooling; the result does not depend on it. With
                gradients and more than one chunk, each chunk is computed again in the backward pass to keep to it.

        Raises:
            ValueError: If the features are another MLLM's or lack a layer.
        """
        keep = features.attention_mask if keep is None else keep
        device = self._device(features, device)
        hidden, dtype = features.hidden_states, self._dtype(features)
        batch, _, tokens, width = hidden.shape
        vit_blend = vit_blend or self.config.vit_blend

        # what reads the results casts them to this; not normalised, hence not to fp16, whose largest number is 65504
        read_as = hidden.dtype if self.project is None else dtype
        read_as = torch.float32 if read_as == torch.float16 else read_as
        fp32 = bool(vit_blend) or len(self.refiner) > 0
        x = torch.zeros(batch * tokens, width, device=device, dtype=torch.float32 if fp32 else read_as)
        for pooling, index, states in self._chunks(features, keep, device, max_chunk_bytes):
            if pooling is None:
                result = states[:, -1].float()
            elif torch.is_grad_enabled() and states.shape[0] < int(keep.sum()):
                result = checkpoint(pooling, states, dtype, use_reentrant=False)
            else:
                result = pooling(states, dtype)
            x.index_copy_(0, index, result.to(x.dtype))
        x = rearrange(x, "(b t) c -> b t c", b=batch)

        if vit_blend:
            image = (keep & (features.modality == Modality.IMAGE)).to(device)[..., None]
            x = torch.where(image, torch.lerp(x, features.layer(0).to(x), vit_blend), x)
        keep = keep.to(device)
        for block in self.refiner:
            x = block(x, dtype, None if bool(keep.all()) else keep[:, None, None, :])
        if self.project is not None:
            x = self.project(x.to(read_as))
        if hidden.dtype == torch.float16:
            x = x.float().clamp(-65504, 65504)
        return x.to(hidden.dtype).masked_fill(~keep[..., None], 0)

    @torch.no_grad()
    def layer_weights(
        self,
        features: Features,
        keep: Tensor | None = None,
        *,
        device: torch.device | None = None,
        max_chunk_bytes: int = MAX_CHUNK_BYTES,
    ) -> Tensor:
        """Weight of each pooled layer in each token, (B, T, pooled layers) fp32, zeros at tokens not kept.

        They are those of the sum at the end, over layers that the attention before it has mixed already; they sum to 1
        for softmax pooling, to anything for linear pooling. Arguments and errors: see forward.
        """
        keep = features.attention_mask if keep is None else keep
        device = self._device(features, device)
        batch, _, tokens, _ = features.hidden_states.shape
        weights = torch.zeros(batch * tokens, len(self.config.pooled_layers), device=device)
        for pooling, index, states in self._chunks(features, keep, device, max_chunk_bytes):
            weights[index] = 1.0 if pooling is None else pooling.layer_weights(states, self._dtype(features))
        return rearrange(weights, "(b t) m -> b t m", b=batch)

    def _chunks(
        self, features: Features, keep: Tensor, device: torch.device, max_bytes: int
    ) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Yields pooling (None = last layer), positions (n,) in flat (B T), layer states (n, M, C) on `device`."""
        self.config.check_mllm(features.info)
        layers = self.config.pooled_layers
        for layer in layers:
            features.layer(layer)  # raises if missing
        hidden, tokens = features.hidden_states, features.hidden_states.shape[2]
        entries = torch.tensor([features.layers.index(layer) * tokens for layer in layers], device=hidden.device)
        first = torch.arange(hidden.shape[0] * tokens, device=hidden.device).view(-1, tokens)
        first = (first + first[:, :1] * (hidden.shape[1] - 1)).flatten()  # each token's row of the first entry
        rows = hidden.flatten(0, 2)  # every layer of every token, a view of a contiguous tensor
        image = features.modality == Modality.IMAGE
        groups = {"text": keep & ~image, "image": keep & image, "shared": keep}
        sizes = len(layers), hidden.shape[3], self.config.heads, self._dtype(features)
        step = chunk_length(*sizes, max_bytes, self.config.scores == "heads")
        for name, pooling in self.pooling.items() or [("shared", None)]:
            for index in groups[name].flatten().nonzero().squeeze(1).to(hidden.device).split(step):
                if len(index):  # split gives one empty part for an empty group
                    states = rows.index_select(0, (entries[:, None] + first[index]).flatten())
                    states = rearrange(
                        states.to(device), "(m n) c -> n m c", m=len(layers)
                    )  # the layers first in memory
                    yield pooling, index.to(device), states

    def _dtype(self, features: Features) -> torch.dtype:
        weight = next(self.parameters(), features.hidden_states)
        return self.compute_dtype or weight.dtype

    def _device(self, features: Features, device: torch.device | None) -> torch.device:
        weight = next(self.parameters(), features.hidden_states)
        return torch.device(device) if device is not None else weight.device
