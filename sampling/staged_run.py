"""One run under a schedule: which variant of each condition and which attention override each model call gets."""

import logging
from math import prod
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from ..loaders.backbones import Backbone, Part
from ..loaders.conditioning import (
    CONTROL,
    Condition,
    area_of,
    reference_latents,
    reference_settings,
    stage_variant,
    with_settings_of,
)
from ..loaders.dit import dit_of
from .attention import KeyStrengthAttention, Regions
from .other_patches import check_applied, counting_added_tokens, own_code, own_prefix_cache, restart_cache
from .reference_stages import Moment, RunSchedule
from .tokens import (
    grid,
    key_strengths,
    patch_size,
    recounted,
    reference_shapes,
    region_log_weight,
    spans,
    token_parts,
    with_added,
)

EVERYTHING_ON = Moment(1.0, 1.0, {}, ())

APPLY_STAGES = "Apply Stages"  # what the messages of a schedule begin with, before `titled`

log = logging.getLogger(__name__)


def titled(text: str, title: str) -> str:
    """A message of a schedule that begins with the display name of the node that has the schedule."""
    return f"{title}: {text.removeprefix(f'{APPLY_STAGES}: ')}"


class StagedRun:
    """State of one run under a schedule: the variants of its conditions, which is on, the overrides made so far.

    Args:
        schedule: The schedule, with those of single references.
        backbone: The record of the DiT's family; None where its token layout is not known.
        sigmas: n + 1 falling values for n steps, of the run or of the whole schedule that it is a part of.
        title: Display name of the node that the run's warnings begin with.
    """

    def __init__(
        self, schedule: RunSchedule, backbone: Backbone | None, sigmas: list[float], title: str = APPLY_STAGES
    ):
        self.schedule, self.backbone, self.sigmas, self._title = schedule, backbone, sigmas, title
        self.variants = schedule.variants()
        self.names: list[str] = []
        self._batch = 1  # pictures
        self._models: list[Any] = []  # of the guider, on each device
        self._guider = ""  # its class
        self._options: dict = {}  # of the guider's model
        self._canvas = (0, 0)  # height and width of the noisy latent
        self.moment = EVERYTHING_ON  # of the last call
        self._stage: tuple | None = None  # its variant and keyframes
        self._conditions: dict[Any, Condition] = {}  # by uuid, as the host prepared them
        self._active: set[Any] = set()  # uuids of the stage's
        self._overrides: dict[tuple, KeyStrengthAttention | None] = {}
        self._warned: set[str] = set()
        if backbone is None and any(not context for context, _ in self.variants):
            self._warn("This model's token layout is unknown: MLLM strength 0 gives one zero token instead of none.")

    def add_variants(self, conds: dict[str, list[Condition]]) -> None:
        """Replaces each named list of conditions by its first variant and adds the others, under names of their own.

        The first keeps the name since the host's control and area code looks for it.
        """
        original = dict(conds)
        self.names = list(original)
        controlled = any(one.get(CONTROL) is not None for found in original.values() for one in found)
        for index, (context, reference) in enumerate(self.variants):
            for name, conditions in original.items():
                conds[_name(name, index)] = [
                    {
                        **stage_variant(condition, context, reference, self.backbone, controlled),
                        "uuid": uuid4() if index else condition["uuid"],
                        "prompt_type": condition.get("prompt_type", name),
                    }
                    for condition in conditions
                ]

    def predict_noise(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: dict, seed: int | None = None
    ) -> Tensor:
        """Wrapper of the guider's `predict_noise`: with the conditions of the stage."""
        guider = executor.class_obj
        if not self._conditions:
            for conditions in guider.conds.values():
                _restore_settings(conditions)
            self._conditions = {c["uuid"]: c for conditions in guider.conds.values() for c in conditions}
        patch = patch_size(dit_of(guider.inner_model), self.backbone)
        # an accelerator has to be waited for to read it
        sigma = self.sigmas[0] if self.schedule.constant else float(timestep.flatten()[0])
        tokens = prod(grid(x.shape, patch))
        self._batch, self._canvas = len(x), (x.shape[-2], x.shape[-1])
        moment = self.schedule.at(sigma, self.sigmas, tokens)
        if moment[:3] != self.moment[:3]:  # with a blend at every step, each with overrides of its own
            self.free()
            self._overrides.clear()
        self.moment = moment
        index = self.variants.index(self.schedule.variant(self.moment))
        stage = index, self.moment.keyframes
        clones = model_options.get("multigpu_clones", {}).values()
        self._models, self._guider = [guider.inner_model, *(c.model for c in clones)], type(guider).__name__
        self._options = model_options
        if self._stage not in (None, stage):
            restart_cache(model_options, self._models)
        self._stage = stage
        all_conds = guider.conds
        guider.conds = {name: all_conds[_name(name, index)] for name in self.names}
        self._active = {c["uuid"] for conditions in guider.conds.values() for c in conditions}
        try:
            return executor(x, timestep, model_options, seed)
        finally:
            guider.conds = all_conds

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: dict | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Wrapper of the host model's `apply_model`: with the attention override that this call needs."""
        options, backbone = dict(transformer_options or {}), self.backbone
        others = set(options.get("uuids", ())) & (self._conditions.keys() - self._active)
        if len(self.variants) > 1 and (others or executor.class_obj not in self._models):
            raise RuntimeError(
                f"Apply Stages: the guider {self._guider} evaluates a condition or a model beside those that ComfyUI's "
                "guiders keep by name, which would stay in the first stage throughout. Use CFGGuider, DualCFGGuider or "
                "KSampler, or the preset both."
            )
        override = None
        if backbone is not None:
            found = {name: one for name, one in inputs.items() if isinstance(one, (list, Tensor))}
            shapes = {name: _shape(one) for name, one in found.items()}
            override = self._override(backbone, x, c_crossattn, shapes, dit_of(executor.class_obj), options)
        if backbone is None or override is None:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **inputs)
        override.applied, override.reached, override.inexact = 0, False, ""
        override.previous = options.get("optimized_attention_override")
        options["optimized_attention_override"] = override
        with own_prefix_cache(override, executor.class_obj), own_code(self._options):
            counting = counting_added_tokens(override, options)
            out = executor(x, t, c_concat, c_crossattn, control, counting, **inputs)
        check_applied(override, backbone, executor.class_obj, options, self._warn)
        if override.inexact:
            self._warn(
                f"Apply Stages: attention of tokens with a strength between 0 and 1, or at soft edges, is computed by "
                f"PyTorch instead of {override.inexact}, which may round strengths away or skip tokens."
            )
        return out

    def _override(
        self, backbone: Backbone, x: Tensor, context: Tensor | None, shapes: dict[str, Any], module: Any, options: dict
    ) -> KeyStrengthAttention | None:
        """The attention override of a call, or None where every key keeps its weight (the host's untouched path)."""
        uuids = tuple(options.get("uuids", ()))
        if not all(uuid in self._conditions for uuid in uuids):
            self._warn("Apply Stages: another extension adds a condition of its own during the run; it has no stages.")
        tokens = 0 if context is None else context.shape[1]
        strengths = (self.moment.context, self.moment.reference, *self.moment.own.values())
        key = (strengths, uuids, x.shape, tokens, tuple(sorted(shapes.items())), x.device)
        if key not in self._overrides:
            parts, count = token_parts(backbone, module, tokens, x.shape, shapes), len(reference_shapes(shapes))
            self._overrides[key] = self._weighted(backbone, parts, count, uuids, x)
        return self._overrides[key]

    def _weighted(
        self, backbone: Backbone, parts: list[Part], count: int, uuids: tuple, x: Tensor
    ) -> KeyStrengthAttention | None:
        """The override for these tokens of a call with `count` references, or None."""
        found = [self._settings(backbone, self._conditions.get(u), parts, count, x.shape) for u in uuids]
        logs, weights = (torch.stack(rows) for rows in zip(*found))
        differ = any(not (rows == rows[0]).all() for rows in (logs, weights))
        if len(x) != len(uuids) * self._batch and differ:
            raise ValueError(
                f"Apply Stages: the model is called with {len(x)} pictures for {len(uuids)} conditions of "
                f"{self._batch}, so another extension computes the picture in tiles and puts several into one "
                "batch; which tile belongs to which condition cannot be known, and their strengths differ. Set its "
                "tile batch size to 1, or remove it."
            )
        if not (logs.any() or weights.any()):
            return None
        placed = [*zip(parts, spans(parts))]
        regions = None
        if weights.any():
            image = next(span for part, span in placed if part.group == "image")
            if backbone.references_in_context:  # its queries have a call of their own
                image = slice(0, image.stop - image.start)
            of = [(part.reference, span) for part, span in placed if part.group == "reference"]
            regions = Regions(image, [span for _, span in of], weights[:, [index for index, _ in of]])
        # without references there is nothing to do in these, and refiners of the image have as many keys
        left_out = [span for part, span in placed if part.joint_only and backbone.contextless_blocks and count]
        seen = [span for part, span in placed if part.joint_only and part.group != "context"]  # by SigLIP
        refined = slice(seen[0].start, seen[-1].stop) if seen and count else None
        if refined and refined.stop == 2 * refined.start:  # the context is refined in calls of as many keys
            self._warn("Apply Stages: there are as many SigLIP as context tokens; SigLIP's refiner has no strengths.")
            refined = None
        return KeyStrengthAttention(
            logs,
            len(x) // len(uuids),
            x.device,
            regions=regions,
            joint_only=slice(left_out[0].start, left_out[-1].stop) if left_out else None,
            refined=refined,
            pieces=[span for _, span in placed] if backbone.references_in_context else [],
            references=[part.tokens for part in parts if part.group == "reference" and not part.joint_only],
            recount=lambda tokens, added: self._weighted(
                backbone, with_added(recounted(parts, tokens), *added), count, uuids, x
            ),
        )

    def _settings(
        self, backbone: Backbone, condition: Condition | None, parts: list[Part], count: int, shape: tuple
    ) -> tuple[Tensor, Tensor]:
        """What one condition asks of a call over a picture of `shape`, with `count` references and these tokens.

        None is one of another extension, without stages.
        Log strengths (keys,), and log weights (references, image tokens) of the regions.
        """
        canvas = self._canvas
        condition, moment = ({}, EVERYTHING_ON) if condition is None else (condition, self.moment)
        area, image = area_of(condition, canvas), next(part.grid for part in parts if part.group == "image")
        strengths, weights = [], torch.zeros(count, prod(image))
        found = reference_settings(condition, count)
        if backbone.frames_apart:
            pairs = zip(reference_latents(condition), found)
            found = [settings for latent, settings in pairs for _ in range(latent.shape[2])]
        for index, settings in enumerate(found[:count]):
            strengths.append((moment.strength(settings), settings.mask))
            if settings.region is None or strengths[-1][0] == 0:
                continue
            if (shape[-2], shape[-1]) != area[:2]:
                raise ValueError(
                    f"Apply Stages: a reference has a region, but the model is called with a latent of {shape[-1]} x "
                    f"{shape[-2]} where the condition covers {area[1]} x {area[0]}: another extension computes the "
                    "picture in tiles, and where a tile is cannot be known. Remove it, or the region."
                )
            weights[index] = region_log_weight(settings.region, canvas, area, image[0], backbone.patch_size)
        return key_strengths(parts, moment.context, strengths), weights

    def free(self) -> None:
        """Frees the host's prefix caches that belong to the overrides."""
        for override in self._overrides.values():
            if override is not None and override.prefix_cache is not None:
                override.prefix_cache.free()
                override.prefix_cache = None

    def _warn(self, text: str) -> None:
        """Into the log, once in a run."""
        if text not in self._warned:
            self._warned.add(text)
            log.warning(titled(text, self._title))


def _shape(one: Any) -> Any:
    """Of a tensor without its batch; a number itself; of a list those of what it holds."""
    if isinstance(one, list):
        return tuple(map(_shape, one))
    return tuple(one.shape[1:]) if isinstance(one, Tensor) else one


def _name(name: str, variant: int) -> str:
    return name if variant == 0 else f"{name} stage {variant}"


def _restore_settings(conditions: list[Condition]) -> None:
    """Gives copies of a condition for another one's area, which the host adds, the settings of the first again.

    The host copies the other condition, and into it what the model reads of the first (`model_conds`).
    """
    first: dict[tuple[int, ...], Condition] = {}
    for index, condition in enumerate(conditions):
        read = tuple(id(part) for part in condition["model_conds"].values())
        if read and read in first:
            conditions[index] = {**with_settings_of(condition, first[read]), "uuid": uuid4()}
        else:
            first[read] = condition
