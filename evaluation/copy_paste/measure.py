"""From pictures to the copy-paste metrics and their report, through any orientation model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from ...common.drawing.sheet import to_tensor
from ...common.images import ImageError
from ...common.masks import fit_mask, shown_box, split_batch
from .metrics import Pairs, compare
from .plot import report_plot
from .report import captions, report_csv, report_json, report_text

CROP = 0.9  # of each side stays in the floor's copy of a reference (our choice)
SCALE = 0.75  # and is scaled by so much, as no output shows its subject at the reference's scale (our choice)


@dataclass(frozen=True, eq=False)
class Report:
    """What Copy-Paste Report gives: texts, a caption for each output, and a plot (1, h, w, 3) in 0..1."""

    text: str
    csv: str
    json: str
    captions: list[str]
    plot: Tensor


def copy_paste(orientation, *arguments) -> Report:
    """What `measure` gives for these arguments, as a report; `orientation.name` says whose angles they are."""
    outputs, floor = measure(orientation, *arguments)
    about = (outputs, floor, orientation.name)
    table = report_csv(outputs, floor)
    return Report(report_text(*about), table, report_json(*about), captions(outputs), to_tensor(report_plot(*about)))


def measure(
    orientation,
    references: Sequence[Tensor],
    images: Sequence[Tensor],
    reference_masks: Sequence[Tensor] | None = None,
    masks: Sequence[Tensor] | None = None,
    threshold: float = 0.5,
) -> tuple[Pairs, Pairs]:
    """Compares references with outputs, and with their own mirrored, re-cropped selves.

    Args:
        orientation: Its `estimate(images, masks)` gives azimuth, polar (degrees) and confidence, each (N,), of N
            pictures (H, W, 3) and their masks or None.
        references: IMAGE batches (B, H, W, 3 or 4), one after the other; one reference for all images, or one each.
        images: IMAGE batches of the outputs.
        reference_masks: MASK batches (B, h, w) of any size, 1 where the subject is, one for all or one each; left out,
            alpha is the mask.
        masks: Likewise, of `images`.
        threshold: A pair counts where both confidences are at least this.

    Returns:
        (outputs, floor): the pairs of references and outputs, and of references and their own changed selves.

    Raises:
        ImageError: Pictures or masks do not fit together.
    """
    originals, original_masks = _gather("references", references, "reference_masks", reference_masks or ())
    outputs, output_masks = _gather("images", images, "masks", masks or ())
    if len(originals) not in (1, len(outputs)):
        raise ImageError(
            f"references holds {len(originals)} pictures and images {len(outputs)}, expected one reference for all "
            "images, or one for each, in the same order. Repeat a reference with the host's RepeatImageBatch node."
        )
    changed, changed_masks = zip(*map(_mirrored_crop, originals, original_masks))

    found = _angles(orientation, [*originals, *changed, *outputs], [*original_masks, *changed_masks, *output_masks])
    reference, copies, generated = found.split([len(originals), len(originals), len(outputs)])
    copies[:, 0] = -copies[:, 0] % 360  # a mirrored subject faces the other side
    floor = compare(reference, copies, threshold)
    return compare(reference.expand(len(outputs), -1), generated, threshold), floor


def _mirrored_crop(image: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(H, W, 3) and its mask, mirrored, cropped about the subject (the middle, where no mask shows one) and reduced."""
    image, shape = image.float(), image.shape[:2]
    height, width = (round(CROP * side) for side in shape)
    mask = None if mask is None else fit_mask(mask, image)
    top, bottom, left, right = shown_box(mask, image)
    top = _start(top, bottom, height, shape[0])
    left = _start(left, right, width, shape[1])
    planes = rearrange(image, "h w c -> 1 c h w")
    if mask is not None:
        planes = torch.cat([planes, mask[None, None].to(planes)], dim=1)
    planes = planes[:, :, top : top + height, left : left + width].flip(-1)
    size = [max(1, round(SCALE * side)) for side in (height, width)]
    planes = functional.interpolate(planes, size, mode="bilinear", antialias=True)[0]
    return rearrange(planes[:3], "c h w -> h w c").contiguous(), None if mask is None else planes[3]


def _gather(
    name: str, batches: Sequence[Tensor], mask_name: str, masks: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The pictures of IMAGE batches, and for each its mask: of the MASK batches, else its alpha, else None."""
    found: list[Tensor] = []
    found_masks: list[Tensor | None] = []
    for batch in batches:
        try:
            images, alpha = split_batch(batch)
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from None
        found += images
        found_masks += alpha or [None] * len(images)
    if not found:
        raise ImageError(f"{name} holds no picture, expected at least one. Connect an IMAGE output.")
    given = [mask for batch in masks for mask in batch.reshape(-1, *batch.shape[-2:])]
    if len(given) not in (0, 1, len(found)):
        raise ImageError(
            f"{mask_name} holds {len(given)} masks, {name} {len(found)} pictures: expected one for all or one "
            "for each, in the same order."
        )
    return found, (given if len(given) == len(found) else given * len(found)) or found_masks


def _start(first: int, last: int, length: int, side: int) -> int:
    """Where a crop of `length` out of `side` begins, so that first..last are in its middle if they can be."""
    return min(max(0, round((first + last - length) / 2)), side - length)


def _angles(orientation, images: list[Tensor], masks: list[Tensor | None]) -> Tensor:
    """(N, 3) azimuth, polar, confidence."""
    found = orientation.estimate(images, masks if any(mask is not None for mask in masks) else None)
    return torch.stack([found.azimuth, found.polar, found.confidence], dim=-1).double().cpu()
