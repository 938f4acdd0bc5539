"""What other patches on the model mean for stages: step caches begin anew, and attention that bypasses is refused."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch

from ..loaders.backbones import Backbone
from ..loaders.dit import dit_of
from .attention import KeyStrengthAttention, full_name
from .stages import Stages

OURS = "subject_"  # begins the keys of this pack's wrappers
KEY = f"{OURS}stages"  # of those of the stages
HOST_CACHES = ("easycache", "lazycache")  # keys of the host's step caches, which `restart_cache` knows
COUNTS = ("total_steps_skipped", "output_change_rates", "approx_output_change_rates")  # of theirs, logged at the end


def own_code(model_options: dict) -> AbstractContextManager[Any]:
    """Where a compiled model must not take code that was compiled for other strengths: inside, it runs uncompiled.

    The host's TorchCompileModel from 0.33 on tells torch to forget that its code depends on `transformer_options`, and
    with them on the attention override. Without a guard filter, torch compiles anew for each override.
    """
    compiled = model_options.get("torch_compile_kwargs") or {}
    # torch takes the filter out of `options`, which is None without one
    return nullcontext() if compiled.get("options") is None else torch.compiler.set_stance("force_eager")


@contextmanager
def own_prefix_cache(override: KeyStrengthAttention, model: Any) -> Iterator[None]:
    """Inside, the host's cache of what is before the picture (Qwen-Image 2.1) is that of these strengths.

    The host finds what it keeps by the tokens alone, but it depends on the strengths, too.
    """
    module = dit_of(model)
    if not hasattr(module, "prefix_cache"):
        yield
        return
    host, module.prefix_cache = module.prefix_cache, override.prefix_cache
    try:
        yield
    finally:
        override.prefix_cache, module.prefix_cache = module.prefix_cache, host


def counting_added_tokens(override: KeyStrengthAttention, options: dict) -> dict:
    """`transformer_options` by which the override knows what patches add around the context (USO's style)."""
    patches = options.get("patches", {})
    others = patches.get("post_input")
    if not others:
        return options
    contexts = []

    def first(arguments: dict) -> dict:
        contexts.append(arguments["txt"])
        return arguments

    def last(arguments: dict) -> dict:
        context, tokens = contexts.pop(), arguments["txt"]
        added = tokens.shape[1] - context.shape[1]
        if added > 0 and torch.equal(tokens[:, added:], context):
            override.add_tokens(added, 0)
        elif added > 0 and torch.equal(tokens[:, :-added], context):
            override.add_tokens(0, added)
        return arguments

    return options | {"patches": patches | {"post_input": [first, *others, last]}}


def restart_cache(model_options: dict, models: Iterable[Any]) -> None:
    """Lets the host's EasyCache, LazyCache, FluxKVCache and prefix cache begin anew: theirs is the stage before's.

    The `reset` of the first two is meant for the end of a run: it leaves a rate of 0 instead of none, by which the
    cache would leave out nearly every later step (EasyCache) or divide nothing by it (LazyCache), and forgets what it
    counts.
    """
    options = model_options.get("transformer_options", {})
    for module in map(dit_of, models):
        if hasattr(module, "reset_prefix_cache"):  # found by its tokens: it would be right, but takes memory
            module.reset_prefix_cache(module.prefix_cache_enabled)
    for patch in options.get("patches", {}).get("attn1_patch", ()):
        if isinstance(getattr(patch, "cache", None), dict):  # keys and values of the references
            patch.cache.clear()
    cache = options.get("easycache")
    if cache is None:
        return
    kept = {name: getattr(cache, name) for name in COUNTS if hasattr(cache, name)}
    cache.reset()
    cache.relative_transformation_rate = None
    for name, value in kept.items():
        setattr(cache, name, value)


def check_caches(model_options: dict, schedules: Iterable[Stages]) -> None:
    """Raises ValueError for a step cache of another pack, unless each schedule of the run has one stage."""
    if all(len(stages.keyframes) == 1 and stages.keyframes[0].blend == "hold" for stages in schedules):
        return
    names = _wrapper_names(model_options.get("transformer_options", {}))
    if "model_function_wrapper" in model_options:
        names.append(full_name(model_options["model_function_wrapper"]))
    found = [name for name in names if "cache" in name.lower() and not name.startswith(HOST_CACHES)]
    if found:
        raise ValueError(
            f"Apply Stages: the model has a step cache of another extension ({', '.join(found)}), which would answer "
            "calls of one stage with results of the stage before. Remove it, or use ComfyUI's own EasyCache or "
            "LazyCache, which begin anew with each stage."
        )


def check_applied(
    override: KeyStrengthAttention, backbone: Backbone, model: Any, options: dict, warn: Callable[[str], None]
) -> None:
    """Raises RuntimeError where joint attention of a model call did not pass through `override`.

    Args:
        override: The call's, whose `applied` counts.
        backbone: The record of the DiT's family.
        model: The host's model that was called.
        options: The call's `transformer_options`.
        warn: Takes the text about blocks that another extension replaced, which may be meant.
    """
    lists = backbone.joint_blocks + backbone.contextless_blocks * override.contextless
    blocks = sum(len(getattr(dit_of(model), name, ())) for name in lists)
    applied = override.applied
    whole = blocks and applied and applied % blocks == 0  # a wrapper may run the model more than once
    if whole or (override.reached and not applied):  # compiled
        return
    if getattr(options.get("easycache"), "skip_current_step", False) and not applied:
        return
    replaced = options.get("patches_replace", {}).get("dit", {})
    if applied and blocks - len(replaced) <= applied < blocks:
        names = ", ".join(sorted({full_name(function) for function in replaced.values()}))
        warn(
            f"Apply Stages: in {blocks - applied} of {blocks} blocks of the model, which another extension replaces "
            f"({names}), attention does not follow the stages. If it skips these blocks, nothing is lost; if it "
            "computes them in its own way, remove it."
        )
        return
    calls = f"{applied} of {blocks}" if applied else "none"
    found = [*dict.fromkeys(_suspects(override, backbone, model, options))]
    raise RuntimeError(
        f"Apply Stages: tokens have to be weighted or left out, but {calls} of the attention calls of {backbone.title} "
        f"({type(dit_of(model)).__name__}) did so: the others do not use ComfyUI's optimized_attention_override as "
        "the schedule set it. "
        + (f"On this model: {', '.join(found)}. " if found else "")
        + "Remove what replaces the attention, adds tokens or computes the picture in parts; or keep to what needs "
        "nothing of the attention: the preset semantics_first, and references without settings of their own."
    )


def _suspects(override: KeyStrengthAttention, backbone: Backbone, model: Any, options: dict) -> Iterable[str]:
    """Names of what may have replaced the attention, most likely first."""
    current = options.get("optimized_attention_override")
    if current is not override:
        yield f"attention override {full_name(current)}"
    patches = options.get("patches", {})
    changes = (f for kind in ("post_input", "attn1_patch") for f in patches.get(kind, ()))
    yield from (f"patch of the tokens {full_name(f)}" for f in changes)
    yield from (f"block replacement {full_name(f)}" for f in options.get("patches_replace", {}).get("dit", {}).values())
    for part in (block for name in backbone.joint_blocks for block in getattr(dit_of(model), name, ())):
        if "forward" in vars(part):
            yield f"block function {full_name(part.forward)}"
        source = sys.modules[type(part).__module__]
        for function in (getattr(source, name, None) for name in ("attention", "optimized_attention")):
            if function is not None and not full_name(function).startswith("comfy."):
                yield f"attention function {full_name(function)}"
    yield from (f"wrapper {name}" for name in _wrapper_names(options) if not name.startswith(HOST_CACHES))


def _wrapper_names(options: dict) -> list[str]:
    """Names of the wrappers in `transformer_options` that are not this pack's."""
    by_key = chain.from_iterable(kind.items() for kind in options.get("wrappers", {}).values())
    return [f"{key} ({full_name(found[0])})" for key, found in by_key if found and not str(key).startswith(OURS)]
