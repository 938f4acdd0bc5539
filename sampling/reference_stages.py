"""The run's schedule together with the schedules of single references, which are multiplied into it.

A reference that its own schedule switches off keeps its latent, and with it every reference's position, while others
are on: attention takes its keys out. This is the run without it where the positions of the picture and of the other
references do not depend on it (the last reference on FLUX.1, FLUX.2 and Qwen-Image; none on OmniGen2 and Qwen-Image
2.1). Where all are off, their latents are left out: the run without references, bit for bit. So a run has four variants
of its conditions at most, whatever the number of schedules.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..loaders.conditioning import Condition, ReferenceSettings, reference_latents, reference_settings
from .stages import Stages


class Moment(NamedTuple):
    """The strengths at one point of a run, and the keyframe of each schedule that holds there."""

    context: float
    reference: float  # the run's
    own: dict[Stages, float]  # of each schedule of a reference
    keyframes: tuple[int, ...]

    def strength(self, settings: ReferenceSettings) -> float:
        """Of a reference."""
        return self.reference * settings.strength * self.own.get(settings.stages, 1.0)


@dataclass(frozen=True)
class RunSchedule:
    """The run's schedule, and those of the references of its conditions, each once."""

    stages: Stages
    own: tuple[Stages, ...]
    always: bool  # whether a reference has no schedule of its own, so that all are never off at once by theirs

    @classmethod
    def of(cls, stages: Stages, conditions: Iterable[Condition]) -> "RunSchedule":
        """The schedule of a run over all these conditions."""
        found = [s for c in conditions for s in reference_settings(c, len(reference_latents(c))) if s.strength > 0]
        own = dict.fromkeys(s.stages for s in found if s.stages is not None)
        return cls(stages, tuple(own), not own or any(s.stages is None for s in found))

    @property
    def all(self) -> tuple[Stages, ...]:
        """Every schedule."""
        return self.stages, *self.own

    @property
    def constant(self) -> bool:
        """Whether nothing changes during the run."""
        return all(len(stages.keyframes) == 1 for stages in self.all)

    def variants(self) -> list[tuple[bool, bool]]:
        """Every (context tokens present, reference tokens present) that the schedules need, in order, once each."""
        keyframes = [[key.reference > 0 for key in stages.keyframes] for stages in self.own]
        some_on = self.always or any(any(on) for on in keyframes)
        all_off = not self.always and all(not all(on) for on in keyframes)
        states = [True] * some_on + [False] * all_off
        return list(dict.fromkeys((c, r and state) for c, r in self.stages.variants() for state in states))

    def at(self, sigma: float, sigmas: Sequence[float], tokens: int) -> Moment:
        """The strengths of a model call.

        Args:
            sigma: Of the call.
            sigmas: n + 1 falling values for n steps, of the run or of the whole schedule that it is a part of.
            tokens: Noisy image tokens.
        """
        positions = [(stages, stages.clock.position(sigma, sigmas)) for stages in self.all]
        (context, reference), *own = (stages.strengths(position, tokens) for stages, position in positions)
        keyframes = tuple(stages.keyframe_at(position, tokens) for stages, position in positions)
        return Moment(context, reference, dict(zip(self.own, (s for _, s in own))), keyframes)

    def variant(self, moment: Moment) -> tuple[bool, bool]:
        """Which groups are present at a moment."""
        on = self.always or any(moment.own[stages] > 0 for stages in self.own)
        return moment.context > 0, moment.reference > 0 and on
