"""Identity and prompt figures: DINO-I, CLIP-I and CLIP-T, all cosines between embeddings.

DreamBench's pairing: every output with every reference of its subject (DreamBooth, section 4.2), and with its own
prompt. An output's figure is the mean over its pairs, and the mean over outputs carries the 95 % interval, since pairs
of one output are not independent (our choice; with equally many references per subject it is the mean over pairs).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import fsum, isfinite

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ..common.intervals import mean_interval
from ..common.markdown import markdown

COPYING = (
    "High DINO-I and CLIP-I also come from copying the reference as it is: read them beside the copy-paste figures"
    " (Copy-Paste Report)."
)
COMPARABLE = (
    "Only figures of the same backbone and preprocessing compare. Published DreamBench tables mostly use DINO ViT-S/16"
    " and CLIP ViT-B/32."
)


class IdentityError(ValueError):
    """Embeddings that give no figure, and what to do about it."""


@dataclass(frozen=True)
class Pixels:
    """Published preprocessing: the shorter side scaled to `resize` px (bicubic, antialiased, rounded to 8 bits as in
    a picture file), the `crop` x `crop` px at the centre, mean and standard deviation of the training set."""

    resize: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    normalisation: str

    def __str__(self):
        return (
            f"shorter side to {self.resize} px (bicubic, antialiased), centre {self.crop} x {self.crop} px,"
            f" {self.normalisation} mean and deviation"
        )


DINO = Pixels(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "ImageNet")  # DINO's and DINOv2's evaluation
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(size: int) -> Pixels:
    """CLIP's: the shorter side to the model's input size, and the square at its centre."""
    return Pixels(size, size, CLIP_MEAN, CLIP_STD, "CLIP's")


def prepare(image: Tensor, pixels: Pixels) -> Tensor:
    """(H, W, 3) in 0..1 to (3, crop, crop) float32, as torchvision's Resize, CenterCrop and Normalize would."""
    height, width = image.shape[:2]
    short = min(height, width)
    size = (pixels.resize * height // short, pixels.resize * width // short)
    image = rearrange(image.float(), "h w c -> 1 c h w")
    if size != (height, width):
        image = interpolate(image, size=size, mode="bicubic", antialias=True)
    top, left = (round((side - pixels.crop) / 2) for side in size)
    image = image[0, :, top : top + pixels.crop, left : left + pixels.crop]
    image = (image.clamp(0, 1) * 255).round() / 255
    mean, std = (image.new_tensor(values)[:, None, None] for values in (pixels.mean, pixels.std))
    return (image - mean) / std


@dataclass(frozen=True)
class Figure:
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


def image_figure(
    name: str,
    outputs: Tensor,
    references: Tensor,
    subjects: Sequence[str] | None = None,
    reference_subjects: Sequence[str] | None = None,
    **about,
) -> Figure:
    """Cosine of every output (N, D) with every reference (M, D) of its subject.

    subjects, reference_subjects: a label for each output and each reference; None for both: all are of one subject.
    about: `backbone` and `preprocessing` to record. Raises IdentityError where an output has no reference, and where
    widths differ or an embedding is zero or not finite.
    """
    subjects, reference_subjects = _labels(subjects, len(outputs)), _labels(reference_subjects, len(references))
    same = torch.tensor([[a == b for b in reference_subjects] for a in subjects]).reshape(len(outputs), len(references))
    for number in (~same.any(-1)).nonzero().flatten().tolist():
        raise IdentityError(
            f"{name}: output {number + 1} shows {subjects[number]!r}, which no reference shows. References are of: "
            f"{', '.join(sorted(set(reference_subjects))) or 'nothing'}. Write the same label for both."
        )
    return _figure(name, _cosines(name, outputs, references), same, subjects, about)


def reference_figure(name: str, references: Tensor, subjects: Sequence[str] | None = None, **about) -> Figure | None:
    """Cosine of every reference with the other references of its subject: what real pictures of one subject reach
    (DreamBooth's row "real images"). None where no subject has two references."""
    labels = _labels(subjects, len(references))
    other = torch.tensor([[a == b and i != j for j, b in enumerate(labels)] for i, a in enumerate(labels)])
    if not bool(other.any()):
        return None
    return _figure(f"{name}, references", _cosines(name, references, references), other, labels, about)


def text_figure(
    name: str,
    outputs: Tensor,
    texts: Tensor,
    prompts: Sequence[int] | None = None,
    subjects: Sequence[str] | None = None,
    **about,
) -> Figure:
    """Cosine of every output (N, D) with its prompt's embedding, texts (P, D). prompts: (N,) which text belongs to
    each output; None: the first to the first, and so on. Not scaled (CLIPScore's factor 2.5 is left out)."""
    prompts = list(range(len(outputs))) if prompts is None else list(prompts)
    if len(prompts) != len(outputs) or not all(0 <= prompt < len(texts) for prompt in prompts):
        raise IdentityError(
            f"{name}: {len(outputs)} outputs, {len(prompts)} prompts and {len(texts)} text embeddings, expected one"
            " prompt for each output."
        )
    own = torch.zeros(len(outputs), len(texts), dtype=torch.bool)
    own[range(len(outputs)), prompts] = True
    return _figure(name, _cosines(name, outputs, texts), own, _labels(subjects, len(outputs)), about)


def text_report(figures: Sequence[Figure], notes: Sequence[str] = ()) -> str:
    """Figures as a markdown table, means by subject where there are several, preprocessing and notes."""
    rows = [("figure", "mean", "95 % interval", "pictures", "pairs", "backbone")]
    for figure in figures:
        interval = f"{figure.low:.4f} to {figure.high:.4f}" if isfinite(figure.low) else "unknown (one picture)"
        count = (str(len(figure.per_output)), str(len(figure.pairs)))
        rows.append((figure.name, f"{figure.mean:.4f}", interval, *count, _backbone(figure.backbone)))
    text = [markdown(rows)]
    shown = [figure for figure in figures if len(figure.by_subject) > 1]
    if shown:
        names = sorted({subject for figure in shown for subject in figure.by_subject})
        head = ("subject", *(_short(figure) for figure in shown))
        values = [
            (name, *(f"{f.by_subject[name]:.4f}" if name in f.by_subject else "-" for f in shown)) for name in names
        ]
        text.append(markdown([head, *values]))
    how = dict.fromkeys(f"{_short(figure)}: {figure.preprocessing}." for figure in figures if figure.preprocessing)
    text.append("\n".join([*how, COPYING, COMPARABLE, *notes]))
    return "\n\n".join(text)


def captions(figures: Sequence[Figure]) -> list[str]:
    """What to write below each output: its own figures."""
    columns = [[f"{figure.name} {value:.3f}" for value in figure.per_output] for figure in figures]
    return [", ".join(row) for row in zip(*columns, strict=True)]


def json_report(figures: Sequence[Figure], notes: Sequence[str] = (), **more) -> str:
    """Everything in the figures as JSON; an unknown interval is null. more: values to put beside them."""
    rows = []
    for figure in figures:
        row = {"figure": figure.name, "mean": figure.mean, "low": _known(figure.low), "high": _known(figure.high)}
        row |= {"backbone": figure.backbone, "preprocessing": figure.preprocessing, "by_subject": figure.by_subject}
        rows.append(row | {"per_output": figure.per_output, "pairs": figure.pairs})
    return json.dumps({"figures": rows, "notes": [COPYING, COMPARABLE, *notes], **more}, ensure_ascii=False)


def _figure(name: str, cosines: Tensor, paired: Tensor, subjects: Sequence[str], about: dict) -> Figure:
    table, mask = cosines.tolist(), paired.tolist()
    own = [[(j, row[j]) for j, yes in enumerate(line) if yes] for row, line in zip(table, mask, strict=True)]
    rows = [number for number, pairs in enumerate(own) if pairs]
    values = [fsum(value for _, value in own[row]) / len(own[row]) for row in rows]  # whatever the references' order
    mean, low, high = (x if x != x else min(max(x, -1.0), 1.0) for x in mean_interval(values))  # NaN stays
    groups: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        groups.setdefault(subjects[row], []).append(value)
    return Figure(
        name,
        mean,
        low,
        high,
        per_output=tuple(values),
        pairs=tuple((row, j, value) for row in rows for j, value in own[row]),
        by_subject={subject: fsum(group) / len(group) for subject, group in groups.items()},
        **about,
    )


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


def _backbone(backbone: dict) -> str:
    parts = (backbone.get("name", "not recorded"), backbone.get("file") or "file not known")
    return ", ".join(parts)


def _short(figure: Figure) -> str:
    name = figure.backbone.get("name")
    return f"{figure.name} ({name})" if name else figure.name


def _known(value: float) -> float | None:
    return value if isfinite(value) else None
