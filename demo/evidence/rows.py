"""What the evidence draws: every row is one pair of weights, one schedule and one set of cases.

All was declared before the family was trained, except: `again`, declared after the first look at `free` and before its
own cases were drawn; and, before the present family was drawn, `again` of further seeds and `training` under the
paper's thresholds on raw flow time. The headline is `view` under the paper's thresholds on the resolution-adjusted
clock.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ...dla.ablation import ablate
from ...dla.features import Features
from ...sampling.stages import Stages, preset

BOTH, MLLM, VAE = "both throughout", "MLLM only", "VAE only"
PAPER = "staged 0.95 / 0.85"
HEADLINE = "staged 0.95 / 0.85, resolution-adjusted"
SCHEDULES: dict[str, Stages] = {
    BOTH: preset("both"),
    MLLM: preset("mllm_only"),
    VAE: preset("vae_only"),
    PAPER: preset("paper"),
    HEADLINE: preset("paper", "flow_time_resolution"),
}
GRID = {
    f"staged {tau1} / {tau2}": preset("paper", tau1=tau1, tau2=tau2)
    for tau1, tau2 in ((0.9, 0.8), (0.8, 0.6), (0.7, 0.5), (0.6, 0.4), (0.5, 0.3), (0.4, 0.2))
}
AGAIN = (BOTH, MLLM, PAPER, HEADLINE)  # drawn on fresh cases without a named view
HALF = 0.5  # share of the set's cases that fits into twenty minutes on two cores
SEEDS = ("demo", "demo-seed1", "demo-seed2")
LAYERS = {"0-2": range(0, 3), "3-5": range(3, 6), "6-8": range(6, 9)}  # the paper's 0-9, 10-19, 20-28 by thirds


def _unchanged(features: Features) -> Features:
    return features


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        part: The part of the page that it belongs to.
        name: Its name in the table.
        arm: The pair of DLA and LoRA.
        stages: The schedule.
        cases: The set of cases (data.TEST).
        seed: Of the noise.
        images: Whether the MLLM reads the references.
        share: Of the set's cases, the first ones.
        change: Applied to the MLLM's features, before the DLA.
    """

    part: str
    name: str
    arm: str
    stages: Stages
    cases: str = "view"
    seed: int = 0
    images: bool = True
    share: float = 1.0
    change: Callable[[Features], Features] = field(default=_unchanged)

    @property
    def key(self) -> str:
        """The row's name in files."""
        return re.sub(r"[^\w.]+", "-", f"{self.arm} {self.cases} {self.part} {self.name} {self.seed}")


def _rows() -> list[Row]:
    rows = []
    seeds = [(seed, arm, HALF if seed else 1.0) for seed, arm in enumerate(SEEDS)]
    for seed, arm, share in seeds:
        rows += [Row("headline", name, arm, stages, seed=seed, share=share) for name, stages in SCHEDULES.items()]
    rows += [Row("grid", name, "demo", stages, share=HALF) for name, stages in GRID.items()]
    rows += [Row("free", name, "demo", stages, "free") for name, stages in SCHEDULES.items()]
    for seed, arm, share in seeds:
        rows += [Row("again", name, arm, SCHEDULES[name], "free again", seed, share=share) for name in AGAIN]
    for arm in ("demo-last", "demo-lap"):
        rows += [Row("pooling", name, arm, SCHEDULES[name], share=HALF) for name in (MLLM, HEADLINE)]
    for arm in ("demo-single", "demo-single-both"):
        rows += [Row("training", name, arm, SCHEDULES[name], share=HALF) for name in (BOTH, PAPER, HEADLINE)]
    for modality in ("text", "image"):
        for group, layers in LAYERS.items():
            others = [layer for layer in range(9) if layer not in layers]
            for action, zeroed in (("without", list(layers)), ("only", others)):
                name, change = f"{modality} {action} {group}", partial(ablate, **{modality: zeroed})
                rows.append(Row("roles", name, "demo", SCHEDULES[MLLM], share=0.3, change=change))
    rows += [Row("reasoning", name, "demo", SCHEDULES[name], "reasoning") for name in (MLLM, HEADLINE, BOTH)]
    for name in (HEADLINE, BOTH):
        rows.append(Row("reasoning", name, "demo-text", SCHEDULES[name], "reasoning", images=False))
    return rows


ROWS = _rows()
