"""Identity and prompt metrics: DINO-I, CLIP-I and CLIP-T, all cosines between embeddings.

DreamBench's pairing: every output with every reference of its subject (DreamBooth, section 4.2), and with its own
prompt. An output's score is the mean over its pairs, and the mean over outputs carries the 95 % interval, since pairs
of one output are not independent (our choice; with equally many references per subject it is the mean over pairs).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import fsum, isfinite

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..common.intervals import mean_interval
from ..common.markdown import markdown

COPYING = (
    "High DINO-I and CLIP-I also come from copying the reference as it is: read them beside the copy-paste metrics"
    " (Copy-Paste Report)."
)
COMPARABLE = (
    "Only metrics of the same backbone and preprocessing compare. Published DreamBench tables mostly use DINO ViT-S/16"
    " and CLIP ViT-B/32."
)


class IdentityError(ValueError):
    """Embeddings that give no metric, and what to do about it."""


@dataclass(frozen=True)
class IdentityMetric:
    """One row of the report: a mean cosine, its interval, and all that it was made of."""

    name: str  # "DINO-I", "CLIP-I", "CLIP-T", or one of the first two with ", references"
    mean: float
    low: float  # 95 % interval of the mean over outputs; NaN for a single one
    high: float
    per_output: tuple[float, ...]  # cosine of each output, mean over its pairs
    pairs: tuple[tuple[int, int, float], ...]  # (output, reference or prompt, cosine), counted from 0
    backbone: dict = field(default_factory=dict)  # what embedded; see loaders/embedders.py
    preprocessing: str = ""
    by_subject: dict[str, float] = field(default_factory=dict)  # mean over the outputs of each subject


def image_metric(
    name: str,
    outputs: Tensor,
    references: Tensor,
    subjects: Sequence[str] | None = None,
    reference_subjects: Sequence[str] | None = None,
    **about,
) -> IdentityMetric:
    """Cosine of every output with every reference of its subject, embeddings (N, D) and (M, D).

    `name` is "DINO-I" or "CLIP-I"; without labels of the subjects, all are of one; `about` holds `backbone` and
    `preprocessing` to record. Raises IdentityError where an output has no reference, widths differ, or an embedding is
    zero or not finite.
    """
    subjects, reference_subjects = _labels(subjects, len(outputs)), _labels(reference_subjects, len(references))
    same = torch.tensor([[a == b for b in reference_subjects] for a in subjects]).reshape(len(outputs), len(references))
    for number in (~same.any(-1)).nonzero().flatten().tolist():
        raise IdentityError(
            f"{name}: output {number + 1} shows {subjects[number]!r}, which no reference shows. References are of: "
            f"{', '.join(sorted(set(reference_subjects))) or 'nothing'}. Write the same label for both."
        )
    return _metric(name, _cosines(name, outputs, references), same, subjects, about)


def reference_metric(
    name: str, references: Tensor, subjects: Sequence[str] | None = None, **about
) -> IdentityMetric | None:
    """Cosine of every reference with the others of its subject: what real pictures of one subject reach.

    That is DreamBooth's row "real images". None where no subject has two references.
    """
    labels = _labels(subjects, len(references))
    other = torch.tensor([[a == b and i != j for j, b in enumerate(labels)] for i, a in enumerate(labels)])
    if not bool(other.any()):
        return None
    return _metric(f"{name}, references", _cosines(name, references, references), other, labels, about)


def text_metric(
    name: str,
    outputs: Tensor,
    texts: Tensor,
    prompts: Sequence[int] | None = None,
    subjects: Sequence[str] | None = None,
    **about,
) -> IdentityMetric:
    """Cosine of every output (N, D) with its prompt's embedding, texts (P, D); else as in `image_metric`.

    prompts: (N,) which text belongs to each output; None: the first to the first, and so on. Not scaled: CLIPScore's
    factor 2.5 is left out.
    """
    prompts = list(range(len(outputs))) if prompts is None else list(prompts)
    if len(prompts) != len(outputs) or not all(0 <= prompt < len(texts) for prompt in prompts):
        raise IdentityError(
            f"{name}: {len(outputs)} outputs, {len(prompts)} prompts and {len(texts)} text embeddings, expected one"
            " prompt for each output."
        )
    own = torch.zeros(len(outputs), len(texts), dtype=torch.bool)
    own[range(len(outputs)), prompts] = True
    return _metric(name, _cosines(name, outputs, texts), own, _labels(subjects, len(outputs)), about)


def text_report(metrics: Sequence[IdentityMetric], notes: Sequence[str] = ()) -> str:
    """Metrics as a markdown table, means by subject where there are several, preprocessing and notes."""
    rows = [("metric", "mean", "95 % interval", "pictures", "pairs", "backbone")]
    for metric in metrics:
        interval = f"{metric.low:.4f} to {metric.high:.4f}" if isfinite(metric.low) else "unknown (one picture)"
        count = (str(len(metric.per_output)), str(len(metric.pairs)))
        name, file = metric.backbone.get("name", "not recorded"), metric.backbone.get("file") or "file not known"
        rows.append((metric.name, f"{metric.mean:.4f}", interval, *count, f"{name}, {file}"))
    text = [markdown(rows)]
    shown = [metric for metric in metrics if len(metric.by_subject) > 1]
    if shown:
        names = sorted({subject for metric in shown for subject in metric.by_subject})
        head = ("subject", *(_short(metric) for metric in shown))
        means = [[f"{m.by_subject[name]:.4f}" if name in m.by_subject else "-" for m in shown] for name in names]
        text.append(markdown([head, *([name, *row] for name, row in zip(names, means))]))
    how = dict.fromkeys(f"{_short(metric)}: {metric.preprocessing}." for metric in metrics if metric.preprocessing)
    text.append("\n".join([*how, COPYING, COMPARABLE, *notes]))
    return "\n\n".join(text)


def captions(metrics: Sequence[IdentityMetric]) -> list[str]:
    """What to write below each output: its own scores."""
    columns = [[f"{metric.name} {value:.3f}" for value in metric.per_output] for metric in metrics]
    return [", ".join(row) for row in zip(*columns, strict=True)]


def json_report(metrics: Sequence[IdentityMetric], notes: Sequence[str] = (), **more) -> str:
    """Everything in the metrics as JSON; an unknown interval is null. more: values to put beside them."""
    rows = []
    for metric in metrics:
        row = {"figure": metric.name, "mean": metric.mean, "low": _known(metric.low), "high": _known(metric.high)}
        row |= {"backbone": metric.backbone, "preprocessing": metric.preprocessing, "by_subject": metric.by_subject}
        rows.append(row | {"per_output": metric.per_output, "pairs": metric.pairs})
    return json.dumps({"figures": rows, "notes": [COPYING, COMPARABLE, *notes], **more}, ensure_ascii=False)


def _metric(name: str, cosines: Tensor, paired: Tensor, subjects: Sequence[str], about: dict) -> IdentityMetric:
    table, mask = cosines.tolist(), paired.tolist()
    own = [[(j, row[j]) for j, yes in enumerate(line) if yes] for row, line in zip(table, mask, strict=True)]
    rows = [number for number, pairs in enumerate(own) if pairs]
    values = [fsum(value for _, value in own[row]) / len(own[row]) for row in rows]  # whatever the references' order
    mean, low, high = (x if x != x else min(max(x, -1.0), 1.0) for x in mean_interval(values))  # NaN stays
    groups: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        groups.setdefault(subjects[row], []).append(value)
    pairs = tuple((row, j, value) for row in rows for j, value in own[row])
    by_subject = {subject: fsum(group) / len(group) for subject, group in groups.items()}
    return IdentityMetric(name, mean, low, high, tuple(values), pairs, by_subject=by_subject, **about)


def _cosines(name: str, rows: Tensor, columns: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N, M) float64 in -1..1."""
    for what, embeddings in (("outputs", rows), ("references or prompts", columns)):
        if embeddings.ndim != 2 or not len(embeddings):
            raise IdentityError(
                f"{name}: the {what} are of shape {tuple(embeddings.shape)}, expected (N, D), at least one."
            )
        length = embeddings.double().norm(dim=-1)
        for number in (~(length.isfinite() & (length > 0))).nonzero().flatten().tolist():
            raise IdentityError(
                f"{name}: the embedding of number {number + 1} of the {what} has length {float(length[number])},"
                " expected a finite one above 0. The model or the picture is broken."
            )
    if rows.shape[1] != columns.shape[1]:
        raise IdentityError(
            f"{name}: embeddings are {rows.shape[1]} and {columns.shape[1]} wide, expected the same. They come from"
            " models that do not belong together."
        )
    rows, columns = (normalize(embeddings.double().cpu(), dim=-1) for embeddings in (rows, columns))
    return torch.einsum("n d, m d -> n m", rows, columns).clamp(-1, 1)


def _labels(labels: Sequence[str] | None, count: int) -> list[str]:
    labels = ["subject"] * count if labels is None else list(labels)
    if len(labels) != count:
        raise IdentityError(f"{len(labels)} subject labels for {count} pictures, expected one for each.")
    return labels


def _short(metric: IdentityMetric) -> str:
    name = metric.backbone.get("name")
    return f"{metric.name} ({name})" if name else metric.name


def _known(value: float) -> float | None:
    return value if isfinite(value) else None
