"""Activation checkpointing that is right for blocks which work in place, as the host's DiTs do.

torch's own checkpointing keeps a block's inputs and the recomputed activations by reference; ComfyUI's FLUX and
OmniGen2 write into both (`img += ...`), which gives wrong gradients without a word. Here every run works on copies of
the inputs, and `in_place` lets autograd know of the writes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


@contextmanager
def recomputed(blocks: Iterable[nn.Module], trained: Callable[[nn.Module], Sequence[nn.Parameter]] = lambda _: ()):
    """Inside, each of `blocks` keeps its inputs alone and is computed again in the backward pass.

    `trained` gives the trained parameters that a block reaches (a LoRA's), when it runs: sharded ones are whole only
    then. All its own are taken to be frozen.
    """
    covered = []
    try:
        for block in blocks:
            before = block.__dict__.get("forward")
            covered.append((block, before))
            block.forward = _recomputing(block.forward, partial(trained, block))
        yield
    finally:
        for block, before in covered:
            if before is None:
                del block.forward
            else:
                block.forward = before


@contextmanager
def in_place():
    """Around forward and backward pass: what is kept for the backward pass is copied before it is written over.

    torch's `allow_mutation_on_saved_tensors` (as of 2.13) knows a kept tensor by its address. So it does not see a
    write into a slice that begins elsewhere (Qwen-Image 2.1's `x[:, n:].addcmul_(...)`), and takes a new tensor that
    gets an old one's address for it: in both cases wrong gradients, without an error. Here the storage counts.
    """
    kept: dict[int, WeakSet[_Kept]] = defaultdict(WeakSet)
    with saved_tensors_hooks(lambda tensor: _Kept(tensor, kept), lambda one: one.tensor), _CopiesBeforeWrites(kept):
        yield


class _Kept:
    """A tensor that autograd keeps, or its copy."""

    def __init__(self, tensor: Tensor, kept: dict[int, WeakSet]):
        self.tensor = tensor
        kept[_storage(tensor)].add(self)


class _CopiesBeforeWrites(TorchDispatchMode):
    """Copies kept tensors whose storage an operation is about to write to, each view of it once."""

    def __init__(self, kept: dict[int, WeakSet]):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for number, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[number] if number < len(args) else kwargs.get(argument.name)
                for tensor in tree_leaves(written):
                    if isinstance(tensor, Tensor):
                        self._copy(tensor)
        return function(*args, **kwargs)

    def _copy(self, written: Tensor) -> None:
        copies: dict[tuple, Tensor] = {}
        for one in self.kept.pop(_storage(written), ()):
            x = one.tensor
            view = x.dtype, x.storage_offset(), x.shape, x.stride()
            if view not in copies:
                copies[view] = x.clone()
            one.tensor = copies[view]


def _storage(tensor: Tensor) -> int:
    """The same number for all tensors that share memory; while one of them is kept, no other gets it."""
    return tensor.untyped_storage()._cdata


def _recomputing(forward: Callable, trained: Callable[[], Sequence[nn.Parameter]]) -> Callable:
    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        leaves, layout = tree_flatten((args, kwargs))
        indices = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

        def block(tensors: Sequence[Tensor]):
            inputs = list(leaves)
            for index, tensor in zip(indices, tensors):
                inputs[index] = tensor.clone()
            args, kwargs = tree_unflatten(inputs, layout)
            return forward(*args, **kwargs)

        out = _Recompute.apply(block, len(indices), *(leaves[i] for i in indices), *trained())
        for index in indices:
            leaves[index] = None  # kept by the function, which knows when they are done with
        return out

    return run


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, count: int, *tensors):
        ctx.block, ctx.count = block, count
        device = tensors[0].device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            return block(tensors[:count])

    @staticmethod
    def backward(ctx, *gradients):
        tensors = ctx.saved_tensors
        inputs = [t.detach().requires_grad_(need) for t, need in zip(tensors[: ctx.count], ctx.needs_input_grad[2:])]
        wanted = [t for t in (*inputs, *tensors[ctx.count :]) if t.requires_grad]
        with torch.enable_grad(), torch.autocast(*ctx.autocast), in_place():
            out = ctx.block(inputs)
            out = (out,) if isinstance(out, Tensor) else out
            reached = [(o, g) for o, g in zip(out, gradients) if o.requires_grad and g is not None]
            outputs, given = [o for o, _ in reached], [g for _, g in reached]
            found = iter(torch.autograd.grad(outputs, wanted, given, allow_unused=True))
        return None, None, *(next(found) if t.requires_grad else None for t in (*inputs, *tensors[ctx.count :]))
