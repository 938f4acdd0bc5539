"""From pictures to the copy-paste figures, through any orientation model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from ..orientation import SUBJECT, fit_mask, pictures, subject_box
from .metrics import Pairs, compare

CROP = 0.9  # of each side stays in the floor's copy of a reference (our choice)
SCALE = 0.75  # and is scaled by so much, as no output shows its subject at the reference's scale (our choice)


class PictureError(ValueError):
    """Pictures or masks that do not fit together, and what to do about it."""


def measure(
    orientation,
    references: Sequence[Tensor],
    images: Sequence[Tensor],
    reference_masks: Sequence[Tensor] | None = None,
    masks: Sequence[Tensor] | None = None,
    threshold: float = 0.5,
) -> tuple[Pairs, Pairs]:
    """(outputs, floor): references against outputs, and against their own mirrored, re-cropped selves.

    orientation.estimate(images, masks) gives azimuth, polar (degrees) and confidence, each (N,), of (H, W, 3) pictures
    and their masks or None. references, images: IMAGE batches (B, H, W, 3 or 4), one after the other; one reference
    for all images, or one each. Masks: MASK batches (B, h, w) of any size, 1 where the subject is,
    one for all or one each; left out, alpha is the mask. Raises PictureError.
    """
    originals, original_masks = gather("references", references, "reference_masks", reference_masks or ())
    outputs, output_masks = gather("images", images, "masks", masks or ())
    if len(originals) not in (1, len(outputs)):
        raise PictureError(
            f"references holds {len(originals)} pictures and images {len(outputs)}, expected one reference for all "
            "images, or one for each, in the same order. Repeat a reference with the host's RepeatImageBatch node."
        )
    changed, changed_masks = zip(*map(mirrored_crop, originals, original_masks))

    found = _angles(orientation, [*originals, *changed, *outputs], [*original_masks, *changed_masks, *output_masks])
    reference, copies, generated = found.split([len(originals), len(originals), len(outputs)])
    copies[:, 0] = -copies[:, 0] % 360  # a mirrored subject faces the other side
    floor = compare(reference, copies, threshold)
    return compare(reference.expand(len(outputs), -1), generated, threshold), floor


def mirrored_crop(image: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(H, W, 3) and its mask, mirrored, cropped about the subject (the middle, where no mask shows one) and reduced."""
    image, shape = image.float(), image.shape[:2]
    height, width = (round(CROP * side) for side in shape)
    mask = None if mask is None else fit_mask(mask, image)
    found = mask is not None and bool((mask > SUBJECT).any())
    top, bottom, left, right = subject_box(mask) if found else (0, shape[0], 0, shape[1])
    top = _begin(top, bottom, height, shape[0])
    left = _begin(left, right, width, shape[1])
    planes = rearrange(image, "h w c -> 1 c h w")
    if mask is not None:
        planes = torch.cat([planes, mask[None, None].to(planes)], dim=1)
    planes = planes[:, :, top : top + height, left : left + width].flip(-1)
    size = [max(1, round(SCALE * side)) for side in (height, width)]
    planes = functional.interpolate(planes, size, mode="bilinear", antialias=True)[0]
    return rearrange(planes[:3], "c h w -> h w c").contiguous(), None if mask is None else planes[3]


def gather(
    name: str, batches: Sequence[Tensor], mask_name: str, masks: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The pictures of IMAGE batches, and for each its mask: of the MASK batches, else its alpha, else None. Raises
    PictureError, naming the socket."""
    found: list[Tensor] = []
    found_masks: list[Tensor | None] = []
    for batch in batches:
        try:
            images, alpha = pictures(batch)
        except ValueError as error:
            raise PictureError(f"{name}: {error}") from None
        found += images
        found_masks += alpha or [None] * len(images)
    if not found:
        raise PictureError(f"{name} holds no picture, expected at least one. Connect an IMAGE output.")
    given = [mask for batch in masks for mask in (batch if batch.ndim == 3 else batch[None])]
    if len(given) not in (0, 1, len(found)):
        raise PictureError(
            f"{mask_name} holds {len(given)} masks, {name} {len(found)} pictures: expected one for all or one "
            "for each, in the same order."
        )
    return found, (given if len(given) == len(found) else given * len(found)) or found_masks


def _begin(first: int, last: int, length: int, side: int) -> int:
    """Where a crop of `length` out of `side` begins, so that first..last lie in its middle if they can."""
    return min(max(0, round((first + last - length) / 2)), side - length)


def _angles(orientation, images: list[Tensor], masks: list[Tensor | None]) -> Tensor:
    """(N, 3) azimuth, polar, confidence."""
    found = orientation.estimate(images, masks if any(mask is not None for mask in masks) else None)
    return torch.stack([found.azimuth, found.polar, found.confidence], dim=-1).double().cpu()
