"""Token strengths inside a DiT's attention, through the host's `optimized_attention_override`.

softmax(q kT / sqrt(d) + ln strength) v on every joint attention call: strength 0 takes the keys out, strength 1 adds
nothing. With regions, an image token that is outside a reference's region has that reference's keys taken out, too.
Source: our choice; the paper only switches groups on and off, which is strength 1 and 0.
"""

from collections.abc import Callable, Sequence
from math import inf
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from ..loaders.host import exact_attention
from .key_bias import QueryBias, attention_with_key_bias, runs_of

MOST_PARTS = 16  # kernel calls for one joint attention; with more patterns (noise), all regions are a bias of queries
# in the name of a kernel that may round queries and keys to 8 bits or fewer, where a bias beside them spoils both, or
# skip keys; the last is the host's node that chooses any of its kernels
INEXACT = ("sage", "int8", "fp8", "fp4", "sparse", "sol_attn", "set_model_optimized_attention")
REMOVED = -3e3  # exp underflows to 0, and fp16 holds it times 16; only for keys that some rows of a batch keep


class Regions(NamedTuple):
    """Which references each image token of a model call reads."""

    image: slice  # the image's tokens
    references: list[slice]  # each reference's tokens
    log_weight: Tensor  # (conditions, references, image tokens) float32, ln of how much it is read; -inf = not at all

    def without(self, tokens: slice) -> "Regions":
        """The same among the tokens that are left without some."""

        def moved(span: slice) -> slice:
            by = tokens.stop - tokens.start if span.start >= tokens.stop else 0
            return slice(span.start - by, span.stop - by)

        left = [i for i, span in enumerate(self.references) if span.stop <= tokens.start or span.start >= tokens.stop]
        return Regions(moved(self.image), [moved(self.references[i]) for i in left], self.log_weight[:, left])


class KeyStrengthAttention:
    """An `optimized_attention_override` that applies the key strengths of one model call.

    With regions, the queries that read the same references have a kernel call of their own, over these keys. So a
    region of zeros and ones needs no mask; for queries at soft edges it is a bias (`key_bias`). A kernel that would
    round the bias does not get it: PyTorch's does these calls.

    Args:
        log_strength: (conditions, keys) float32, ln of the strength of each key for each condition of the call; -inf
            removes the key. Attention calls with another number of keys (refiners of one group) stay untouched.
        repeats: Pictures per condition in the call's batch, which is ordered "(condition picture)".
        device: Of the call.
        previous: Another override that the model has already; it runs around the host's kernel.
        regions: Which references the image's tokens read; None = all. Queries and keys are then the same tokens, or the
            keys alone hold the references, last (a cache of the host's).
        joint_only: Tokens in a row that other attention calls of the model leave out; None = it has no such calls.
        refined: Tokens in a row that the model also refines among themselves with attention calls over these alone.
        pieces: Of the tokens, in order, where attention has a call for each, over the keys up to its end. The last is
            the image; `regions.image` counts from its start.
        references: Tokens of each reference. Where the host says other numbers, it is believed.
        recount: Makes the same object for other numbers, and for so many tokens before and behind the context.

    Attributes:
        applied: Number of joint attention calls so far, of the image where pieces have their own; a compiled model is
            not counted.
        prefix_cache: For the host's cache of keys and values of what is before the image, which depend on strengths.
        contextless: Whether calls without those tokens are counted, too.
        inexact: Name of a kernel that did not get the calls with a bias, or "".
        reached: Whether there was one. Written only, so that a compiled model puts no guard on it.
    """

    def __init__(
        self,
        log_strength: Tensor,
        repeats: int,
        device: torch.device,
        previous: Callable | None = None,
        regions: Regions | None = None,
        joint_only: slice | None = None,
        refined: slice | None = None,
        pieces: Sequence[slice] = (),
        references: Sequence[int] = (),
        recount: "Callable[[Sequence[int], tuple[int, int]], KeyStrengthAttention | None] | None" = None,
    ):
        self._references, self._added, self._recount = list(references), (0, 0), recount
        self.previous = previous
        self.applied, self.reached, self.inexact = 0, False, ""
        self.contextless = joint_only is not None
        self.prefix_cache: Any = None
        image = pieces[-1].stop - pieces[-1].start if pieces else None
        self._calls = {log_strength.shape[1]: _Call(log_strength, repeats, device, regions, image)}
        self._before: dict[int, _Call] = {}
        for piece in pieces[:-1]:
            logs = log_strength[:, : piece.stop]
            if not logs.isneginf().all():  # else nothing reads this piece
                self._before[piece.stop] = _Call(logs, repeats, device, None, piece.stop - piece.start)
        if refined is not None:
            logs = log_strength[:, refined]
            self._before[logs.shape[1]] = _Call(logs, repeats, device, None)
        if joint_only is not None:
            rest = torch.ones(log_strength.shape[1], dtype=torch.bool)
            rest[joint_only] = False
            regions = regions and regions.without(joint_only)
            self._calls[int(rest.sum())] = _Call(log_strength[:, rest], repeats, device, regions)

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
        kernels = [attention] if self.previous is None else [self.previous, attention]
        if self.previous is not None:
            attention = _through(self.previous, attention)
        said = (kwargs.get("transformer_options") or {}).get("reference_image_num_tokens")
        if said and len(said) == len(self._references):
            self.expect(said, self._added)
        queries, keys = (x.shape[2] if kwargs.get("skip_reshape") else x.shape[1] for x in (q, k))
        call = self._calls.get(keys) or self._before.get(keys)
        if call is None or not call.takes(queries):
            return attention(q, k, v, heads, mask=mask, **kwargs)

        if keys in self._calls:
            self.reached = True
            if not torch.compiler.is_compiling():
                self.applied += 1
        if not kwargs.pop("skip_reshape", False):
            width = q.shape[-1] // heads  # k and v may have fewer heads
            q, k, v = (rearrange(x, "b n (h d) -> b h n d", d=width) for x in (q, k, v))
        exact = attention
        for name in map(full_name, kernels) if call.has_bias else ():
            if any(word in name.lower() for word in INEXACT):
                self.inexact, exact = name, exact_attention()
                break
        return call.attend(attention, exact, q, k, v, heads, mask, **kwargs)

    def add_tokens(self, before: int, behind: int) -> None:
        """Expects tokens without strengths around the context, which a patch of another extension adds there."""
        self.expect(self._references, (before, behind))

    def expect(self, references: Sequence[int], added: tuple[int, int]) -> None:
        """Expects these numbers of tokens: of each reference, and before and behind the context."""
        if self._recount is None or (list(references), added) == (self._references, self._added):
            return
        self._references, self._added = list(references), added
        other = self._recount(references, added)
        if other is not None:
            self._calls, self._before = other._calls, other._before


class _Call:
    """What attention calls over a number of keys do; `queries`: how many they have; None = any, or as regions say."""

    def __init__(
        self,
        log_strength: Tensor,
        repeats: int,
        device: torch.device,
        regions: Regions | None,
        queries: int | None = None,
    ):
        # by number of queries; the order is that of the queries among the parts'
        self._parts: dict[int, list[_Part]] = {}
        self._order: dict[int, Tensor] = {}
        self._whole = _Part(log_strength, repeats, device) if regions is None else None
        self._queries = queries
        self.has_bias = self._whole is not None and self._whole.bias is not None  # of some of its queries
        if regions is None:
            return
        keys = log_strength.shape[1]
        counts = [queries or keys]
        if regions.references[-1].stop == keys and regions.image.stop <= regions.references[0].start:
            counts.append(regions.references[0].start)  # the host keeps the references' keys: no queries of theirs
        for count in counts:
            parts = self._parts[count] = _parts(log_strength, repeats, device, regions, count)
            self._order[count] = torch.cat([part.queries for part in parts if part.queries is not None]).argsort()
        self.has_bias = any(part.bias is not None for parts in self._parts.values() for part in parts)

    def takes(self, queries: int) -> bool:
        """Whether it can do a call with so many queries."""
        return queries in self._parts if self._whole is None else self._queries in (None, queries)

    def attend(self, attention: Callable, exact: Callable, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of all queries; q: (b, h, n, d). `exact` is the kernel for a bias."""
        if self._whole is not None:
            return self._whole.attend(attention, exact, q, *args, **kwargs)
        outputs = [part.attend(attention, exact, q, *args, **kwargs) for part in self._parts[q.shape[2]]]
        return torch.cat(outputs, -2).index_select(-2, self._order[q.shape[2]])


class _Part:
    """Queries of a call that read the same keys."""

    def __init__(
        self,
        log_strength: Tensor,
        repeats: int,
        device: torch.device,
        queries: Tensor | None = None,
        query_bias: QueryBias | None = None,
    ):
        self.queries = queries if queries is None else queries.to(device)
        removed = log_strength.isneginf().all(0)
        self.keep: Tensor | slice | None = None
        if removed.any():
            kept = (~removed).nonzero().flatten()
            first, end = int(kept[0]), int(kept[-1]) + 1
            # one piece, as without the context: a view instead of a copy
            self.keep = slice(first, end) if end - first == len(kept) else kept.to(device)
            log_strength = log_strength[:, ~removed]
        self.bias: Tensor | None = None
        self.query_bias: QueryBias | None = None
        if query_bias is not None:
            query_bias = QueryBias(query_bias.rows.clamp(min=REMOVED), query_bias.columns[~removed])
            rows = repeat(query_bias.rows, "c n g -> (c b) n g", b=repeats)
            self.query_bias = QueryBias(rows.to(device), query_bias.columns.to(device))
        if log_strength.any() or query_bias is not None:
            log_strength = log_strength.clamp(min=REMOVED)
            self.bias = repeat(log_strength, "c n -> (c b) n", b=repeats).to(device)
            self.runs = runs_of(log_strength, query_bias)

    def attend(
        self,
        attention: Callable,
        exact: Callable,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        """Output of these queries; q, k, v: (b, h, n, d). `exact` is the kernel for a bias."""
        if self.queries is not None:
            if mask is not None and mask.ndim > 1 and mask.shape[-2] == q.shape[2]:
                mask = mask[..., self.queries, :]
            q = q[:, :, self.queries]
        if self.keep is not None:
            k, v = k[:, :, self.keep], v[:, :, self.keep]
            mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., self.keep]
        if self.bias is None:
            return attention(q, k, v, heads, mask=mask, skip_reshape=True, **kwargs)
        biases = self.bias, self.query_bias, self.runs
        return attention_with_key_bias(exact, q, k, v, heads, *biases, mask=mask, **kwargs)


def _parts(log_strength: Tensor, repeats: int, device: torch.device, regions: Regions, count: int) -> list[_Part]:
    """The first `count` queries, by what references they read in every condition, those at soft edges apart.

    Where these are more than MOST_PARTS, there are two: queries that read everything, and others with a bias.
    """
    weight = torch.zeros(*regions.log_weight.shape[:2], count)
    weight[..., regions.image] = regions.log_weight
    for closed in (weight.isneginf(), torch.zeros_like(weight, dtype=torch.bool)):
        soft = ((weight < 0) & ~closed).flatten(0, 1).any(0)
        patterns, pattern_of = torch.cat((closed.flatten(0, 1), soft[None])).unique(dim=1, return_inverse=True)
        if patterns.shape[1] <= MOST_PARTS:
            break
    columns = torch.zeros(log_strength.shape[1], len(regions.references))
    for group, span in enumerate(regions.references):
        columns[span, group] = 1
    parts = []
    for number in range(patterns.shape[1]):
        queries = (pattern_of == number).nonzero().flatten()
        logs = log_strength.clone()
        for group, span in enumerate(regions.references):
            logs[closed[:, group, queries[0]], span] = -inf
        bias = QueryBias(rearrange(weight[..., queries], "c g n -> c n g"), columns) if soft[queries[0]] else None
        parts.append(_Part(logs, repeats, device, queries, bias))
    return parts


def full_name(function: Any) -> str:
    """Where a function or a callable object comes from."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _through(override: Callable, attention: Callable) -> Callable:
    return lambda *args, **kwargs: override(attention, *args, **kwargs)
