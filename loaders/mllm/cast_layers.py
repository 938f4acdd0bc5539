"""transformers' layers replaced by the host's, which cast and move their weights at use."""

from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class ParametersOnMeta(TorchFunctionMode):
    """Like `torch.device("meta")`, but only for what parameters are made of.

    Buffers that a module computes, such as RoPE frequencies, come from `arange` and `zeros` and stay real: no
    checkpoint holds them, so on meta they would be lost. Parameters of zeros are small.
    """

    ALLOCATE = (torch.empty, torch.ones, torch.randn, torch.rand, torch.full)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in self.ALLOCATE and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


class RMSNorm(comfy.ops.manual_cast.RMSNorm):
    """transformers' RMSNorm to the bit (normalise in fp32, round, then scale) with the host's weight handling."""

    def forward_comfy_cast_weights(self, x: Tensor) -> Tensor:  # noqa: D102
        weight, _ = comfy.ops.cast_bias_weight(self, x)
        full = x.float()
        full = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + self.eps)
        return weight * full.to(x.dtype)


class ScaledEmbedding(comfy.ops.manual_cast.Embedding):
    """Gemma's token embedding: times a factor, rounded as the library rounds it."""

    factor: float

    def forward_comfy_cast_weights(self, ids: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:  # noqa: D102
        out = super().forward_comfy_cast_weights(ids, out_dtype=out_dtype)
        return out * out.new_tensor(self.factor)


def swap_layers(module: nn.Module) -> None:
    """Replaces linear, convolution, norm and token embedding layers by the host's.

    Small embeddings stay: the library reads their device and dtype, and `MLLMBackbone.move_unmanaged` moves them. So do
    norms of another kind than Llama's, such as Qwen3.5's, which scale by 1 + weight.
    """
    ops = comfy.ops.manual_cast
    child: Any
    for name, child in module.named_children():
        where = {"device": "meta", "dtype": torch.float32}
        new = None
        if type(child) is nn.Linear:
            new = ops.Linear(child.in_features, child.out_features, bias=child.bias is not None, **where)
        elif type(child) in (nn.Conv2d, nn.Conv3d):
            conv = ops.Conv2d if type(child) is nn.Conv2d else ops.Conv3d
            where |= dict(stride=child.stride, padding=child.padding, bias=child.bias is not None)
            new = conv(child.in_channels, child.out_channels, child.kernel_size, **where)
        elif type(child) is nn.LayerNorm:
            new = ops.LayerNorm(child.normalized_shape, eps=child.eps, bias=child.bias is not None, **where)
        elif type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):  # Llama's kind
            new = RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, **where)
            new.bias = None
        elif isinstance(child, nn.Embedding) and name.startswith("embed_tokens"):
            scale = getattr(child, "embed_scale", None)
            new = (ops.Embedding if scale is None else ScaledEmbedding)(
                child.num_embeddings, child.embedding_dim, **where
            )
            new.factor = 1.0 if scale is None else float(scale)
        if new is None:
            swap_layers(child)
        else:
            setattr(module, name, new.eval().requires_grad_(False))
