"""Validation losses as text and as a file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from ...common.files import replacing
from ...common.intervals import mean_interval
from ...common.list_files import read_text
from ...common.markdown import markdown

ALL = "all"  # the bin that stands for all flow times together
CONDITIONS = {"mllm": "MLLM only", "vae": "VAE only", "both": "both"}
KEYS = ("condition", "stage", "mean", "low", "high", "samples")  # a Loss in files: 0.1.0 called the bin "stage"
LONGEST = 2**26  # bytes of a table; 100,000 validations have 50 MB
COLUMNS = ("step", *KEYS)


@dataclass(frozen=True)
class Loss:
    """Held-out flow-matching loss of one condition over one bin of flow times."""

    condition: str  # "mllm" | "vae" | "both": the tokens that the DiT got
    bin: str  # name of the range of flow times, e.g. "t >= 0.95"; "all" = every flow time
    mean: float
    low: float  # 95 % interval of the mean
    high: float
    samples: int

    @classmethod
    def of(cls, condition: str, bin: str, values: Sequence[float]) -> Loss:
        """Summarizes losses by their mean and Student's t interval, which has no width where there is one loss only."""
        mean, low, high = mean_interval(values) if len(values) > 1 else (values[0],) * 3
        return cls(condition, bin, mean, low, high, len(values))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Loss:
        """Reads what `to_dict` gives."""
        return cls(*(values[key] for key in KEYS))

    def to_dict(self) -> dict[str, Any]:
        """Returns the values by their names in files."""
        return dict(zip(KEYS, astuple(self)))


def is_loss(values: Any) -> bool:
    """Whether `Loss.from_dict` can read a value."""
    if not isinstance(values, dict) or not all(type(values.get(key)) is str for key in KEYS[:2]):
        return False
    numbers = [values.get(key) for key in KEYS[2:]]
    return all(type(value) in (int, float) and isfinite(value) for value in numbers)


def finite_problem(rows: Sequence[Loss]) -> str:
    """Why losses of a validation tell nothing, as text to follow its name; "" where all are finite numbers."""
    wrong = [row for row in rows if not all(map(isfinite, (row.mean, row.low, row.high)))]
    if not wrong:
        return ""
    return (
        f"whose held-out loss is {wrong[0].mean} in {len(wrong)} of {len(rows)} cells, first {wrong[0].condition}, "
        f"{wrong[0].bin}: expected finite numbers. Load MLLM and diffusion model in bf16 instead of fp16, or look for "
        "held-out pictures that are far from the others."
    )


def with_all(rows: Sequence[Loss]) -> list[Loss]:
    """Returns `rows`, and for each condition without one a row of bin "all": the bins' mean weighted by their samples.

    Its interval takes the bins' means to be independent, as in stratified sampling.
    """
    out = list(rows)
    for condition in _ordered(row.condition for row in rows):
        parts = [row for row in rows if row.condition == condition]
        if any(row.bin == ALL for row in parts):
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
    """Returns the conditions in `rows`: MLLM, VAE, both, then any others in their order."""
    found = _ordered(row.condition for row in rows)
    return [name for name in CONDITIONS if name in found] + [name for name in found if name not in CONDITIONS]


def bins(rows: Sequence[Loss]) -> list[str]:
    """Returns the bins in `rows` in their order, "all" at the end."""
    found = _ordered(row.bin for row in rows)
    return [name for name in found if name != ALL] + [ALL] * (ALL in found)


def table(rows: Sequence[Loss]) -> str:
    """Formats means and intervals as Markdown: a line per condition, a column per bin and one for all."""
    rows = with_all(rows)
    cells = {(row.condition, row.bin): f"{row.mean:.4f} ({row.low:.4f} to {row.high:.4f})" for row in rows}
    columns = bins(rows)
    lines = [["held-out loss", *columns]]
    for condition in conditions(rows):
        lines.append([CONDITIONS.get(condition, condition), *(cells.get((condition, name), "") for name in columns)])
    return markdown(lines)


def write_table(path: Path, step: int, rows: Sequence[Loss]) -> None:
    """Writes the losses of a training step into a CSV file with COLUMNS, which is replaced atomically.

    Lines of the same step are replaced, so that a resumed run does not repeat itself. Raises ValueError where the file
    is there and is no such table; it stays as it is.
    """
    history = read_table(path) if path.exists() else {}
    history[step] = list(rows)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((step, *astuple(row)) for step in sorted(history) for row in history[step])


def read_table(path: Path) -> dict[int, list[Loss]]:
    """Reads what `write_table` wrote, by step. Raises ValueError with the file and the line."""
    history: dict[int, list[Loss]] = {}
    lines = csv.reader(io.StringIO(read_text(path, LONGEST), newline=""))
    try:
        head = next(lines, [])
    except csv.Error as error:
        head = [str(error)]
    if tuple(head) != COLUMNS:
        raise ValueError(
            f"{path}: line 1 is {','.join(head)!r:.200}, expected {','.join(COLUMNS)!r}. It is not a table of "
            "validation losses, or was changed: move it away, and a new one is begun."
        )
    for line in _rows(lines, path):
        try:
            step, condition, name, mean, low, high, samples = line
            row = Loss(condition, name, float(mean), float(low), float(high), int(samples))
            if int(step) < 0 or row.samples < 1:
                raise ValueError("expected counts of steps and samples")
            history.setdefault(int(step), []).append(row)
        except ValueError as error:
            raise ValueError(
                f"{path}: line {lines.line_num} is {','.join(line)!r:.200}, expected {','.join(COLUMNS)} with numbers. "
                "Correct or delete that line, or move the file away, and a new one is begun."
            ) from error
    return history


def _rows(lines: Any, path: Path) -> Iterator[list[str]]:
    try:
        yield from lines
    except csv.Error as error:  # a field without end
        raise ValueError(
            f"{path}: line {lines.line_num}: {error}. Move the file away, and a new one is begun."
        ) from None


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
