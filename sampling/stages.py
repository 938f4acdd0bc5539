"""The stage schedule: pure arithmetic from a point of denoising to the strengths of MLLM and VAE tokens.

Three clocks, and every number says which one it is on:

- `flow_time`: t of the flow-matching path, 1 = noise, 0 = picture; the sigma of a flow model *is* t. The paper's clock.
- `flow_time_resolution`: the same, for thresholds chosen at 4096 image tokens (1024 px) and used at another size.
- `steps`: share of this run's steps that are done, 0 = start, 1 = end.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt

CLOCKS = ("flow_time", "flow_time_resolution", "steps")
BLENDS = ("hold", "linear")
REFERENCE_TOKENS = 4096  # 1024 x 1024 px, 8x VAE, 2x2 patches: the size that the paper's thresholds belong to
TOLERANCE = 1e-5  # sigmas are float32 and some samplers rebuild them through exp(log(sigma))


@dataclass(frozen=True)
class Keyframe:
    """From `start` on (on the schedule's clock), the strengths of the two token groups.

    mllm, vae: 0 removes the group's tokens, 1 leaves the host's path untouched, between (and above) adds ln(strength)
    to the attention logits of the group's keys. blend: "hold" keeps the strengths until the next, "linear" moves
    evenly to the next keyframe's.
    """

    start: float
    mllm: float
    vae: float
    blend: str = "hold"


@dataclass(frozen=True)
class Stages:
    """Keyframes in the order of denoising: falling flow time, rising share of steps. The first holds from the start.

    On the flow clocks a keyframe acts where t < start (the paper's "t >= tau" belongs to the stage before); on `steps`
    where share >= start. Source: multi-stage denoising of the paper; keyframes, blends, other clocks are our choice.
    Raises ValueError naming the keyframe when numbers are out of range or out of order.
    """

    keyframes: tuple[Keyframe, ...]
    clock: str = "flow_time"

    def __post_init__(self):
        if self.clock not in CLOCKS:
            raise ValueError(f"The stage schedule's clock is {self.clock!r}; it must be one of {', '.join(CLOCKS)}.")
        if not self.keyframes:
            raise ValueError("The stage schedule has no keyframe. Choose a preset, or connect a Stage Keyframe.")
        for number, key in enumerate(self.keyframes, 1):
            if not (isfinite(key.start) and 0 <= key.start <= 1):
                raise ValueError(
                    f"Keyframe {number} starts at {key.start}; a start lies between 0 and 1 on every clock."
                )
            for name in ("mllm", "vae"):
                value = getattr(key, name)
                if not (isfinite(value) and value >= 0):
                    raise ValueError(
                        f"Keyframe {number} has {name} strength {value}; a strength is a finite number >= 0."
                    )
            if key.blend not in BLENDS:
                raise ValueError(f"Keyframe {number} blends by {key.blend!r}; it must be one of {', '.join(BLENDS)}.")
        for number, (before, after) in enumerate(zip(self.keyframes, self.keyframes[1:]), 2):
            if self._order(after.start) <= self._order(before.start):
                raise ValueError(
                    f"Stages out of order: keyframe {number} starts at {after.start:g}, after one that starts at "
                    f"{before.start:g}. On the clock {self.clock!r} starts must "
                    + (
                        "rise from 0 (first step) to 1 (last)"
                        if self.clock == "steps"
                        else "fall from 1 (noise) to 0 (picture)"
                    )
                    + ". Swap the values, or change the clock; the paper's 0.95 / 0.85 are flow times."
                )

    def _order(self, start: float) -> float:
        """Starts as a rising sequence on every clock."""
        return start if self.clock == "steps" else -start

    @property
    def needs_steps(self) -> bool:
        """Whether the sampler must say how many steps it takes."""
        return self.clock == "steps"

    def starts(self, tokens: int = REFERENCE_TOKENS) -> list[float]:
        """The keyframes' starts, moved to `tokens` noisy image tokens on the resolution-adjusted clock."""
        if self.clock != "flow_time_resolution":
            return [key.start for key in self.keyframes]
        return [adjust_to_resolution(key.start, tokens) for key in self.keyframes]

    def strengths(self, position: float, tokens: int = REFERENCE_TOKENS) -> tuple[float, float]:
        """(mllm, vae) at `position` on the schedule's clock."""
        starts = [self._order(start) for start in self.starts(tokens)]
        place = self._order(position)
        # a flow-time threshold itself belongs to the stage before it, a share of steps to the stage that it starts
        place += TOLERANCE if self.clock == "steps" else -TOLERANCE
        index = max(bisect_right(starts, place) - 1, 0)
        key = self.keyframes[index]
        if key.blend == "hold" or index + 1 == len(self.keyframes):
            return key.mllm, key.vae
        after = self.keyframes[index + 1]
        share = (self._order(position) - starts[index]) / (starts[index + 1] - starts[index])
        share = min(max(share, 0.0), 1.0)
        return key.mllm + share * (after.mllm - key.mllm), key.vae + share * (after.vae - key.vae)

    def position(self, sigma: float, sigmas: Sequence[float]) -> float:
        """Where a model call at `sigma` (flow time) stands on this clock, in a run over `sigmas`."""
        return share_of_steps(sigma, sigmas) if self.needs_steps else sigma

    def at_sigma(self, sigma: float, sigmas: Sequence[float], tokens: int = REFERENCE_TOKENS) -> tuple[float, float]:
        """(mllm, vae) for a model call at `sigma`: a function of sigma alone, so that every sampler switches alike."""
        return self.strengths(self.position(sigma, sigmas), tokens)

    def switched_on(self) -> list[tuple[bool, bool]]:
        """Every (MLLM tokens present, VAE tokens present) that the schedule needs, in order, without repeats."""
        needed = {}
        for number, key in enumerate(self.keyframes):
            needed[key.mllm > 0, key.vae > 0] = None
            if key.blend == "linear" and number + 1 < len(self.keyframes):
                after = self.keyframes[number + 1]
                needed[max(key.mllm, after.mllm) > 0, max(key.vae, after.vae) > 0] = None
        return list(needed)


def adjust_to_resolution(t: float, tokens: int) -> float:
    """Moves a flow time chosen at 4096 image tokens to one with the same signal-to-noise ratio per picture at `tokens`.

    t / (a - (a - 1) t) with a = sqrt(4096 / tokens): flow matching's own resolution shift, inverted. A heuristic of
    this project (one match so far), not the paper's.
    """
    alpha = sqrt(REFERENCE_TOKENS / max(tokens, 1))
    return t / (alpha - (alpha - 1) * t)


def share_of_steps(sigma: float, sigmas: Sequence[float]) -> float:
    """Share of steps done before the step that `sigma` falls in; sigmas fall, the last one ends the last step."""
    steps = max(len(sigmas) - 1, 1)
    reached = sum(1 for s in sigmas[:-1] if sigma <= s * (1 + TOLERANCE))
    return max(reached - 1, 0) / steps


@dataclass(frozen=True)
class PlannedStep:
    """What one step of a run gets. sigma: flow time of its first model call; share: steps done before it."""

    step: int
    sigma: float
    share: float
    mllm: float
    vae: float


def plan(stages: Stages, sigmas: Iterable[float], tokens: int = REFERENCE_TOKENS) -> list[PlannedStep]:
    """The strengths of every step of a run over `sigmas` (n + 1 falling values for n steps)."""
    sigmas = [float(s) for s in sigmas]
    return [
        PlannedStep(step, sigma, share_of_steps(sigma, sigmas), *stages.at_sigma(sigma, sigmas, tokens))
        for step, sigma in enumerate(sigmas[:-1])
    ]


def keyframes_for(preset: str, tau1: float, tau2: float) -> tuple[Keyframe, ...]:
    mllm, both, vae = (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)
    return {
        "paper": (Keyframe(0, *mllm), Keyframe(tau1, *both), Keyframe(tau2, *vae)),
        "semantics_first": (Keyframe(0, *mllm), Keyframe(tau1, *both)),
        "two_stage": (Keyframe(0, *mllm), Keyframe(tau1, *vae)),
        "mllm_only": (Keyframe(0, *mllm),),
        "vae_only": (Keyframe(0, *vae),),
        "both": (Keyframe(0, *both),),
    }[preset]


PRESETS = {
    "paper": "MLLM only until tau1, both until tau2, then VAE only. Needs weights trained on each condition alone.",
    "semantics_first": "MLLM only until tau1, then both to the end. For stock models, not trained on VAE tokens alone.",
    "two_stage": "MLLM only until tau1, then VAE only. Needs weights trained on each condition alone.",
    "mllm_only": "No VAE tokens. For prompts that need reasoning, and for a picture free of the reference's framing.",
    "vae_only": "No MLLM tokens. What the references alone do; mostly for comparison.",
    "both": "Both throughout: the host's own behaviour, bit for bit.",
}


def preset(name: str, clock: str = "flow_time", tau1: float = 0.95, tau2: float = 0.85) -> Stages:
    """A named schedule; tau1 and tau2 are positions on `clock` (paper: flow times 0.95 and 0.85)."""
    if name not in PRESETS:
        raise ValueError(f"Unknown stage preset {name!r}; there are {', '.join(PRESETS)}.")
    first, *rest = keyframes_for(name, tau1, tau2)
    beginning = Keyframe(0.0 if clock == "steps" else 1.0, first.mllm, first.vae)
    return Stages((beginning, *rest), clock)
