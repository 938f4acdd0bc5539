"""Token strengths inside a DiT's attention, through the host's `optimized_attention_override`.

softmax(q kT / sqrt(d) + ln strength) v on every joint attention call: strength 0 takes the keys out, strength 1 adds
nothing. Source: our choice; the paper only switches groups on and off, which is strength 1 and 0.
"""

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

EXTRA_CHANNELS = 8  # fast kernels want head widths in multiples of 8; two carry the bias
REMOVED = -1e4  # exp underflows to exactly 0 in every dtype; only for keys that some rows of a batch keep


def attention_with_key_bias(
    attention: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor, **kwargs: Any
) -> Tensor:
    """softmax(q kT * scale + bias) v through any attention kernel, without a mask.

    A mask would leave the fast kernels, so extra channels carry the bias: [q, 1, 1, 0...] . [k, high, low, 0...] with
    bias = high + low, so that half precision keeps it.

    Args:
        attention: The host's kernel, called with `skip_reshape`.
        q: (b, h, n, d).
        k: (b, h, keys, d), possibly of fewer heads.
        v: As k.
        heads: h.
        bias: (b, keys) float32, added to the logits.
        **kwargs: For the kernel.

    Returns:
        (b, n, h * d), or (b, h, n, d) with `skip_output_reshape`.
    """
    width = q.shape[-1]
    if kwargs.get("scale") is None:  # the kernel divides by sqrt(d + extra): undo what the extra channels change
        q = q * sqrt((width + EXTRA_CHANNELS) / width)
        root = sqrt(width + EXTRA_CHANNELS)
    else:
        root = 1 / kwargs["scale"]
    carried = bias * root
    high = carried.to(k.dtype)
    low = (carried - high.float()).to(k.dtype)
    columns = repeat(torch.stack((high, low), -1), "b n c -> b h n c", h=k.shape[1])
    k = torch.cat((k, columns, k.new_zeros(*k.shape[:3], EXTRA_CHANNELS - 2)), -1)
    q = torch.cat((q, q.new_ones(*q.shape[:3], 2), q.new_zeros(*q.shape[:3], EXTRA_CHANNELS - 2)), -1)
    v = torch.cat((v, v.new_zeros(*v.shape[:3], EXTRA_CHANNELS)), -1)
    out = attention(q, k, v, heads, skip_reshape=True, **kwargs)
    if kwargs.get("skip_output_reshape"):
        return out[..., :width]
    out = rearrange(out, "b n (h d) -> b n h d", h=heads)[..., :width]
    return rearrange(out, "b n h d -> b n (h d)")


class KeyStrengthAttention:
    """An `optimized_attention_override` that applies the key strengths of one model call.

    Args:
        log_strength: (conditions, keys) float32, ln of the strength of each key for each condition of the call; -inf
            removes the key. Attention calls with another number of keys (refiners of one group) stay untouched.
        repeats: Pictures per condition in the call's batch, which is ordered "(condition picture)".
        device: Of the call.
        previous: Another override that the model has already; it runs around the host's kernel.

    Attributes:
        applied: Number of joint attention calls so far; a compiled model is not counted.
        reached: Whether there was one. Written only, so that a compiled model puts no guard on it.
    """

    def __init__(self, log_strength: Tensor, repeats: int, device: torch.device, previous: Callable | None = None):
        self.keys = log_strength.shape[1]
        self.previous = previous
        self.applied, self.reached = 0, False
        removed = log_strength.isneginf().all(0)
        self._keep: Tensor | slice | None = None
        if removed.any():
            first = int(removed.sum())
            if removed[:first].all():  # the context alone: a view instead of a copy
                self._keep = slice(first, None)
                log_strength = log_strength[:, self._keep]
            else:
                self._keep = (~removed).nonzero().flatten().to(device)
                log_strength = log_strength[:, ~removed]
        self._bias: Tensor | None = None
        if log_strength.any():
            bias = repeat(log_strength.clamp(min=REMOVED), "c n -> (c b) n", b=repeats)
            self._bias = bias.to(device)

    def __call__(
        self,
        attention: Callable,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The host's attention with the strengths, as `optimized_attention_override` is called."""
        if self.previous is not None:
            attention = _through(self.previous, attention)
        keys = k.shape[2] if kwargs.get("skip_reshape") else k.shape[1]
        if keys != self.keys:
            return attention(q, k, v, heads, mask=mask, **kwargs)

        self.reached = True
        if not torch.compiler.is_compiling():
            self.applied += 1
        if not kwargs.pop("skip_reshape", False):
            width = q.shape[-1] // heads  # k and v may have fewer heads
            q, k, v = (rearrange(x, "b n (h d) -> b h n d", d=width) for x in (q, k, v))
        if self._keep is not None:
            k, v = k[:, :, self._keep], v[:, :, self._keep]
            mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., self._keep]
        if self._bias is None:
            return attention(q, k, v, heads, mask=mask, skip_reshape=True, **kwargs)
        return attention_with_key_bias(attention, q, k, v, heads, self._bias, mask=mask, **kwargs)


def _through(override: Callable, attention: Callable) -> Callable:
    return lambda *args, **kwargs: override(attention, *args, **kwargs)
