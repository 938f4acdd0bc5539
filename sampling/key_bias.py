"""A bias on the logits of attention's keys, in the form that costs least where it is computed.

softmax(q kT * scale + bias) v, and a part of the bias may depend on the query, too. Three forms, equal but for
rounding (their times: `nox -s bench -- strength`):

- parts: attention to each run of keys with one bias, joined by their log-sum-exp. PyTorch's cuDNN and flash attention
  on CUDA give it; all runs together cost as much as plain attention, and then come the passes that join them.
- mask: for PyTorch's attention on a CPU, whose kernel reads a mask that is the same for every query from one row.
- channels: for every other kernel. A mask would leave the fast ones, so extra channels of q and k carry the bias.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import sqrt
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import pad

from ..loaders.host import exact_attention

CHANNELS = 8  # fast kernels want head widths in multiples of this
MOST_RUNS = 8  # kernel calls for one attention; keys with a bias each (a mask over a reference) ride in channels


class QueryBias(NamedTuple):
    """A bias for pairs of a query and a group of keys."""

    rows: Tensor  # (b, n, groups) float32, added to the logits
    columns: Tensor  # (keys, groups), 1 where a key belongs to the group, else 0


def attention_with_key_bias(
    attention: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    bias: Tensor,
    query_bias: QueryBias | None = None,
    runs: Sequence[slice] = (),
    form: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """softmax(q kT * scale + bias) v.

    Args:
        attention: The host's kernel, called with `skip_reshape`.
        q: (b, h, n, d).
        k: (b, h, keys, d), possibly of fewer heads.
        v: As k.
        heads: h.
        bias: (b, keys) float32, added to the logits.
        query_bias: Added, too; None = none.
        runs: `runs_of` the bias.
        form: "parts" (channels where no kernel gives log-sum-exp), "mask" or "channels"; None = by device and kernel.
        **kwargs: For the kernel.

    Returns:
        (b, n, h * d), or (b, h, n, d) with `skip_output_reshape`.
    """
    form = form or _form(attention, q, k, v, query_bias, runs, kwargs)
    if form == "parts" and (kernel := _kernel_of_parts(q, k, v)):
        return _in_parts(kernel, q, k, v, bias, query_bias, runs, **kwargs)
    if form == "mask":
        kwargs["mask"] = bias[:, None, None].expand(len(q), 1, q.shape[2], k.shape[2])
        return attention(q, k, v, heads, skip_reshape=True, **kwargs)
    return _in_channels(attention, q, k, v, heads, bias, query_bias, **kwargs)


def runs_of(bias: Tensor, query_bias: QueryBias | None = None) -> list[slice]:
    """Spans of keys in a row with the same bias, in order; [] for more than MOST_RUNS. All on the CPU."""
    columns = bias if query_bias is None else torch.cat((bias, query_bias.columns.T))
    starts = ((columns[:, 1:] != columns[:, :-1]).any(0).nonzero().flatten() + 1).tolist()
    ends = [0, *starts, columns.shape[1]] if len(starts) < MOST_RUNS else []
    return [slice(*span) for span in zip(ends, ends[1:])]


def _form(
    attention: Callable, q: Tensor, k: Tensor, v: Tensor, query_bias: QueryBias | None, runs: Sequence, kwargs: dict
) -> str:
    """The form for these tensors; other kernels than PyTorch's (sage, xformers, another pack's) get channels."""
    if attention is not exact_attention() or kwargs.get("mask") is not None:
        return "channels"
    if q.device.type == "cpu":
        # a dense mask takes memory, and in half precision a mask rounds the bias
        return "mask" if query_bias is None and q.dtype == torch.float32 else "channels"
    return "parts" if runs else "channels"


def _kernel_of_parts(q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Any] | None:
    """A kernel that gives log-sum-exp, too, and no gradients; None = none takes these. cuDNN first, as the host has it.

    On an H200 in bf16, 8,704 tokens: cuDNN 1.39 ms, with log-sum-exp 1.40; flash 1.6 times that.
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    cuda: Any = torch.backends.cuda
    if q.device.type != "cuda" or torch.version.hip or any(x.requires_grad for x in (q, k, v)):
        return None
    if q.shape[1] != k.shape[1] or q.shape[-1] % CHANNELS or not hasattr(cuda, "SDPAParams"):
        return None
    params = cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    if hasattr(cuda, "can_use_cudnn_attention") and cuda.can_use_cudnn_attention(params):
        return partial(_cudnn, torch.ops.aten._scaled_dot_product_cudnn_attention)
    return torch.ops.aten._scaled_dot_product_flash_attention if cuda.can_use_flash_attention(params) else None


def _cudnn(kernel: Callable, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    output, log_sum, *_ = kernel(q, k, v, None, True, scale=scale)  # True: with log-sum-exp, (b, h, n, 1)
    return output, log_sum.reshape(q.shape[:3])


def _in_parts(
    kernel: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    query_bias: QueryBias | None,
    runs: Sequence[slice],
    **kwargs: Any,
) -> Tensor:
    """Attention to each run by itself, then the mean by exp(log-sum-exp + bias)."""
    outputs, weights = [], []
    for run in runs:
        output, log_sum, *_ = kernel(q, k[:, :, run], v[:, :, run], scale=kwargs.get("scale"))
        added = bias[:, run.start, None]
        if query_bias is not None:
            added = added + query_bias.rows @ query_bias.columns[run.start]
        outputs.append(output)
        weights.append(log_sum + rearrange(added, "b n -> b 1 n"))
    if len(runs) == 2:  # one pass instead of three; the share is rounded no more than the outputs are
        share = torch.sigmoid(weights[1] - weights[0])[..., None].to(q.dtype)
        out = torch.lerp(outputs[0], outputs[1], share.expand_as(outputs[0]))
    else:
        shares = torch.stack(weights).softmax(0)
        out = outputs[0] * shares[0, ..., None]  # in float32
        for output, weight in zip(outputs[1:], shares[1:]):
            out += output * weight[..., None]
        out = out.to(q.dtype)
    return out if kwargs.get("skip_output_reshape") else rearrange(out, "b h n d -> b n (h d)")


def _in_channels(
    attention: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    bias: Tensor,
    query_bias: QueryBias | None,
    **kwargs: Any,
) -> Tensor:
    """[q, 1, 1, 0...] . [k, high, low, 0...] with bias = high + low, so that half precision keeps it.

    And [q, high, low] . [k, 1, 1] for a bias of queries.
    """
    width = q.shape[-1]
    groups = 0 if query_bias is None else query_bias.columns.shape[-1]
    extra = -(-2 * (1 + groups) // CHANNELS) * CHANNELS
    if kwargs.get("scale") is None:  # the kernel divides by sqrt(d + extra): undo what the extra channels change
        q = q * sqrt((width + extra) / width)
        root = sqrt(width + extra)
    else:
        root = 1 / kwargs["scale"]
    rows, columns = q.new_ones(len(q), q.shape[2], 2), _high_and_low(bias[..., None] * root, k.dtype)
    if query_bias is not None:
        rows = torch.cat((rows, _high_and_low(query_bias.rows * root, q.dtype)), -1)
        columns = torch.cat((columns, repeat(query_bias.columns.to(k.dtype), "n g -> b n (2 g)", b=len(k))), -1)
    rows, columns = (pad(x, (0, extra - x.shape[-1])) for x in (rows, columns))
    q = torch.cat((q, repeat(rows, "b n c -> b h n c", h=q.shape[1])), -1)
    k = torch.cat((k, repeat(columns, "b n c -> b h n c", h=k.shape[1])), -1)
    v = torch.cat((v, v.new_zeros(*v.shape[:3], extra)), -1)
    out = attention(q, k, v, heads, skip_reshape=True, **kwargs)
    if kwargs.get("skip_output_reshape"):
        return out[..., :width]
    out = rearrange(out, "b n (h d) -> b n h d", h=heads)[..., :width]
    return rearrange(out, "b n h d -> b n (h d)")


def _high_and_low(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., 2 c) in `dtype`: the nearest values, then what they miss."""
    high = x.to(dtype)
    return torch.cat((high, (x - high.float()).to(dtype)), -1)
