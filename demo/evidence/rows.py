"""What the evidence draws: every row one pair of weights, one schedule, one set of cases. Declared before the family was
trained, but for `again`, declared after the first look at `free` and before its own cases were drawn, and for what was added
before the present family was drawn: `again` of further seeds, and `training` under the paper's thresholds on raw flow time.
The headline is `view` under the paper's thresholds on the resolution-adjusted clock.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from ...dla.ablation import ablate
from ...dla.features import Features
from ...sampling.stages import Stages, preset

SCHEDULES: dict[str, Stages] = {
    "both throughout": preset("both"),
    "MLLM only": preset("mllm_only"),
    "VAE only": preset("vae_only"),
    "staged 0.95 / 0.85": preset("paper"),
    "staged 0.95 / 0.85, resolution-adjusted": preset("paper", "flow_time_resolution"),
}
PAPER = "staged 0.95 / 0.85"
HEADLINE = "staged 0.95 / 0.85, resolution-adjusted"
GRID = {
    f"staged {tau1} / {tau2}": preset("paper", tau1=tau1, tau2=tau2)
    for tau1, tau2 in ((0.9, 0.8), (0.8, 0.6), (0.7, 0.5), (0.6, 0.4), (0.5, 0.3), (0.4, 0.2))
}
AGAIN = ("both throughout", "MLLM only", PAPER, HEADLINE)  # drawn on fresh cases without a named view
HALF = 0.5  # of the set's cases: what twenty minutes on two cores bear
SEEDS = ("demo", "demo-seed1", "demo-seed2")
LAYERS = {"0-2": range(0, 3), "3-5": range(3, 6), "6-8": range(6, 9)}  # the paper's 0-9, 10-19, 20-28 by thirds


def _same(features: Features) -> Features:
    return features


@dataclass(frozen=True)
class Row:
    part: str  # of the page
    name: str
    arm: str
    stages: Stages
    cases: str = "view"
    seed: int = 0
    images: bool = True  # the MLLM reads the references
    share: float = 1.0  # of the set's cases
    change: Callable[[Features], Features] = field(default=_same)

    @property
    def key(self) -> str:
        return re.sub(r"[^\w.]+", "-", f"{self.arm} {self.cases} {self.part} {self.name} {self.seed}")


def _rows() -> list[Row]:
    rows = []
    for seed, arm in enumerate(SEEDS):
        share = HALF if seed else 1.0
        rows += [Row("headline", name, arm, stages, seed=seed, share=share) for name, stages in SCHEDULES.items()]
    rows += [Row("grid", name, "demo", stages, share=HALF) for name, stages in GRID.items()]
    rows += [Row("free", name, "demo", stages, "free") for name, stages in SCHEDULES.items()]
    for seed, arm in enumerate(SEEDS):
        rows += [
            Row("again", name, arm, SCHEDULES[name], "free again", seed, share=HALF if seed else 1.0) for name in AGAIN
        ]
    for arm in ("demo-last", "demo-lap"):
        rows += [Row("pooling", name, arm, SCHEDULES[name], share=HALF) for name in ("MLLM only", HEADLINE)]
    for arm in ("demo-single", "demo-single-both"):
        rows += [
            Row("training", name, arm, SCHEDULES[name], share=HALF) for name in ("both throughout", PAPER, HEADLINE)
        ]
    for modality in ("text", "image"):
        for group, layers in LAYERS.items():
            others = [layer for layer in range(9) if layer not in layers]
            for action, zeroed in (("without", list(layers)), ("only", others)):
                change = _ablation(modality, zeroed)
                rows.append(Row("roles", f"{modality} {action} {group}", "demo", SCHEDULES["MLLM only"], share=0.3, change=change))  # fmt: skip
    for name in ("MLLM only", HEADLINE, "both throughout"):
        rows.append(Row("reasoning", name, "demo", SCHEDULES[name], "reasoning"))
        if name != "MLLM only":
            rows.append(Row("reasoning", name, "demo-text", SCHEDULES[name], "reasoning", images=False))
    return rows


def _ablation(modality: str, layers: list[int]) -> Callable[[Features], Features]:
    return lambda features: ablate(features, **{modality: layers})


ROWS = _rows()
