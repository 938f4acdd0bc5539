"""Activation checkpointing that is right for blocks which work in place, as the host's DiTs do.

torch's own checkpointing keeps a block's inputs and the recomputed activations by reference; ComfyUI's FLUX and
OmniGen2 write into both (`img += ...`), which gives wrong gradients without a word. Here every run works on copies of
the inputs, and `in_place` lets autograd know of the writes.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


@contextmanager
def recomputed(blocks: Iterable[nn.Module], trained: Callable[[nn.Module], Sequence[nn.Parameter]] = lambda _: ()):
    """Inside, each of `blocks` keeps its inputs alone and is computed again in the backward pass.

    `trained` gives the trained parameters that a block reaches (a LoRA's); all its own are taken to be frozen.
    """
    covered = []
    try:
        for block in blocks:
            before = block.__dict__.get("forward")
            covered.append((block, before))
            block.forward = _recomputing(block.forward, list(trained(block)))
        yield
    finally:
        for block, before in covered:
            if before is None:
                del block.forward
            else:
                block.forward = before


@contextmanager
def in_place():
    """`allow_mutation_on_saved_tensors` of torch, around forward and backward pass, without one fault of it.

    It knows a kept tensor by the addresses of its object and data and by its version. Once it has copied one that was
    about to be written over and let it go, a new tensor may get both addresses, and the old one's copy is taken for it:
    an error where shapes differ, wrong gradients where they do not. Here a copied tensor's address is forgotten.
    """
    with torch.autograd.graph.allow_mutation_on_saved_tensors() as kept:
        kept.cloned = _Copies(kept)
        yield


class _Copies(WeakKeyDictionary):
    """Handle -> copy; torch fills it just before it lets the original go."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def __setitem__(self, handle, copy: Tensor) -> None:
        super().__setitem__(handle, copy)
        original = self.kept.original[handle]
        self.kept.tid_to_weakhandle.pop((id(original), original.data_ptr(), original._version), None)


def _recomputing(forward: Callable, parameters: list[nn.Parameter]) -> Callable:
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

        out = _Recompute.apply(block, len(indices), *(leaves[i] for i in indices), *parameters)
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
