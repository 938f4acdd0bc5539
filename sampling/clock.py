"""The clocks that a stage schedule counts on, an object each: every number of a schedule is a position on one."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

REFERENCE_TOKENS = 4096  # 1024 x 1024 px, 8x VAE, 2x2 patches: the size that the paper's thresholds belong to
TOLERANCE = 1e-5  # sigmas are float32 and some samplers rebuild them through exp(log(sigma))
WHOLE = 0.02  # a run whose first sigma is this near to the model's highest begins at pure noise; schedulers differ
OWN_STEPS = ("dpm_adaptive", "dpm_fast")  # samplers that choose their own steps, whatever the sigmas say


@dataclass(frozen=True)
class Clock:
    """Where in denoising a model call is, as one number; this class is flow time, t of the flow-matching path.

    Source: the paper's clock, its thresholds closed above ("t >= tau" is the stage before).
    """

    name: str  # key in the API and in saved workflows
    start: float  # position of a run's beginning
    end: float
    threshold_starts_stage: bool  # a threshold itself belongs to the stage that it starts, else to the one before
    direction: str  # how positions run, for errors
    tooltip: str  # what the clock counts, for the editor

    def order(self, position: float) -> float:
        """A number that rises during denoising on every clock."""
        return position if self.end > self.start else -position

    @property
    def later(self) -> str:
        """Where later positions are, for errors."""
        return "above" if self.end > self.start else "below"

    def reached(self, position: float, threshold: float) -> bool:
        """Whether a model call at `position` comes after `threshold`."""
        margin = TOLERANCE if self.threshold_starts_stage else -TOLERANCE
        return self.order(threshold) <= self.order(position) + margin

    def adjust(self, threshold: float, tokens: int) -> float:
        """`threshold` for a run over `tokens` noisy image tokens."""
        return threshold

    def describe(self, tokens: int) -> str:
        """The name, and what else positions depend on in a run over `tokens` noisy image tokens."""
        return self.name

    def position(self, sigma: float, sigmas: Sequence[float]) -> float:
        """Position of a model call at `sigma` in a run over `sigmas` (n + 1 falling values for n steps)."""
        return sigma

    def check_run(self, sampler: str, model_sampling: str, is_flow: bool) -> None:
        """Raises ValueError where a run gives this clock no position.

        Args:
            sampler: Name of the sampler function, such as `dpm_adaptive`.
            model_sampling: Name of the class that says what a sigma of the model means.
            is_flow: Whether the model is a flow-matching one, so that its sigma is the flow time.
        """
        if not is_flow:
            raise ValueError(
                f"The stage schedule is on flow time, but this model is no flow-matching model ({model_sampling})."
                " Use the clock steps."
            )

    def describe_part(self, sigmas: Sequence[float], whole: Sequence[float] | None, sigma_max: float) -> str:
        """What positions count in a run over `sigmas` that is a part of a schedule; "" where nothing needs to be said.

        Args:
            sigmas: The run's.
            whole: The schedule that it is a part of, as far as the user gave it.
            sigma_max: The model's noise level of pure noise.

        Raises:
            ValueError: Where the run is no part of `whole`.
        """
        return ""


class ResolutionFlowTime(Clock):
    """Flow time with thresholds that were chosen at 4096 image tokens and are moved to the size of the run."""

    def adjust(self, threshold: float, tokens: int) -> float:
        """The flow time with the same signal-to-noise ratio per picture at `tokens` image tokens.

        t / (a - (a - 1) t) with a = sqrt(4096 / tokens): flow matching's own resolution shift, inverted.
        Source: a heuristic of this project (one match so far), not the paper's.
        """
        alpha = sqrt(REFERENCE_TOKENS / max(tokens, 1))
        return threshold / (alpha - (alpha - 1) * threshold)

    def describe(self, tokens: int) -> str:
        """The name and the tokens."""
        return f"{self.name}, {tokens} image tokens"


class StepShare(Clock):
    """Share of a run's steps that are done."""

    def position(self, sigma: float, sigmas: Sequence[float]) -> float:
        """Share of steps done before the step that `sigma` falls in; the last of `sigmas` ends the last step.

        `sigmas` may rise, as where a picture is turned into noise.
        """
        if sigmas[0] < sigmas[-1]:
            reached = sum(1 for s in sigmas[:-1] if sigma >= s * (1 - TOLERANCE))
        else:
            reached = sum(1 for s in sigmas[:-1] if sigma <= s * (1 + TOLERANCE))
        return max(reached - 1, 0) / max(len(sigmas) - 1, 1)

    def check_run(self, sampler: str, model_sampling: str, is_flow: bool) -> None:
        """Refuses samplers whose steps are not the schedule's."""
        if sampler in OWN_STEPS:
            raise ValueError(
                f"The stage schedule counts steps, but the sampler {sampler} chooses its own."
                " Use the clock flow_time, or another sampler."
            )

    def describe_part(self, sigmas: Sequence[float], whole: Sequence[float] | None, sigma_max: float) -> str:
        """See `Clock.describe_part`; steps are the only clock that depends on where the run begins and ends."""
        if not sigmas:
            return ""
        run = f"{len(sigmas) - 1} steps of this run, from sigma {sigmas[0]:.4g} to {sigmas[-1]:.4g}"
        if whole is not None:
            if max(sigmas) > max(whole) * (1 + WHOLE) or min(sigmas) < min(whole) * (1 - WHOLE):
                raise ValueError(
                    f"Apply Stages: its sigmas run from {whole[0]:.4g} to {whole[-1]:.4g}, but the sampler runs "
                    f"{run}. Connect the whole schedule that the run is a part of, or nothing."
                )
            return f"The clock steps counts the {len(whole) - 1} steps of the sigmas given; here are the {run}."
        if sigmas[-1] > 0 or sigmas[0] < sigma_max * (1 - WHOLE):
            return (
                f"The clock steps counts the {run}, as the whole. If it is a part of a longer schedule (KSampler "
                "Advanced, SplitSigmas), connect that schedule to the input sigmas of Apply Stages."
            )
        return ""


FLOW_TIME = Clock(
    "flow_time", 1.0, 0.0, False, "fall from 1 (noise) to 0 (picture)",
    "the paper's, 1 is pure noise and 0 the picture.",
)  # fmt: skip
FLOW_TIME_RESOLUTION = ResolutionFlowTime(
    "flow_time_resolution", 1.0, 0.0, False, FLOW_TIME.direction,
    "flow time adjusted to the picture's token count, so that thresholds meant for 1024 px hold at other sizes.",
)  # fmt: skip
STEPS = StepShare(
    "steps", 0.0, 1.0, True, "rise from 0 (first step) to 1 (last)",
    "share of the sampler's steps, 0 is the first and 1 the end.",
)  # fmt: skip
CLOCKS: dict[str, Clock] = {clock.name: clock for clock in (FLOW_TIME, FLOW_TIME_RESOLUTION, STEPS)}


def clock_named(clock: str | Clock) -> Clock:
    """The clock of a name; a clock is returned as it is. Raises ValueError for another name."""
    if isinstance(clock, Clock):
        return clock
    if clock not in CLOCKS:
        raise ValueError(f"The stage schedule's clock is {clock!r:.100}; it must be one of {', '.join(CLOCKS)}.")
    return CLOCKS[clock]
