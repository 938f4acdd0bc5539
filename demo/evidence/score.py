"""Figures of the evidence's rows with 95 % intervals, and what two rows say of a claim."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from ...common.intervals import mean_interval, share_interval
from ...evaluation.copy_paste.metrics import azimuth_difference, copy_paste_report, within
from ..family.oracle import COARSE, FINE, Reading
from ..family.world import VIEWS, Toy

Figure = tuple[float, float, float]  # mean, low, high
FOLLOWS = 22.5  # degrees of azimuth: half of what a view's word covers
HEADS = {
    "azimuth": "azimuth vs reference °", "polar": "polar vs reference °", "recall": "average recall vs reference",
    "view error": "error vs prompted view °", "follows": "follows the prompted view", "coarse": "coarse identity",
    "fine": "fine identity",
}  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """Per case: what the intervals are over."""

    angles: Tensor  # (n, 2) azimuth and polar in degrees, of the drawn picture
    reference: Tensor  # (n, 2), of the first reference
    off: Tensor  # (n,) degrees from the middle of the prompted view
    coarse: Tensor  # (n,) share of the traits that are the toy's
    fine: Tensor

    @classmethod
    def of(cls, result: dict, entries: list[dict]) -> Scored:
        """result: of a row (evidence_kept.Kept). entries: its set's cases, the first of which it drew."""
        chosen = entries[: len(result["angles"])]
        angles = torch.tensor(result["angles"])
        toys = [entry["pictures"][0].toys[0] for entry in chosen]
        views = [entry["pictures"][0].view for entry in chosen]
        first = [entry["pictures"][1].view for entry in chosen]
        reading = Reading(angles, {name: torch.tensor(values) for name, values in result["traits"].items()}, {})
        middles = torch.tensor([45.0 * VIEWS.index(view.name) for view in views])
        columns = (
            angles, torch.tensor([[view.azimuth, view.polar] for view in first]), azimuth_difference(angles[:, 0], middles),
            reading.right(COARSE, toys), reading.right(FINE, toys),
        )  # fmt: skip
        return cls(*(column.double() for column in columns))

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """By the keys of HEADS."""
        report = copy_paste_report(self.reference, self.angles)
        named = {"azimuth": report.azimuth, "polar": report.polar, "recall": report.average_recall}
        keys = {"azimuth": "azimuth", "polar": "polar", "recall": "average_recall"}
        out = {name: (value, *report.intervals[keys[name]]) for name, value in named.items()}
        out["view error"] = mean_interval(self.off)
        return out | {name: share_interval(self.shares(name)) for name in ("follows", "coarse", "fine")}

    def only(self, keep: Tensor) -> Scored:
        """Of the cases where `keep` (n,) is true."""
        return Scored(*(getattr(self, field.name)[keep] for field in fields(self)))

    def shares(self, column: str) -> Tensor:
        """(n,) in 0..1: recall, follows, coarse or fine of each case."""
        if column == "follows":
            return (self.off < FOLLOWS).double()
        if column == "recall":
            azimuth = azimuth_difference(self.angles[:, 0], self.reference[:, 0])
            return within(azimuth, (self.angles[:, 1] - self.reference[:, 1]).abs()).mean(-1)
        return getattr(self, column)


def better(a: Scored | None, b: Scored | None, column: str) -> str:
    """Whether `a` lies above `b` there, as far as 95 % intervals tell."""
    if a is None or b is None:
        return "is not measured yet"
    (_, low, high), (_, other_low, other_high) = a.figures[column], b.figures[column]
    if low > other_high:
        return "holds here"
    return "is contradicted here" if high < other_low else "is undecided here: the intervals overlap"


def difference(a: Scored, b: Scored, column: str) -> Figure:
    """Of `a` from `b`, case by case over those that both drew: tells more than two intervals."""
    both = zip(a.shares(column).tolist(), b.shares(column).tolist())
    return mean_interval([x - y for x, y in both])


def shown(figure: Figure, column: str) -> str:
    mean, low, high = figure
    digits = 1 if column in ("azimuth", "polar", "view error") else 3
    return f"{mean:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def told(rows: dict[str, Scored | None], column: str) -> str:
    """The figures of two rows, and their difference."""
    words = [f"{name} {shown(row.figures[column], column) if row else 'not drawn'}" for name, row in rows.items()]
    if all(rows.values()):
        words.append(f"case by case {'{:+.3f} ({:+.3f} to {:+.3f})'.format(*difference(*rows.values(), column))}")
    return f"{HEADS[column]}: " + ", ".join(words)


def wrong_toy(toys: list[Toy], names: tuple[str, ...]) -> float:
    """Share of these traits that a toy has in common with the next one."""
    same = [getattr(a, name) == getattr(b, name) for a, b in zip(toys, toys[1:]) for name in names]
    return sum(same) / len(same)
