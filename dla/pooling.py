"""Layerwise attention pooling: attention over the layer axis of one token, then one vector per token.

Both readings of the paper (see LayerwiseAttentionPooling), and the first with the linear maps behind its softmax moved
behind the weighted sum (see HeadScoredPooling). Residual stream, norms and the weighted sum are fp32, since MLLMs have
channels of 1e4 and more; only the linear maps, whose inputs are normalised, run in the compute dtype. `placement` is
the device and dtype of new weights.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

MLP_RATIO = 4  # our choice, as in every common transformer
NORM_EPSILON = 1e-6
HEAD_SCORED_CHUNK_BYTES = 165 * 2**20  # at most: with the result a quarter of InternVL3-8B's states of 3,500 tokens


class TorchOperations:
    """Default layers: weights are cast to the input's dtype at use, as ComfyUI's manual_cast does."""

    class Linear(nn.Linear):  # noqa: D106
        def forward(self, x: Tensor) -> Tensor:  # noqa: D102
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.to(x.dtype), bias)

    class HeadLinear(nn.Linear):  # noqa: D106
        def forward(self, read: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]  # noqa: D102
            return head_linear(read, x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    class HeadLogits(nn.Linear):  # noqa: D106
        heads: int

        def forward(self, x: Tensor) -> Tensor:  # noqa: D102
            return head_logits(x, self.weight.to(x.dtype), self.bias.to(x.dtype), self.heads)


def head_linear(read: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Each head's rows of a linear map on its own sum of states: (N, H, M), (M, N, C), (H D, C), (H D,) -> (N, H D).

    As many heads at a time as there are layers, so that their sums are no larger than the states.
    """
    weight = rearrange(weight, "(h d) c -> h c d", h=read.shape[1])
    bias = rearrange(bias, "(h d) -> h 1 d", h=read.shape[1])
    parts = [
        torch.baddbmm(b, (sums @ x.transpose(0, 1)).transpose(0, 1), w)
        for sums, w, b in zip(read.split(len(x), dim=1), weight.split(len(x)), bias.split(len(x)))
    ]
    return rearrange(parts[0] if len(parts) == 1 else torch.cat(parts), "h n d -> n (h d)")


def head_logits(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Attention logits (N, H, M, M) of states (M, N, C), from each head's queries, then its keys: (H 2 D, C), (H 2 D,).

    Half of the heads after the other, so that there are never queries and keys of all.
    """
    layers, tokens, width = x.shape
    size = width // heads
    rows, parts = 2 * size * -(-heads // 2), []
    for part in zip(weight.split(rows), bias.split(rows)):
        q, k = F.linear(x, *part).view(layers, -1, 2, size).unbind(2)
        logits = torch.baddbmm(q.new_empty(1, 1, 1), q.transpose(0, 1), k.permute(1, 2, 0), beta=0, alpha=size**-0.5)
        parts.append(logits.view(tokens, -1, layers, layers))
        del q, k
    return torch.cat(parts, dim=1)


def rms_norm(x: Tensor) -> Tensor:
    """Root mean square norm over channels, in fp32, without a scale, which the next linear map would absorb."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + NORM_EPSILON)


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

    def forward(
        self, x: Tensor, dtype: torch.dtype, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Maps (N, S, C) fp32 to the same; `dtype` is that of the linear maps, `mask` (N, 1, 1, S) bool.

        With `weights` (N, S) fp32, to the weighted sum (N, C) of that. The MLP's second linear map then follows the sum
        of its hidden channels, which is the same, and runs once instead of S times.
        """
        x = x + self.attention(rms_norm(x).to(dtype), mask)
        hidden = None if self.up is None else F.gelu(self.up(rms_norm(x).to(dtype)))
        if weights is None:
            return x if hidden is None else x + self.down(hidden)
        pooled = weighted_sum(weights, x)
        if hidden is None:
            return pooled
        total = weights.sum(dim=1, keepdim=True)
        bias = self.down(torch.zeros_like(hidden[:1, 0])).float()
        return pooled + self.down(weighted_sum(weights, hidden).to(dtype)) + (total - 1) * bias

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
        gate 0 in a new module, so that it is the last layer and yet learns; gate 1 is the paper's. The norm reads what
        the attention gave, so no linear map can follow the sum: HeadScoredPooling's form is cheaper.
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

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Pools layer states (N, M, C), lowest layer first, to (N, C) fp32; `dtype` of the linear maps, None = x's."""
        dtype = dtype or x.dtype
        if self.layers is None:
            x = self._attend(x, dtype)
            return weighted_sum(self._softmax(x, dtype), x)
        weights = self.layer_weights(x, dtype)
        x = _float(x)
        for block in self.blocks[:-1]:
            x = block(x, dtype)
        return self.blocks[-1](x, dtype, weights=weights)

    def layer_weights(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Weights (N, M) fp32 of the sum at the end, of layer states (N, M, C)."""
        if self.layers is None:
            return self._softmax(self._attend(x, dtype), dtype)
        eye = torch.eye(x.shape[1], device=x.device, dtype=dtype)
        return self.layers(eye).float().squeeze(1).expand(x.shape[:2])

    def _attend(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = _float(x)
        for block in self.blocks:
            x = block(x, dtype)
        return x

    def _softmax(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return gated(self.gate, self.score(rms_norm(x).to(dtype)).float().squeeze(-1), dtype)

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


class HeadScoredPooling(nn.Module):
    """Softmax pooling (see LayerwiseAttentionPooling) whose value and output maps run once a token, not once a layer.

    There the norm in front of the score reads what the attention gave, so every layer needs its output. Here a layer's
    score is a linear map of its state before the attention and of the attention's heads, as in the paper's own form,
    which has no norm there. Everything behind the attention's softmax is then linear in the states, and commutes with
    the sums over the layers: a head reads one number of each layer for the score, and one weighted sum of the states
    for the value map. Of the attention's four maps of C x C, only queries and keys are left at every layer.

    The score's vectors are parameters of their own; in the paper's form, head h's is the product of its value map, its
    output map and Linear(C -> 1).

    Source: the paper's pooling; residual, norm before the attention, gate and the score's own vectors are our choice.
    """

    def __init__(
        self, width: int, layers: int, *, heads: int, blocks: int, operations: Any = TorchOperations, **placement: Any
    ):
        super().__init__()
        self.heads = heads
        self.blocks: Any = nn.ModuleList(
            TransformerBlock(width, heads, mlp=False, operations=operations, **placement) for _ in range(blocks - 1)
        )
        self.qk = operations.HeadLogits(width, 2 * width, bias=True, **placement)
        self.qk.heads = heads
        self.value = operations.HeadLinear(width, width, bias=True, **placement)
        self.out = operations.Linear(width, width, bias=True, **placement)
        self.score = operations.Linear(width, 1 + heads, bias=False, **placement)  # of the state, of each head
        self.gate = operations.Linear(1, 1, bias=False, **placement)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Pools layer states (N, M, C), lowest layer first, to (N, C) fp32; `dtype` of the linear maps, None = x's."""
        x, normed = self._normed(x, dtype or x.dtype)
        weights, attention = self._weigh(normed)
        read = (weights[:, None, :, None] * attention).sum(dim=2).to(normed.dtype)  # (N, H, M)
        del attention
        value = self.value(read, normed)
        del normed
        return weighted_sum(weights, x) + self.out(value)

    def layer_weights(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Weights (N, M) fp32 of the sum at the end, of layer states (N, M, C)."""
        return self._weigh(self._normed(x, dtype)[1])[0]

    def _normed(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """States (N, M, C) before the last attention, and the same with the layers first and the norm applied."""
        for block in self.blocks:
            x = block(_float(x), dtype)
        # with the layers first, tokens and heads are one dimension of the products below, which then copy nothing
        return x, F.rms_norm(x.transpose(0, 1).contiguous(), x.shape[-1:], eps=NORM_EPSILON).to(dtype)

    def _weigh(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (N, M) and attention (N, H, M, M), both fp32."""
        attention = self.qk(normed).softmax(dim=-1, dtype=torch.float32)
        scores = self.score(normed)  # (M, N, 1 + H)
        read = (attention * scores[..., 1:].permute(1, 2, 0)[:, :, None]).sum(dim=(1, 3))
        return gated(self.gate, read + scores[..., 0].T, normed.dtype), attention

    def start_as_last_layer(self) -> None:
        """Make the module exactly the last of its layers, with live gradients."""
        for block in self.blocks:
            block.start_as_identity()
        for layer in (self.out, self.score, self.gate):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.out.bias)


def _float(x: Tensor) -> Tensor:
    return x.float().contiguous()


def gated(gate: nn.Module, scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights (N, M) fp32 of scores (N, M): the last layer's 1 at gate 0, their softmax at gate 1."""
    share = gate(torch.ones(1, 1, device=scores.device, dtype=dtype)).float()
    weights = share * scores.softmax(dim=-1)
    weights[:, -1:] += 1 - share
    return weights


def weighted_sum(weights: Tensor, x: Tensor) -> Tensor:
    """Sum over the layers, (N, M) and (N, M, C) -> (N, C) fp32."""
    # no matmul, which would be rounded to TF32 or, under autocast, to bf16
    if x.device.type != "cpu":  # few kernels
        return (weights[..., None] * x).sum(dim=1)
    pooled = weights[:, :1] * x[:, 0]
    for layer in range(1, x.shape[1]):  # keeps the peak low
        pooled = torch.addcmul(pooled, weights[:, layer : layer + 1], x[:, layer])
    return pooled


def token_bytes(layers: int, width: int, heads: int, itemsize: int, head_scored: bool) -> int:
    """Bytes of the intermediate results of pooling one token; `itemsize` of the linear maps' dtype, in bytes."""
    if head_scored:  # states, the same normed, logits; then half of queries and keys, attention, or heads' sums
        states, scores = layers * width * itemsize, heads * layers * layers
        return 2 * states + max(states, 8 * scores) + scores * itemsize
    # fp32: residual and norm; compute dtype: qkv, MLP
    return layers * width * (4 * 4 + 10 * itemsize) + heads * layers * layers * (4 + itemsize)


def chunk_length(
    layers: int, width: int, heads: int, dtype: torch.dtype, max_bytes: int, head_scored: bool = False
) -> int:
    """How many tokens to pool at a time so that intermediate results stay within `max_bytes` (at least one)."""
    if head_scored:
        max_bytes = min(max_bytes, HEAD_SCORED_CHUNK_BYTES)
    # CUDA's attention kernels take at most 65535 (token, head) pairs
    return max(1, min(max_bytes // token_bytes(layers, width, heads, dtype.itemsize, head_scored), 65535 // heads))
