"""The copy-paste metrics: how far the outputs turned away from the pose of their references.

Mean azimuth and polar difference (higher: more varied) and average recall (lower: less copied), as in the paper's
abstract. Gating by confidence is Orient Anything's own advice; intervals and ungated metrics are our addition.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.intervals import mean_interval, share_interval

RECALL = (5, 10, 15, 20)  # degrees


@dataclass(frozen=True)
class CopyPasteMetrics:
    """The paper's three metrics over `count` pairs; all NaN where no pair is left."""

    azimuth: float  # mean azimuth difference, degrees, 0 to 180
    polar: float  # mean polar difference, degrees
    average_recall: float  # mean of `recall`, 0 to 1
    recall: dict[int, float]  # by k: share of pairs whose azimuth and polar differences are both below k degrees
    count: int
    intervals: dict[str, tuple[float, float]]  # 95 %, by name: azimuth, polar, average_recall, recall@5, ...


@dataclass(frozen=True)
class CopyPasteReport(CopyPasteMetrics):
    """The metrics over the pairs whose confidence suffices; `ungated` are those over all pairs."""

    coverage: float  # share of pairs whose confidence suffices
    ungated: CopyPasteMetrics
    threshold: float
    azimuth_difference: Tensor  # (N,) float64, degrees, of all pairs
    polar_difference: Tensor  # (N,)
    counted: Tensor  # (N,) bool: confidence suffices


def copy_paste_report(reference, generated, confidence=None, threshold: float = 0.5) -> CopyPasteReport:
    """How much of the references' pose is in the outputs.

    Args:
        reference: (N, 2) azimuth and polar in degrees, as a tensor, an array or a nested list. Azimuth is circular, so
            359 and 1 differ by 2.
        generated: (N, 2) likewise, pair by pair.
        confidence: 0 to 1, (N,) or, for reference and output, (N, 2). None: every pair counts.
        threshold: A pair counts where all of its confidences are at least this.

    Returns:
        The report. Where no pair counts, the metrics are NaN, coverage is 0, and `ungated` still holds what there is.

    Raises:
        ValueError: Other shapes, or values that are no angles or no confidences.
    """
    reference, generated = _angles("reference", reference), _angles("generated", generated)
    if len(reference) != len(generated):
        raise ValueError(
            f"copy_paste_report: {len(reference)} references and {len(generated)} generated, expected as many of each. "
            "Repeat a reference for each of its outputs."
        )
    counted = _counted(confidence, threshold, len(reference))
    azimuth = azimuth_difference(reference[:, 0], generated[:, 0])
    return copy_paste_from_differences(azimuth, (reference[:, 1] - generated[:, 1]).abs(), counted, threshold)


def copy_paste_from_differences(
    azimuth: Sequence[float] | Tensor,
    polar: Sequence[float] | Tensor,
    counted: Sequence[bool] | Tensor | None = None,
    threshold: float = 0.5,
) -> CopyPasteReport:
    """`copy_paste_report` from the differences of N pairs in degrees, 0 to 180, as score files hold them.

    counted: whether each pair's confidence sufficed, None = all. threshold: as it was applied, for the report alone.
    """
    azimuth, polar = (torch.as_tensor(values, dtype=torch.float64) for values in (azimuth, polar))
    counted = torch.ones(len(azimuth)).bool() if counted is None else torch.as_tensor(counted).bool()
    gated, ungated = _metrics(azimuth[counted], polar[counted]), _metrics(azimuth, polar)
    coverage = float(counted.double().mean())
    pairs = dict(azimuth_difference=azimuth, polar_difference=polar, counted=counted)
    return CopyPasteReport(**vars(gated), coverage=coverage, ungated=ungated, threshold=threshold, **pairs)


@dataclass(frozen=True)
class Pairs:
    """Reference and output of each pair as an orientation model saw them, and the metrics that they give."""

    reference: Tensor  # (N, 3) float64: azimuth and polar in degrees, confidence
    generated: Tensor  # (N, 3)
    report: CopyPasteReport


def compare(reference: Tensor, generated: Tensor, threshold: float = 0.5) -> Pairs:
    """`copy_paste_report` of (N, 3) azimuth and polar in degrees and confidence, as an orientation model saw them."""
    reference, generated = reference.double().cpu(), generated.double().cpu()
    confidence = torch.stack([reference[:, 2], generated[:, 2]], dim=-1)
    report = copy_paste_report(reference[:, :2], generated[:, :2], confidence, threshold)
    return Pairs(reference, generated, report)


def azimuth_difference(a: Tensor, b: Tensor) -> Tensor:
    """The smaller angle between two directions, degrees, 0 to 180."""
    turn = (a - b) % 360
    return torch.minimum(turn, 360 - turn)


def within(azimuth: Tensor, polar: Tensor) -> Tensor:
    """(N, 4) float64: 1 where both differences (N,), degrees, are strictly below the k of RECALL.

    Its mean over k is a pair's part in the average recall.
    """
    return torch.stack([(azimuth < k) & (polar < k) for k in RECALL], dim=-1).double()


def _metrics(azimuth: Tensor, polar: Tensor) -> CopyPasteMetrics:
    hits = within(azimuth, polar)
    found = {
        "azimuth": mean_interval(azimuth),
        "polar": mean_interval(polar),
        "average_recall": share_interval(hits.mean(-1)),
        **{f"recall@{k}": share_interval(hits[:, i]) for i, k in enumerate(RECALL)},
    }
    # The mean of azimuth differences is from 0 to 180 degrees, polar ones too, shares from 0 to 1. NaN stays.
    intervals = {name: (_clip(low), _clip(high)) for name, (_, low, high) in found.items()}
    means = (found[name][0] for name in ("azimuth", "polar", "average_recall"))
    return CopyPasteMetrics(*means, {k: found[f"recall@{k}"][0] for k in RECALL}, len(azimuth), intervals)


def _clip(value: float) -> float:
    return value if value != value else min(max(value, 0.0), 180.0)


def _angles(name: str, values: Tensor | Sequence) -> Tensor:
    values = _tensor(name, values, "(N, 2): azimuth and polar in degrees")
    if values.ndim != 2 or values.shape[1] != 2 or not len(values):
        raise ValueError(
            f"copy_paste_report: {name} has shape {tuple(values.shape)}, expected (N, 2): azimuth and polar in degrees,"
            " one line per picture, at least one."
        )
    bad = (~values.isfinite()).any(-1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"copy_paste_report: {name} line {bad[0]} is {values[bad[0]].tolist()}, expected two angles in degrees "
            f"({len(bad)} such lines). Leave pictures without an estimate out, on both sides."
        )
    return values


def _counted(confidence, threshold: float, count: int) -> Tensor:
    if not 0 <= threshold <= 1:
        raise ValueError(f"copy_paste_report: threshold is {threshold}, expected a confidence from 0 to 1.")
    if confidence is None:
        return torch.ones(count, dtype=torch.bool)
    confidence = _tensor("confidence", confidence, "(N,), or (N, 2) of reference and generated")
    if tuple(confidence.shape) not in ((count,), (count, 2)):
        raise ValueError(
            f"copy_paste_report: confidence has shape {tuple(confidence.shape)}, expected ({count},), or ({count}, 2) "
            "of reference and generated."
        )
    if not bool(((confidence >= 0) & (confidence <= 1)).all()):  # NaN too
        raise ValueError(
            f"copy_paste_report: confidence goes from {float(confidence.min()):.3g} to {float(confidence.max()):.3g}, "
            "expected 0 to 1. Logits must go through the decoder's softmax first."
        )
    return (confidence.reshape(count, -1) >= threshold).all(-1)


def _tensor(name: str, values, expected: str) -> Tensor:
    try:
        return torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"copy_paste_report: {name} is no table of numbers ({error}), expected {expected}.") from error
