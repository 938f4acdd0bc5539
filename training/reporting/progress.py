"""What a run reports while it runs and at its end."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, nan
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from .losses import Loss, is_loss, table
from .plots import loss_curve

SHOWN, LEFT_OUT = 100, "left_out.txt"  # problems of the data that are listed, and the file with all of more


@dataclass
class History:
    """What a run has done so far; its checkpoints hold it."""

    name: str  # of the run
    weights: Mapping[tuple[str, str], float]  # (condition, bin) -> share of the training passes that have both
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)  # of the run, in its finished files too
    losses: list[float] = field(default_factory=list)  # of every step
    validation: dict[int, list[Loss]] = field(default_factory=dict)  # by step

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return len(self.losses)

    @property
    def held_out(self) -> dict[int, float]:
        """Held-out loss by step, each bin and condition weighted as often as training meets it."""
        return {
            step: sum(self.weights.get((row.condition, row.bin), 0.0) * row.mean for row in rows)
            for step, rows in sorted(self.validation.items())
        }

    def curve(self) -> Image.Image:
        """Draws training and held-out losses over the steps."""
        return loss_curve(range(1, self.step + 1), self.losses, list(self.held_out.items()), self.name)

    def to_dict(self) -> dict[str, Any]:
        """Returns what `restore` reads, as JSON can hold it."""
        validation = {step: [row.to_dict() for row in rows] for step, rows in self.validation.items()}
        validation = {step: rows for step, rows in validation.items() if all(map(is_loss, rows))}  # JSON has no NaN
        return {"identity": self.identity, "losses": self.losses, "validation": validation}

    def restore(self, values: dict[str, Any]) -> None:
        """Takes over identity, losses and validations from `to_dict`'s values."""
        self.identity, self.losses = values["identity"], values["losses"]
        self.validation = {int(k): [Loss.from_dict(row) for row in rows] for k, rows in values["validation"].items()}


@dataclass
class Progress:
    """What a callback gets after every step, and now and then with a message or an image."""

    history: History
    steps: int  # of the whole run
    seconds: float | None = None  # per step, averaged since this process began; None = a message
    text: str = ""
    picture: Image.Image | None = None

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return self.history.step

    @property
    def line(self) -> str:
        """Step, loss, seconds per step and time left; or step and message."""
        text = f"step {self.step}/{self.steps}"
        if self.seconds is None:
            return text + (":\n" if self.text.startswith("|") else ": ") + self.text  # a table on lines of its own
        seconds = ceil(self.seconds * (self.steps - self.step))
        minutes = ceil(seconds / 60)
        left = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
        left = f", {left if seconds >= 60 else f'{seconds} s'} left"
        return f"{text}, loss {self.history.losses[-1]:.4f}, {self.seconds:.2f} s/step" + left * bool(seconds)


@dataclass
class Result:
    """A finished run."""

    dla: Path
    lora: Path | None
    history: History
    problems: tuple[str, ...]  # a line for each image or entry of the data that was left out

    @property
    def headline(self) -> str:
        """Losses and files, in two lines."""
        losses = self.history.losses
        start, end = (fmean(part) if part else nan for part in (losses[:20], losses[-20:]))
        lines = [f"{len(losses)} steps, loss {start:.4f} at the start, {end:.4f} now"]
        return "\n".join([*lines, f"DLA: {self.dla.name}" + (f", LoRA: {self.lora.name}" if self.lora else "")])

    def text(self) -> str:
        """Returns the run in a few lines, and its last validation table."""
        lines, validation = [self.headline], self.history.validation
        if validation:
            lines += [f"Held out, step {max(validation)}:", table(validation[max(validation)])]
        lines += [f"left out: {problem}" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"left out: {len(self.problems) - SHOWN:,} more, see {LEFT_OUT} in the run's folder")
        return "\n".join(lines)
