"""What a run tells as it goes and at its end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from .losses import Loss, table


@dataclass
class Progress:
    """What a listener hears after every step, and now and then with a picture."""

    step: int
    steps: int
    loss: float | None = None
    text: str = ""
    picture: Image.Image | None = None


@dataclass
class Result:
    dla: Path
    lora: Path | None
    step: int
    losses: list[float]  # of every step since the run began
    validation: dict[int, list[Loss]]  # by step
    held_out: dict[int, float]  # by step, as comparable with the training loss
    problems: tuple[str, ...]
    curve: Image.Image = field(repr=False)

    def text(self) -> str:
        """The run in a few lines and its last table."""
        lines = [
            f"{self.step} steps, loss {mean(self.losses[:20]):.4f} at the start, {mean(self.losses[-20:]):.4f} now"
        ]
        lines.append(f"DLA: {self.dla.name}" + (f", LoRA: {self.lora.name}" if self.lora else ""))
        if self.validation:
            last = max(self.validation)
            lines += [f"Held out, step {last}:", table(self.validation[last])]
        return "\n".join([*lines, *(f"left out: {problem}" for problem in self.problems)])


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan
