"""The stage schedule: pure arithmetic from a point of denoising to the strengths of the two token groups.

The groups are `context` (the MLLM's or text encoder's tokens, called MLLM tokens in the editor) and `reference` (the
reference latents' tokens, called VAE tokens there).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

from .clock import FLOW_TIME, REFERENCE_TOKENS, Clock, clock_named

BLENDS = ("hold", "linear")
MOST_KEYFRAMES = 256  # of a schedule; a run has some tens of steps


@dataclass(frozen=True)
class Keyframe:
    """From `start` on, the strengths of the two token groups.

    0 removes a group's tokens, 1 leaves the host's path untouched, between (and above) adds ln(strength) to the
    attention logits of the group's keys.
    """

    start: float  # position on the schedule's clock
    context: float
    reference: float
    blend: str = "hold"  # "hold": until the next keyframe; "linear": evenly to the next keyframe's strengths


@dataclass(frozen=True, init=False)
class Stages:
    """Keyframes in the order of denoising; the first holds from the beginning, wherever it starts.

    Source: multi-stage denoising of the paper; keyframes, blends and the clocks but flow time are our choice.
    """

    keyframes: tuple[Keyframe, ...]
    clock: Clock

    def __init__(self, keyframes: Iterable[Keyframe], clock: str | Clock = FLOW_TIME):
        object.__setattr__(self, "keyframes", tuple(keyframes))
        object.__setattr__(self, "clock", clock_named(clock))
        self._check()

    def _check(self) -> None:
        """Raises ValueError naming the keyframe whose numbers are out of range or out of order."""
        if not self.keyframes:
            raise ValueError("The stage schedule has no keyframe. Choose a preset, or connect a Stage Keyframe.")
        if len(self.keyframes) > MOST_KEYFRAMES:
            raise ValueError(
                f"The stage schedule has {len(self.keyframes)} keyframes, expected at most {MOST_KEYFRAMES}. Take some"
                " out; one that blends linearly makes a whole slope."
            )
        for number, key in enumerate(self.keyframes, 1):
            if not (isfinite(key.start) and 0 <= key.start <= 1):
                raise ValueError(f"Keyframe {number} starts at {key.start}; a start is between 0 and 1 on every clock.")
            for name, value in (("mllm_strength", key.context), ("vae_strength", key.reference)):
                if not (isfinite(value) and value >= 0):
                    raise ValueError(f"Keyframe {number} has {name} {value}, expected a finite number >= 0.")
            if key.blend not in BLENDS:
                raise ValueError(
                    f"Keyframe {number} blends by {key.blend!r:.100}; it must be one of {', '.join(BLENDS)}."
                )
        for number, (before, after) in enumerate(zip(self.keyframes, self.keyframes[1:]), 2):
            if self.clock.order(after.start) <= self.clock.order(before.start):
                raise ValueError(
                    f"Stages out of order: keyframe {number} starts at {after.start:g}, after one that starts at "
                    f"{before.start:g}. On the clock {self.clock.name!r} starts must {self.clock.direction}, each "
                    f"{self.clock.later} the one before; in a preset, tau1 starts keyframe 2 and tau2 keyframe 3. "
                    "Change the values or the clock; the paper's 0.95 / 0.85 are flow times."
                )

    def starts(self, tokens: int = REFERENCE_TOKENS) -> list[float]:
        """The keyframes' starts in a run over `tokens` noisy image tokens."""
        return [self.clock.adjust(key.start, tokens) for key in self.keyframes]

    def keyframe_at(self, position: float, tokens: int = REFERENCE_TOKENS) -> int:
        """Index of the keyframe that holds at `position` on the schedule's clock."""
        return max(sum(self.clock.reached(position, start) for start in self.starts(tokens)) - 1, 0)

    def strengths(self, position: float, tokens: int = REFERENCE_TOKENS) -> tuple[float, float]:
        """(context, reference) at `position` on the schedule's clock, in a run over `tokens` noisy image tokens."""
        index = self.keyframe_at(position, tokens)
        key = self.keyframes[index]
        if key.blend == "hold" or index + 1 == len(self.keyframes):
            return key.context, key.reference
        starts, after = self.starts(tokens), self.keyframes[index + 1]
        share = (position - starts[index]) / (starts[index + 1] - starts[index])
        share = min(1.0, max(0.0, share))  # 0 for NaN, which some samplers make of rising sigmas
        return (
            key.context + share * (after.context - key.context),
            key.reference + share * (after.reference - key.reference),
        )

    def variants(self) -> list[tuple[bool, bool]]:
        """Every (context tokens present, reference tokens present) that the schedule needs, in order, once each."""
        needed: dict[tuple[bool, bool], None] = {}
        for key, after in zip(self.keyframes, (*self.keyframes[1:], self.keyframes[-1])):
            needed[key.context > 0, key.reference > 0] = None
            if key.blend == "linear":
                needed[max(key.context, after.context) > 0, max(key.reference, after.reference) > 0] = None
        return list(needed)


def with_keyframe(previous: Stages | None, keyframe: Keyframe, clock: str | Clock) -> Stages:
    """`previous` with one more keyframe. Raises ValueError where `clock` is not the clock of `previous`."""
    clock = clock_named(clock)
    if previous is not None and previous.clock != clock:
        raise ValueError(
            f"Stage Keyframe: clock is {clock.name!r}, but the schedule before it counts in {previous.clock.name!r}. "
            "Set every keyframe of a chain to the same clock."
        )
    return Stages((*(previous.keyframes if previous else ()), keyframe), clock)


class PlannedStep(NamedTuple):
    """The strengths of one step of a run, and where its first model call is."""

    step: int
    sigma: float
    position: float  # on the schedule's clock
    context: float
    reference: float


def plan(
    stages: Stages, sigmas: Iterable[float], tokens: int = REFERENCE_TOKENS, whole: Sequence[float] | None = None
) -> list[PlannedStep]:
    """The strengths of every step of a run over `sigmas` (n + 1 falling values for n steps), or a part of `whole`."""
    sigmas = [float(s) for s in sigmas]
    positions = [stages.clock.position(sigma, whole or sigmas) for sigma in sigmas[:-1]]
    return [
        PlannedStep(step, sigmas[step], position, *stages.strengths(position, tokens))
        for step, position in enumerate(positions)
    ]


class Preset(NamedTuple):
    """Strengths (context, reference) from the start, from tau1 and from tau2 on, as far as the preset reads them."""

    description: str
    strengths: tuple[tuple[float, float], ...]


_MLLM, _BOTH, _VAE = (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)
PRESETS = {
    "paper": Preset(
        "MLLM only until tau1, both until tau2, then VAE only. Needs weights trained on each condition alone.",
        (_MLLM, _BOTH, _VAE),
    ),
    "semantics_first": Preset(
        "MLLM only until tau1, then both to the end. For stock models, not trained on VAE tokens alone.", (_MLLM, _BOTH)
    ),
    "two_stage": Preset(
        "MLLM only until tau1, then VAE only. Needs weights trained on each condition alone.", (_MLLM, _VAE)
    ),
    "mllm_only": Preset(
        "No VAE tokens. For prompts that need reasoning, and for a picture free of the reference's framing.", (_MLLM,)
    ),
    "vae_only": Preset("No MLLM tokens. What the references alone do; mostly for comparison.", (_VAE,)),
    "both": Preset("Both throughout: the host's own behaviour, bit for bit.", (_BOTH,)),
}


def preset(name: str, clock: str | Clock = FLOW_TIME, tau1: float = 0.95, tau2: float = 0.85) -> Stages:
    """A schedule by name. Its thresholds are positions on `clock`, where the first and the second stage end.

    Equal thresholds mean an empty middle stage. Raises ValueError for thresholds out of range or out of order.

    Source of the defaults: the paper's flow times.
    """
    if name not in PRESETS:
        raise ValueError(f"Unknown stage preset {name!r:.100}; there are {', '.join(PRESETS)}.")
    clock, strengths = clock_named(clock), PRESETS[name].strengths
    for threshold, value in (("tau1", tau1), ("tau2", tau2))[: len(strengths) - 1]:
        if not 0 <= value <= 1:
            raise ValueError(
                f"{threshold} is {value:g}, expected a position between 0 and 1 on the clock {clock.name}."
            )
    if len(strengths) > 2 and clock.order(tau2) < clock.order(tau1):
        raise ValueError(
            f"Stages out of order: tau1 is {tau1:g} and tau2 {tau2:g}. On the clock {clock.name!r} positions"
            f" {clock.direction}, so that tau2 must be {clock.later} tau1 (equal: no middle stage). Change them or the"
            " clock; the paper's 0.95 / 0.85 are flow times."
        )
    if len(strengths) > 1 and tau1 == clock.start:
        raise ValueError(
            f"tau1 is {tau1:g}, where the clock {clock.name!r} begins: the first stage of {name} has no step."
            f" Set it {clock.later} {clock.start:g}, or choose a preset without that stage (vae_only, both)."
        )
    frames = [Keyframe(at, *on) for at, on in zip((clock.start, tau1, tau2), strengths)]
    if len(frames) > 2 and tau1 == tau2:
        del frames[1]
    return Stages(frames, clock)


def flow_time_on_steps(name: str, clock: str, tau1: float) -> str:
    """A warning where tau1 on the clock steps looks like a flow time: nearly the whole run has no references."""
    if clock != "steps" or len(PRESETS[name].strengths) < 2 or tau1 < 0.8:
        return ""
    return (
        f"tau1 is {tau1:g} on the clock steps: references come in after {tau1:.0%} of the steps. The paper's 0.95 is a"
        " flow time; on the clock steps begin with 0.2, or choose the clock flow_time."
    )
