"""The metrics of the evidence's rows with 95 % intervals, and what two rows say about a claim."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from ...common.intervals import mean_interval, share_interval
from ...evaluation.copy_paste.metrics import azimuth_difference, copy_paste_report, within
from ..family.oracle import COARSE, FINE, Reading
from ..family.world import Toy

Interval = tuple[float, float, float]  # mean, low, high
FOLLOWS = 22.5  # degrees of azimuth: half of the range of a view's name
HEADS = {
    "azimuth": "azimuth vs reference °", "polar": "polar vs reference °", "recall": "average recall vs reference",
    "view error": "error vs prompted view °", "follows": "follows the prompted view", "coarse": "coarse identity",
    "fine": "fine identity",
}  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """What was measured on each of a row's n cases.

    Args:
        angles: (n, 2) azimuth and polar angle of the drawn picture in degrees.
        reference: (n, 2) the same of the first reference.
        view_error: (n,) degrees of azimuth from the middle of the prompted view.
        coarse: (n,) share of the toy's coarse traits in the picture.
        fine: (n,) share of the toy's fine traits in the picture.
    """

    angles: Tensor
    reference: Tensor
    view_error: Tensor
    coarse: Tensor
    fine: Tensor

    @classmethod
    def from_result(cls, result: dict, entries: list[dict]) -> Scores:
        """Of a row's result (results.ResultStore) and its set's entries, the first of which it drew."""
        drawn = entries[: len(result["angles"])]
        angles = torch.tensor(result["angles"])
        toys = [entry["pictures"][0].toys[0] for entry in drawn]
        prompted = torch.tensor([45.0 * entry["pictures"][0].view.bin for entry in drawn])
        views = [entry["pictures"][1].view for entry in drawn]
        reference = torch.tensor([[view.azimuth, view.polar] for view in views])
        reading = Reading(angles, {name: torch.tensor(values) for name, values in result["traits"].items()})
        identity = (reading.accuracy(COARSE, toys), reading.accuracy(FINE, toys))
        columns = (angles, reference, azimuth_difference(angles[:, 0], prompted), *identity)
        return cls(*(column.double() for column in columns))

    @cached_property
    def metrics(self) -> dict[str, Interval]:
        """By the keys of HEADS."""
        report = copy_paste_report(self.reference, self.angles)
        values = {"azimuth": report.azimuth, "polar": report.polar, "average_recall": report.average_recall}
        out = {name.removeprefix("average_"): (value, *report.intervals[name]) for name, value in values.items()}
        out["view error"] = mean_interval(self.view_error)
        return out | {name: share_interval(self.shares(name)) for name in ("follows", "coarse", "fine")}

    def select(self, mask: Tensor) -> Scores | None:
        """The cases where `mask`, (n,) or of more cases than were drawn, is true; None where there is none."""
        mask = mask[: len(self.angles)]
        return Scores(*(getattr(self, field.name)[mask] for field in fields(self))) if mask.any() else None

    def shares(self, column: str) -> Tensor:
        """(n,) in 0..1: recall, follows, coarse or fine of each case."""
        if column == "follows":
            return (self.view_error < FOLLOWS).double()
        if column == "recall":
            azimuth = azimuth_difference(self.angles[:, 0], self.reference[:, 0])
            return within(azimuth, (self.angles[:, 1] - self.reference[:, 1]).abs()).mean(-1)
        return getattr(self, column)


def verdict(a: Scores | None, b: Scores | None, column: str) -> str:
    """Whether `a` is above `b` in this column, as far as 95 % intervals decide it."""
    if a is None or b is None:
        return "is not measured yet"
    (_, low, high), (_, other_low, other_high) = a.metrics[column], b.metrics[column]
    if low > other_high:
        return "holds here"
    return "is contradicted here" if high < other_low else "is undecided here: the intervals overlap"


def paired_difference(a: Scores, b: Scores, column: str) -> Interval:
    """`a` minus `b` over the cases that both drew: more precise than the difference of two intervals."""
    pairs = zip(a.shares(column).tolist(), b.shares(column).tolist())
    return mean_interval([x - y for x, y in pairs])


def format_interval(interval: Interval, column: str) -> str:
    """A cell of a table."""
    mean, low, high = interval
    digits = 1 if column in ("azimuth", "polar", "view error") else 3
    return f"{mean:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def format_comparison(rows: dict[str, Scores | None], column: str) -> str:
    """A metric of two rows, and their paired difference."""
    values = {name: format_interval(row.metrics[column], column) if row else "not drawn" for name, row in rows.items()}
    parts = [f"{name} {value}" for name, value in values.items()]
    if all(rows.values()):
        parts.append("case by case {:+.3f} ({:+.3f} to {:+.3f})".format(*paired_difference(*rows.values(), column)))
    return f"{HEADS[column]}: " + ", ".join(parts)


def chance_agreement(toys: list[Toy], names: tuple[str, ...]) -> float:
    """Share of these traits that a toy has in common with the next one."""
    same = [getattr(a, name) == getattr(b, name) for a, b in zip(toys, toys[1:]) for name in names]
    return sum(same) / len(same)
