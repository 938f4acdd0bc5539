"""Masks of subjects: 1 where the subject is."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .images import ImageError, check_values

SUBJECT = 0.05  # mask above this belongs to the subject (published: above 0, which masks seldom are outside)


def split_batch(image: Tensor, mask: Tensor | None = None) -> tuple[list[Tensor], list[Tensor] | None]:
    """IMAGE (B, H, W, 3 or 4) and MASK (h, w) or (M, h, w), M = 1 for all or B, as B pictures and B masks or None.

    Alpha is the mask where no other is given. Raises ImageError for other shapes and for values that are no numbers.
    """
    if image.ndim != 4 or image.shape[-1] not in (3, 4):
        raise ImageError(f"image is {tuple(image.shape)}, expected an IMAGE (batch, height, width, 3).")
    for number, picture in enumerate(image):
        check_values(picture, f"Picture {number + 1} of {len(image)}")
    if mask is None and image.shape[-1] == 4:
        mask = image[..., 3]
    image = image[..., :3]
    if mask is None:
        return list(image), None
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or len(mask) not in (1, len(image)):
        raise ImageError(
            f"mask is {tuple(mask.shape)} for {len(image)} picture(s), expected one MASK for all or one per picture, "
            "in their order. The host's ImageFromBatch picks pictures from a batch."
        )
    return list(image), list(mask.expand(len(image), -1, -1))


def fit_mask(mask: Tensor, image: Tensor) -> Tensor:
    """(h, w) mask as (H, W) for an (H, W, 3) image, clamped to 0..1."""
    mask = mask.to(image.device, torch.float32)
    if mask.shape != image.shape[:2]:
        mask = interpolate(mask[None, None], size=tuple(image.shape[:2]), mode="bilinear", antialias=True)[0, 0]
    return mask.clamp(0, 1)


def subject_box(mask: Tensor) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) in px, bottom and right excluded, of what an (H, W) mask shows.

    Raises ImageError where it shows nothing.
    """
    rows, columns = (mask > SUBJECT).nonzero(as_tuple=True)
    if not len(rows):
        raise ImageError(
            f"The mask shows no subject: its highest value is {float(mask.max()):.3g}, expected 1 where the subject "
            "is. Leave the mask open to read the whole picture, or invert it if it marks the background."
        )
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


def shown_box(mask: Tensor | None, image: Tensor) -> tuple[int, int, int, int]:
    """`subject_box` of an (H, W) mask, or the whole (H, W, 3) picture where there is none or it shows nothing."""
    if mask is None or not bool((mask > SUBJECT).any()):
        return 0, image.shape[0], 0, image.shape[1]
    return subject_box(mask)


def empty_masks(images: Sequence[Tensor], masks: Sequence[Tensor | None] | None) -> set[int]:
    """Numbers, from 0, of the (H, W, 3) pictures whose mask shows nothing."""
    pairs = enumerate(zip(images, masks or []))
    return {n for n, (image, mask) in pairs if mask is not None and not bool((fit_mask(mask, image) > SUBJECT).any())}
