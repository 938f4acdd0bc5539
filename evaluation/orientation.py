"""Orientation of a subject as Orient Anything V1 reads it (arXiv 2412.18605, CC BY 4.0): the picture that its network
takes, its head, its angles, and a drawing of the axes. The backbone, DINOv2, is the host's (loaders/orientation).

Azimuth 0: the subject's front faces the camera; 90: its front points to the left of the picture. Polar: how far the
camera stands above the subject. Rotation: how far the picture is turned, counter-clockwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import cos, radians, sin

import numpy
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

AZIMUTHS, POLARS, ROTATIONS = 360, 180, (180, 360)  # one logit per degree; rotation: the first files, `ronormsigma1`
CONFIDENCES = 2
RESIZE, SIDE = 256, 224  # px; shortest side before the crop, and the crop: DINOv2's own preprocessing
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = 0.85  # longest side of the cut-out subject / side of the square that it is put into
SUBJECT = 0.05  # mask above this belongs to the subject (published: above 0, which masks seldom are outside)
CLEAR = 0.5  # confidence below this: no meaningful front (published)

FRONT, RIGHT, TOP = (214, 60, 52), (56, 156, 74), (58, 108, 220)
INK, PAPER, GREY = (40, 40, 46), (252, 252, 253), (140, 140, 146)
OVERLAY = (512, 1024)  # px; the longest side of an overlay lies between
FINE = 2  # drawn at so many times the size and reduced, since pillow's lines have jagged edges


@dataclass(frozen=True, eq=False)
class Angles:
    """Orientations of N subjects, each field (N,) float: azimuth 0 to 360 (without), polar -90 to 90, rotation -90 to
    90 or -180 to 180 by the layout, all in degrees; confidence 0 to 1 that the subject has a front at all."""

    azimuth: Tensor
    polar: Tensor
    rotation: Tensor
    confidence: Tensor

    def __len__(self) -> int:
        return len(self.azimuth)


class OrientationHead(nn.Module):
    """(B, width) CLS tokens to (B, out) logits. Published as Linear, BatchNorm, ReLU, Linear, BatchNorm; the norms are
    in the linear layers here (see fold_head), which is the same at inference and leaves two layers that a host can
    cast and offload.

    operations: where Linear comes from, torch's or the host's.
    """

    def __init__(self, width: int, out: int, *, device=None, dtype: torch.dtype | None = None, operations=nn):
        super().__init__()
        self.net1 = operations.Linear(width, out, device=device, dtype=dtype)
        self.net2 = operations.Linear(out, out, device=device, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net2(self.net1(tokens).relu())


def head_shapes(width: int, out: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the published head."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, columns in (("net1", width), ("net2", out)):
        shapes[f"{name}.0.weight"] = (out, columns)
        for key in ("0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
            shapes[f"{name}.{key}"] = (out,)
        shapes[f"{name}.1.num_batches_tracked"] = ()
    return shapes


def fold_head(state: Mapping[str, Tensor], epsilon: float = 1e-5) -> dict[str, Tensor]:
    """The published head's weights as those of OrientationHead, fp32. epsilon: BatchNorm's, torch's default."""
    folded = {}
    for name in ("net1", "net2"):
        weight, bias, scale, shift, mean, variance = (
            state[f"{name}.{key}"].double()
            for key in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")
        )
        factor = scale / (variance + epsilon).sqrt()
        folded[f"{name}.weight"] = (weight * factor[:, None]).float()
        folded[f"{name}.bias"] = ((bias - mean) * factor + shift).float()
    return folded


def rotation_bins(out: int) -> int:
    """How many of `out` logits are for rotation. Raises ValueError if it is none of the two published numbers."""
    bins = out - AZIMUTHS - POLARS - CONFIDENCES
    if bins not in ROTATIONS:
        known = " or ".join(str(AZIMUTHS + POLARS + bins + CONFIDENCES) for bins in ROTATIONS)
        raise ValueError(f"{out} logits found, expected {known} (Orient Anything V1).")
    return bins


def decode(logits: Tensor) -> Angles:
    """(N, out) logits to angles: the highest of each angle's bins of 1 degree, and softmax over the last two logits for
    the confidence. The 360-bin layout's rotation lies between -180 and 180, the other's between -90 and 90. Raises
    ValueError for another number of logits."""
    logits = logits.float()
    bins = rotation_bins(logits.shape[-1])
    azimuth, polar, rotation, confidence = logits.split((AZIMUTHS, POLARS, bins, CONFIDENCES), dim=-1)
    return Angles(
        azimuth=azimuth.argmax(-1).float(),
        polar=polar.argmax(-1).float() - POLARS // 2,
        rotation=rotation.argmax(-1).float() - bins // 2,
        confidence=confidence.softmax(-1)[..., 0],
    )


def pictures(image: Tensor, mask: Tensor | None = None) -> tuple[list[Tensor], list[Tensor] | None]:
    """An IMAGE batch (B, H, W, 3 or 4) and a MASK (h, w) or (M, h, w), M = 1 for all or B, as B pictures (H, W, 3) and
    B masks or None. Alpha is the mask where no other is given. Raises ValueError for other shapes and for values that
    are no numbers."""
    if image.ndim != 4 or image.shape[-1] not in (3, 4):
        raise ValueError(f"image is {tuple(image.shape)}, expected an IMAGE (batch, height, width, 3).")
    for number, picture in enumerate(image):
        if not bool(picture.isfinite().all()):
            raise ValueError(
                f"Picture {number + 1} of {len(image)} holds values that are NaN or infinite, expected 0 to 1. The "
                "node that made it has failed (often a VAE decode in fp16: decode in fp32 or bf16)."
            )
    if mask is None and image.shape[-1] == 4:
        mask = image[..., 3]
    image = image[..., :3]
    if mask is None:
        return list(image), None
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or len(mask) not in (1, len(image)):
        raise ValueError(
            f"mask is {tuple(mask.shape)} for {len(image)} picture(s), expected one MASK for all or one per picture, "
            "in their order. The host's ImageFromBatch picks pictures from a batch."
        )
    return list(image), list(mask.expand(len(image), -1, -1))


def prepare(image: Tensor, mask: Tensor | None = None) -> Tensor:
    """(H, W, 3) in 0..1 to (3, 224, 224) as the network takes it.

    With a mask (any size, 1 = subject) the subject is cut out onto black, at 0.85 of a square; without one the picture
    is taken as it is, and what of it is longer than square is lost. Then shortest side 256, the middle 224, 8 bit,
    ImageNet's mean and deviation. Raises ValueError for a mask without subject.
    """
    image = image.float().clamp(0, 1)
    if mask is not None:
        mask = fit_mask(mask, image)
        image = _centred(image * mask[..., None], subject_box(mask))
    height, width, _ = image.shape
    short = min(height, width)
    size = [RESIZE if side == short else int(RESIZE * side / short) for side in (height, width)]
    pixels = nn.functional.interpolate(
        rearrange(image, "h w c -> 1 c h w"), size=size, mode="bicubic", antialias=True, align_corners=False
    )[0]
    pixels = (pixels * 255).round().clamp(0, 255) / 255
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    pixels = pixels[:, top : top + SIDE, left : left + SIDE]
    return (pixels - pixels.new_tensor(MEAN)[:, None, None]) / pixels.new_tensor(STD)[:, None, None]


def fit_mask(mask: Tensor, image: Tensor) -> Tensor:
    """(h, w) mask as (H, W) for an (H, W, 3) image, clamped to 0..1."""
    mask = mask.to(image.device, torch.float32)
    if mask.shape != image.shape[:2]:
        size = tuple(image.shape[:2])
        mask = nn.functional.interpolate(mask[None, None], size=size, mode="bilinear", antialias=True)[0, 0]
    return mask.clamp(0, 1)


def subject_box(mask: Tensor) -> tuple[int, int, int, int]:
    """(top, bottom, left, right), the second of each excluded, of what an (H, W) mask shows. Raises ValueError where it
    shows nothing."""
    rows, columns = (mask > SUBJECT).nonzero(as_tuple=True)
    if not len(rows):
        raise ValueError(
            f"The mask shows no subject: its highest value is {float(mask.max()):.3g}, expected 1 where the subject "
            "is. Leave the mask open to read the whole picture, or invert it if it marks the background."
        )
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


def without_subject(images: list[Tensor], masks: list[Tensor | None] | None) -> set[int]:
    """Numbers, from 0, of the pictures whose mask shows nothing."""
    pairs = enumerate(zip(images, masks or []))
    return {n for n, (image, mask) in pairs if mask is not None and not bool((fit_mask(mask, image) > SUBJECT).any())}


def _centred(image: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """What lies in the box, in the middle of a black square of which its longest side takes FILL."""
    top, bottom, left, right = box
    height, width = bottom - top, right - left
    longest = max(height, width)
    side = int(longest / FILL)
    # published in two steps, first square and then larger; each may be half a pixel off the middle
    down, across = ((longest - size) // 2 + (side - longest) // 2 for size in (height, width))
    square = image.new_zeros(side, side, 3)
    square[down : down + height, across : across + width] = image[top:bottom, left:right]
    return square


def axes(azimuth: float, polar: float, rotation: float) -> Tensor:
    """(3, 3) of the subject's front, its own right and its top (rows), each as how far it points to the right of the
    picture, up in it, and towards the camera (columns). Angles in degrees; parallel projection."""
    a, p, r = map(radians, (azimuth, polar, rotation))
    upright = torch.tensor(
        [
            [-sin(a), -cos(a) * sin(p), cos(a) * cos(p)],
            [-cos(a), sin(a) * sin(p), -sin(a) * cos(p)],
            [0.0, cos(p), sin(p)],
        ]
    )
    turn = torch.tensor([[cos(r), sin(r), 0.0], [-sin(r), cos(r), 0.0], [0.0, 0.0, 1.0]])  # counter-clockwise
    return upright @ turn


def overlay(
    image: Tensor,
    angles: tuple[float, float, float, float],
    mask: Tensor | None = None,
    *,
    threshold: float = CLEAR,
) -> Image.Image:
    """The axes over the picture: red to the subject's front, green to its own right, blue to its top, and the angles
    below; a dot is an arrow that points at the camera, a cross one that points away. Grey where the confidence is
    below `threshold`.

    image: (H, W, 3) in 0..1. angles: azimuth, polar, rotation in degrees, confidence. mask: as in prepare; the axes
    stand in the middle of what it shows. Pictures of one size give overlays of one size.
    """
    azimuth, polar, rotation, confidence = angles
    height, width, _ = image.shape
    scale = min(max(1.0, OVERLAY[0] / max(height, width)), OVERLAY[1] / max(height, width)) * FINE
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    top, bottom, left, right = 0, height, 0, width
    if mask is not None:
        shown = fit_mask(mask.cpu(), image.cpu())
        pixels = (pixels * (0.35 + 0.65 * shown[..., None].numpy())).astype(numpy.uint8)  # what is cut away, darker
        if bool((shown > SUBJECT).any()):
            top, bottom, left, right = subject_box(shown)
    text = 15 * FINE
    font = ImageFont.load_default(text)
    unclear = ": no clear front"
    lines = [f"azimuth {azimuth:.0f}, polar {polar:.0f}, rotation {rotation:.0f}"]
    lines += [f"confidence {confidence:.2f}" + (unclear if confidence < threshold else "")]
    longest = (
        f"azimuth 000, polar -00, rotation -000, confidence 0.00{unclear}"  # so that all pictures get as many lines
    )
    if font.getlength(longest) < size[0] - text:
        lines = [", ".join(lines)]
    result = Image.new("RGB", (size[0], size[1] + int(text * (0.6 + 1.25 * len(lines)))), PAPER)
    result.paste(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    pen = ImageDraw.Draw(result)
    centre = (left + right) / 2 * scale, (top + bottom) / 2 * scale
    length = max(0.45 * max(bottom - top, right - left) * scale, 40 * FINE)
    length = min(length, 0.42 * min(size))  # stays inside
    arrows = list(zip(axes(azimuth, polar, rotation).tolist(), (FRONT, RIGHT, TOP), ("front", "right", "top")))
    arrows.sort(key=lambda axis: (_seen(axis[0]) < 0.15, axis[0][2]))  # the farthest first, those along the view last
    for (x, y, near), colour, _ in arrows:
        tip = centre[0] + x * length, centre[1] - y * length
        _arrow(pen, centre, tip, near, length, colour if confidence >= threshold else GREY)
    for axis, _, name in arrows:
        x, y = axis[0] * length, axis[1] * length
        beyond = 1 + 0.12 / max(_seen(axis), 0.4)
        label = centre[0] + x * beyond, centre[1] - y * beyond + (1.3 * text if _seen(axis) < 0.15 else 0)
        label = tuple(min(max(at, 1.5 * text), side - 1.5 * text) for at, side in zip(label, size))
        pen.text(label, name, PAPER, font, anchor="mm", stroke_width=2 * FINE, stroke_fill=INK)
    for number, line in enumerate(lines):
        pen.text((text // 2, size[1] + text * (0.4 + 1.25 * number)), line, INK, font)
    return result.reduce(FINE)


def _seen(axis: list[float]) -> float:
    """Length of a unit axis in the picture."""
    return (axis[0] ** 2 + axis[1] ** 2) ** 0.5


def overlays(images: list[Tensor], angles: Angles, masks: list[Tensor] | None = None, **options) -> Tensor:
    """`overlay` of N pictures of one size as an IMAGE (N, h, w, 3) in 0..1."""
    columns = (angles.azimuth, angles.polar, angles.rotation, angles.confidence)
    drawn = [
        overlay(image, found, mask, **options)
        for image, found, mask in zip(images, zip(*(c.tolist() for c in columns)), masks or [None] * len(images))
    ]
    return torch.from_numpy(numpy.stack([numpy.asarray(picture) for picture in drawn])).float() / 255


def _arrow(pen: ImageDraw.ImageDraw, start, end, near: float, length: float, colour) -> None:
    """An arrow of full length `length`, seen shortened, edged in white; a disc where it points along the view."""
    thick = max(length * 0.045, 2.5 * FINE)
    x, y = end[0] - start[0], end[1] - start[1]
    seen = (x * x + y * y) ** 0.5
    head = 3.2 * thick
    if seen < head:
        for radius, fill in ((2.0 * thick, PAPER), (1.7 * thick, colour)):
            pen.ellipse((end[0] - radius, end[1] - radius, end[0] + radius, end[1] + radius), fill)
        arm = 0.6 * thick
        if near > 0:
            pen.ellipse((end[0] - arm, end[1] - arm, end[0] + arm, end[1] + arm), PAPER)
        else:
            for sign in (1, -1):
                line = (end[0] - arm, end[1] - sign * arm, end[0] + arm, end[1] + sign * arm)
                pen.line(line, PAPER, round(0.4 * thick))
        return
    x, y = x / seen, y / seen
    for edge, fill in ((0.3 * thick, PAPER), (0.0, colour)):
        neck = end[0] - head * x, end[1] - head * y
        half = 1.5 * thick + 1.6 * edge
        tip = end[0] + 1.8 * edge * x, end[1] + 1.8 * edge * y
        back = neck[0] - edge * x, neck[1] - edge * y
        wings = [(back[0] - sign * half * y, back[1] + sign * half * x) for sign in (1, -1)]
        pen.line((*start, *neck), fill, round(thick + 2 * edge))
        pen.ellipse([at + sign * (thick / 2 + edge) for sign in (-1, 1) for at in start], fill)
        pen.polygon([tip, *wings], fill)


def notes(images: list[Tensor], masks: list[Tensor | None] | None) -> dict[int, str]:
    """What `table` should say of pictures whose mask is empty, by number from 0."""
    return dict.fromkeys(without_subject(images, masks), "mask empty: the whole picture was read, confidence set to 0")


def table(angles: Angles, *, threshold: float = CLEAR, notes: Mapping[int, str] | None = None) -> str:
    """One aligned line per picture, degrees; `notes` by number from 0 go to the end of their line."""
    lines = ["picture  azimuth  polar  rotation  confidence"]
    columns = (angles.azimuth, angles.polar, angles.rotation, angles.confidence)
    for number, (azimuth, polar, rotation, confidence) in enumerate(zip(*(column.tolist() for column in columns))):
        line = f"{number + 1:7d}  {azimuth:7.0f}  {polar:5.0f}  {rotation:8.0f}  {confidence:10.3f}"
        remarks = ["no clear front"] if confidence < threshold else []
        remarks += [notes[number]] if notes and number in notes else []
        lines.append(line + ("  " + "; ".join(remarks) if remarks else ""))
    return "\n".join(lines)
