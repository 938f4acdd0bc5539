"""Validation losses as text and as a file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from math import sqrt
from pathlib import Path

from ...common.files import replacing
from ...common.markdown import markdown

ALL = "all"  # the stage that stands for all flow times together
CONDITIONS = {"mllm": "MLLM only", "vae": "VAE only", "both": "both"}


@dataclass(frozen=True)
class Loss:
    """Held-out flow-matching loss of one condition over one range of flow times."""

    condition: str  # "mllm" | "vae" | "both": what the model was given
    stage: str  # name of the range of flow times, e.g. "t >= 0.95"; "all" = every flow time
    mean: float
    low: float  # 95 % interval of the mean
    high: float
    samples: int


COLUMNS = ("step", *(field.name for field in fields(Loss)))


def with_all(rows: Sequence[Loss]) -> list[Loss]:
    """`rows`, and for each condition without one a row of stage "all": the stages' mean weighted by their samples.

    Its interval takes the stages' means to be independent, as in stratified sampling.
    """
    out = list(rows)
    for condition in _ordered(row.condition for row in rows):
        parts = [row for row in rows if row.condition == condition]
        if any(row.stage == ALL for row in parts):
            continue
        total = sum(row.samples for row in parts)
        shares = [row.samples / total if total else 1 / len(parts) for row in parts]
        mean = sum(share * row.mean for share, row in zip(shares, parts))
        below, above = (
            sqrt(sum((share * (row.mean - bound)) ** 2 for share, row, bound in zip(shares, parts, bounds)))
            for bounds in ([row.low for row in parts], [row.high for row in parts])
        )
        out.append(Loss(condition, ALL, mean, mean - below, mean + above, total))
    return out


def conditions(rows: Sequence[Loss]) -> list[str]:
    """The conditions in `rows`: MLLM, VAE, both, then any others as they come."""
    found = _ordered(row.condition for row in rows)
    return [name for name in CONDITIONS if name in found] + [name for name in found if name not in CONDITIONS]


def stages(rows: Sequence[Loss]) -> list[str]:
    """The stages in `rows` as they come, "all" at the end."""
    found = _ordered(row.stage for row in rows)
    return [name for name in found if name != ALL] + [ALL] * (ALL in found)


def table(rows: Sequence[Loss]) -> str:
    """Markdown, columns aligned: a line per condition, a column per stage and one for all; mean and interval."""
    rows = with_all(rows)
    cells = {(row.condition, row.stage): f"{row.mean:.4f} ({row.low:.4f} to {row.high:.4f})" for row in rows}
    columns = stages(rows)
    lines = [["held-out loss", *columns]]
    for condition in conditions(rows):
        lines.append([CONDITIONS.get(condition, condition), *(cells.get((condition, s), "") for s in columns)])
    return markdown(lines)


def write_table(path: Path, step: int, rows: Sequence[Loss]) -> None:
    """Puts the losses of a training step into a CSV file (step, condition, stage, mean, low, high, samples).

    Lines of the same step are replaced, so that a resumed run does not repeat itself. The file is the old one or the
    new one at any moment. Raises ValueError, and leaves it alone, if it is not such a table.
    """
    history = read_table(path) if path.exists() else {}
    history[step] = list(rows)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((step, *astuple(row)) for step in sorted(history) for row in history[step])


def read_table(path: Path) -> dict[int, list[Loss]]:
    """What `write_table` wrote, by step. Raises ValueError naming the file and the line."""
    history: dict[int, list[Loss]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        head = next(lines, [])
        if tuple(head) != COLUMNS:
            raise ValueError(
                f"{path}: line 1 is {','.join(head)!r}, expected {','.join(COLUMNS)!r}. It is not a table of "
                "validation losses, or was changed: move it away, and a new one is begun."
            )
        for line in lines:
            try:
                step, condition, stage, mean, low, high, samples = line
                row = Loss(condition, stage, float(mean), float(low), float(high), int(samples))
                history.setdefault(int(step), []).append(row)
            except ValueError as error:
                raise ValueError(
                    f"{path}: line {lines.line_num} is {','.join(line)!r}, expected {','.join(COLUMNS)} with numbers. "
                    "Correct or delete that line, or move the file away, and a new one is begun."
                ) from error
    return history


def _ordered(names) -> list[str]:
    return list(dict.fromkeys(names))
