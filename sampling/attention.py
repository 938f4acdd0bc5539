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

from .tokens import KeyStrengths

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
    """An `optimized_attention_override` that applies the key strengths of the conditions in the batch.

    Args:
        strengths: Key strengths by the host's condition uuid; other conditions stay untouched.
        previous: Another override that the model has already; it runs around ours.

    Attributes:
        applied: Number of joint attention calls so far.
    """

    def __init__(self, strengths: dict[Any, KeyStrengths], previous: Callable | None = None):
        self.strengths = strengths
        self.previous = previous
        self.applied = 0
        self._plans: dict[tuple, tuple[Tensor | slice | None, Tensor | None]] = {}

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
        uuids = kwargs["transformer_options"]["uuids"]
        joint = {self.strengths[u].log_strength.shape[0] if u in self.strengths else None for u in uuids}
        keys = k.shape[2] if kwargs.get("skip_reshape") else k.shape[1]
        if joint != {keys}:
            return attention(q, k, v, heads, mask=mask, **kwargs)

        self.applied += 1
        if not kwargs.pop("skip_reshape", False):
            width = q.shape[-1] // heads  # k and v may have fewer heads
            q, k, v = (rearrange(x, "b n (h d) -> b h n d", d=width) for x in (q, k, v))
        keep, bias = self._keys_and_bias(tuple(uuids), k)
        if keep is not None:
            k, v = k[:, :, keep], v[:, :, keep]
            mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., keep]
        if bias is None:
            return attention(q, k, v, heads, mask=mask, skip_reshape=True, **kwargs)
        return attention_with_key_bias(attention, q, k, v, heads, bias, mask=mask, **kwargs)

    def _keys_and_bias(self, uuids: tuple, k: Tensor) -> tuple[Tensor | slice | None, Tensor | None]:
        """(keys to keep or None for all, bias (b, kept keys) or None), worked out once per batch layout and device."""
        layout = (uuids, k.device, k.shape[0])
        if layout not in self._plans:
            logs = torch.stack([self.strengths[u].log_strength for u in uuids])  # (conditions, keys)
            removed = logs.isneginf().all(0)
            keep: Tensor | slice | None = None
            if removed.any():
                first = int(removed.sum())
                if removed[:first].all():  # the context alone: a view instead of a copy
                    keep = slice(first, None)
                    logs = logs[:, keep]
                else:
                    logs = logs[:, ~removed]
                    keep = (~removed).nonzero().flatten().to(k.device)
            bias = None
            if logs.any():
                logs = repeat(logs.clamp(min=REMOVED), "c n -> (c b) n", b=k.shape[0] // len(uuids))
                bias = logs.to(k.device)
            self._plans[layout] = keep, bias
        return self._plans[layout]


def _through(override: Callable, attention: Callable) -> Callable:
    return lambda *args, **kwargs: override(attention, *args, **kwargs)
