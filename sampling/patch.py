"""Stages on a MODEL: a patch that gives each model call the tokens of its stage, in any guider and with any sampler.

Where a run begins, every named condition gets a variant for each combination of groups that the schedule needs; at each
call the variant is chosen by sigma, and the guider's own prediction does the rest. So strength 1/1 is the host's path,
and strength 0 is the host's path without those tokens.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from math import prod
from typing import Any

import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
from torch import Tensor

from ..loaders.backbones import backbone_of, pixel_family
from ..loaders.conditioning import reference_latents
from ..loaders.dit import dit_of
from ..loaders.host import IGNORES_REFERENCES, editor_of_run, executing_node, reads_references
from .conditions import changes_strengths, check_conditions, check_family, check_guidance, check_latent
from .other_patches import KEY, check_caches
from .reference_stages import RunSchedule
from .run_progress import RunProgress
from .staged_run import APPLY_STAGES, StagedRun, titled
from .stages import Stages
from .tokens import grid, patch_size

OUTER_SAMPLE = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
PREDICT_NOISE = comfy.patcher_extension.WrappersMP.PREDICT_NOISE
APPLY_MODEL = comfy.patcher_extension.WrappersMP.APPLY_MODEL
CALLBACK = 5  # its place among the arguments of `outer_sample`
RUN_EVENT = "subject_dla.run"  # web/js/stages.js listens to it

NO_REFERENCES = (
    "Apply Stages: no condition has a reference latent, so the schedule's VAE strengths have no effect. Add one with "
    "ReferenceLatent, Add Identity or Subject Conditioning; TextEncodeQwenImageEditPlus adds one if it has a VAE."
)
PIXEL_REFERENCES = (
    "Apply Stages: %s reads reference images as patches of pixels, not as VAE tokens. The schedule's VAE strengths 0 "
    "and 1 switch all of them, with what the model's own vision tower sees; others are refused."
)

log = logging.getLogger(__name__)


def apply_stages(model: Any, stages: Stages, sigmas: Tensor | None = None) -> Any:
    """A clone of a MODEL whose token groups follow a schedule, in every sampler and guider.

    Args:
        model: The host's MODEL; it is not changed.
        stages: The schedule, in the place of one that the model has.
        sigmas: (steps + 1,) the whole schedule of noise levels, for the clock that counts steps in a run that is a part
            of it; None = the run is the whole.

    Raises:
        ValueError: Where `sigmas` are no schedule, or the model's family is refused.
    """
    check_family(model, changes_strengths(stages))
    if sigmas is not None and (sigmas.ndim != 1 or len(sigmas) < 2 or not sigmas.isfinite().all()):
        raise ValueError(
            f"Apply Stages: its sigmas are {sigmas.tolist()}, expected at least two finite noise levels. Connect the "
            "whole schedule that the run is a part of, or nothing."
        )
    clone = model.clone()
    add_stages(clone.model_options, stages, None if sigmas is None else [float(s) for s in sigmas])
    return clone


def add_stages(
    model_options: dict, stages: Stages, sigmas: list[float] | None = None, title: str = APPLY_STAGES
) -> None:
    """Puts a schedule into the options of a cloned MODEL or of a guider, in the place of an earlier one.

    Args:
        model_options: Of the MODEL or the guider.
        stages: The schedule.
        sigmas: As in `apply_stages`.
        title: Display name of the node that does so, for the run's messages.
    """
    run = partial(_outer_sample, stages, sigmas, executing_node(), title)
    wrappers_of(model_options, OUTER_SAMPLE)[KEY] = [run]


def is_staged(model_options: dict) -> bool:
    """Whether a staged run has begun, by the options of its guider."""
    return KEY in wrappers_of(model_options, PREDICT_NOISE)


def wrappers_of(model_options: dict, kind: str) -> dict[str, list]:
    """The host's wrappers of one kind, by key, the outermost first."""
    wrappers = model_options.setdefault("transformer_options", {}).setdefault("wrappers", {})
    return wrappers.setdefault(kind, {})


def put_outermost(model_options: dict, kind: str, key: str, wrapper: Any) -> None:
    """Adds a wrapper around all others of its kind, in the place of one with the same key."""
    wrappers = wrappers_of(model_options, kind)
    others = {other: found for other, found in wrappers.items() if other != key}
    wrappers.clear()
    wrappers |= {key: [wrapper]} | others


NOT_FINITE = (
    "Apply Stages: the sampled latent holds values that are NaN or infinite; the picture will be black or noise. Lower "
    "CFG and strengths, check LoRAs, or load the diffusion model in bf16 or fp32."
)


@contextmanager
def _named(title: str) -> Iterator[None]:
    """Errors of the schedule begin with the node that made the patch: the host shows them on the sampler."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if str(error).startswith(f"{APPLY_STAGES}: "):
            error.args = (titled(str(error), title),)
        raise


@contextmanager
def _checked() -> Iterator[None]:
    """Errors of the checks before a run, which say nothing of a node, begin with one."""
    try:
        yield
    except ValueError as error:
        error.args = (titled(str(error), APPLY_STAGES),)
        raise


def _outer_sample(
    stages: Stages, whole: list[float] | None, node: str | None, title: str, executor: Any, *args: Any, **kwargs: Any
) -> Tensor:
    with _named(title):
        return _staged_sample(stages, whole, node, title, executor, *args, **kwargs)


def _staged_sample(
    stages: Stages, whole: list[float] | None, node: str | None, title: str, executor: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """Wrapper of the guider's `outer_sample`: the run's state is in the options of this run alone."""
    guider, (_, _, sampler, sigmas, *_) = executor.class_obj, args
    module, backbone = dit_of(guider.model_patcher.model), backbone_of(guider.model_patcher)
    with _checked():
        for name, conditions in guider.conds.items():
            check_conditions(guider.model_patcher, stages, conditions, name)
        check_latent(guider.model_patcher, args[0].shape)
        function = getattr(getattr(sampler, "sampler_function", None), "__name__", "").removesuffix("_function")
        model_sampling = guider.model_patcher.get_model_object("model_sampling")
        is_flow = isinstance(model_sampling, comfy.model_sampling.CONST)
        conditions = [*chain.from_iterable(guider.conds.values())]
        referenced = any(map(reference_latents, conditions))
        if not referenced and {key.reference for key in stages.keyframes} not in ({0}, {1}):
            log.warning(titled(NO_REFERENCES, title))
        if referenced and (family := pixel_family(guider.model_patcher)):
            log.warning(titled(PIXEL_REFERENCES, title), family)
        elif referenced and not reads_references(module):
            log.warning(titled(IGNORES_REFERENCES, title), type(module).__name__)
        schedule = RunSchedule.of(stages, conditions)
        check_caches(guider.model_options, schedule.all)
        sigmas = [float(s) for s in sigmas]
        for clock in dict.fromkeys(one.clock for one in schedule.all):
            clock.check_run(function, type(model_sampling).__name__, is_flow)
            message = clock.describe_part(sigmas, whole, float(model_sampling.sigma_max))
            if message:
                log.info(message)
        if schedule.own and (False, True) in stages.variants():
            tokens = prod(grid(args[0].shape, patch_size(module, backbone)))
            check_guidance(schedule, guider.conds.get("positive", ()), sigmas, whole or sigmas, tokens)
    run = StagedRun(schedule, backbone, whole or sigmas, title)
    run.add_variants(guider.conds)
    if (send := editor_of_run()) is not None:
        nodes = [one for one in dict.fromkeys((node, executing_node())) if one is not None]
        progress = RunProgress(lambda: run.moment, lambda said: send(RUN_EVENT, {"nodes": nodes, **said}))
        tokens = prod(grid(args[0].shape, patch_size(module, backbone)))
        progress.begin(sigmas, tokens, model_sampling)
        if len(args) > CALLBACK:
            progress.callback = args[CALLBACK]
            args = (*args[:CALLBACK], progress, *args[CALLBACK + 1 :])
        else:
            progress.callback, kwargs["callback"] = kwargs.get("callback"), progress
    options = guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(options)
    # outside LazyCache, which may leave out what is inside it
    put_outermost(guider.model_options, PREDICT_NOISE, KEY, run.predict_noise)
    # inside all others, so that shapes and options are those that the model gets
    wrappers_of(guider.model_options, APPLY_MODEL)[KEY] = [run.apply_model]
    try:
        found: Tensor = executor(*args, **kwargs)
        if not bool(found.isfinite().all()):
            log.warning(NOT_FINITE)
        return found
    finally:
        guider.model_options = options
        run.free()
