"""Layerwise attention pooling: attention over the layer axis of one token, then one vector per token.

Both readings of the paper (see LayerwiseAttentionPooling). Residual stream, norms and the weighted sum are fp32, since
MLLMs have channels of 1e4 and more; only the linear maps, whose inputs are normalised, run in the compute dtype.
`placement` is the device and dtype of new weights.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

MLP_RATIO = 4  # our choice, as in every common transformer


class TorchOperations:
    """Default layers: weights are cast to the input's dtype at use, as ComfyUI's manual_cast does."""

    class Linear(nn.Linear):  # noqa: D106
        def forward(self, x: Tensor) -> Tensor:  # noqa: D102
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.to(x.dtype), bias)


def rms_norm(x: Tensor) -> Tensor:
    """Root mean square norm over channels, in fp32, without a scale, which the next linear map would absorb."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    """Multi-head self-attention over the middle axis of (N, S, C), bidirectional and without positions."""

    def __init__(self, width: int, heads: int, *, operations: Any = TorchOperations, **placement: Any):
        super().__init__()
        self.heads = heads
        self.qkv = operations.Linear(width, 3 * width, bias=True, **placement)
        self.out = operations.Linear(width, width, bias=True, **placement)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (N, S, C) to the same; `mask` (N, 1, 1, S) bool, False = not attended to."""
        q, k, v = rearrange(self.qkv(x), "n s (three h d) -> three n h s d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(rearrange(x, "n h s d -> n s (h d)"))


class TransformerBlock(nn.Module):
    """Pre-norm attention, and an MLP if asked for, each on a residual branch of its own that starts at zero."""

    def __init__(self, width: int, heads: int, *, mlp: bool, operations: Any = TorchOperations, **placement: Any):
        super().__init__()
        self.attention = Attention(width, heads, operations=operations, **placement)
        self.up: Any = operations.Linear(width, MLP_RATIO * width, bias=True, **placement) if mlp else None
        self.down: Any = operations.Linear(MLP_RATIO * width, width, bias=True, **placement) if mlp else None

    def forward(self, x: Tensor, dtype: torch.dtype, mask: Tensor | None = None) -> Tensor:
        """Maps (N, S, C) fp32 to the same; `dtype` is that of the linear maps, `mask` (N, 1, 1, S) bool."""
        x = x + self.attention(rms_norm(x).to(dtype), mask)
        if self.up is not None:
            x = x + self.down(F.gelu(self.up(rms_norm(x).to(dtype))))
        return x

    def start_as_identity(self) -> None:
        """Make the block exactly its input, with live gradients."""
        for layer in (self.attention.out, self.down):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)


class LayerwiseAttentionPooling(nn.Module):
    """Layerwise attention pooling of one group of tokens: (N, M, C) -> (N, C), every token by itself.

    pooling = "softmax": one multi-head self-attention over the layers, then Linear(C -> 1), softmax over layers,
        weighted sum. The residual, the norm and a gate are ours: weights = (1 - gate) * last + gate * softmax, with
        gate 0 in a new module, so that it is the last layer and yet learns; gate 1 is the paper's.
    pooling = "linear": two pre-norm transformer blocks over the layers, then a linear map over the layers, whose
        weights are the same for every token and may be negative.

    Source: two readings of the paper: softmax as it was transcribed, linear as UniFusion's (arXiv 2510.12789).
    """

    def __init__(
        self,
        width: int,
        layers: int,
        *,
        pooling: str,
        heads: int,
        blocks: int,
        operations: Any = TorchOperations,
        **placement: Any,
    ):
        super().__init__()
        linear = pooling == "linear"
        self.blocks: Any = nn.ModuleList(
            TransformerBlock(width, heads, mlp=linear, operations=operations, **placement) for _ in range(blocks)
        )
        # All that is learned is in Linear layers, so that ComfyUI can store, move and cast it. Their weights are never
        # read directly, since some hosts only materialise them when the layer is called.
        self.layers: Any = operations.Linear(layers, 1, bias=False, **placement) if linear else None
        self.score: Any = None if linear else operations.Linear(width, 1, bias=False, **placement)
        self.gate: Any = None if linear else operations.Linear(1, 1, bias=False, **placement)

    def weigh(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """States after attention (N, M, C) fp32 and their weights (N, M) fp32, of layer states (N, M, C)."""
        x = x.float()
        for block in self.blocks:
            x = block(x, dtype)
        tokens, layers, _ = x.shape
        if self.layers is not None:
            eye = torch.eye(layers, device=x.device, dtype=dtype)
            return x, self.layers(eye).float().squeeze(1).expand(tokens, layers)
        gate = self.gate(torch.ones(1, 1, device=x.device, dtype=dtype)).float()
        weights = gate * self.score(rms_norm(x).to(dtype)).float().squeeze(-1).softmax(dim=-1)
        last = torch.zeros(layers, device=x.device)
        last[-1] = 1
        return x, weights + (1 - gate) * last

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Pools layer states (N, M, C), lowest layer first, to (N, C) fp32; `dtype` of the linear maps, None = x's."""
        x, weights = self.weigh(x, dtype or x.dtype)
        # a loop keeps the peak low; a matmul would be rounded to TF32 or, under autocast, to bf16
        pooled = weights[:, :1] * x[:, 0]
        for layer in range(1, x.shape[1]):
            pooled = torch.addcmul(pooled, weights[:, layer : layer + 1], x[:, layer])
        return pooled

    def start_as_last_layer(self) -> None:
        """Make the module exactly the last of its layers, with live gradients."""
        for block in self.blocks:
            block.start_as_identity()
        if self.layers is not None:
            nn.init.zeros_(self.layers.weight)
            with torch.no_grad():
                self.layers.weight[0, -1] = 1
        else:
            nn.init.zeros_(self.score.weight)
            nn.init.zeros_(self.gate.weight)


def chunk_length(layers: int, width: int, heads: int, dtype: torch.dtype, max_bytes: int) -> int:
    """How many tokens to pool at a time so that intermediate results stay within `max_bytes` (at least one)."""
    states = layers * width * (4 * 4 + 10 * dtype.itemsize)  # fp32: residual and norm; compute dtype: qkv, MLP
    scores = heads * layers * layers * (4 + dtype.itemsize)
    # CUDA's attention kernels take at most 65535 (token, head) pairs
    return max(1, min(max_bytes // (states + scores), 65535 // heads))
