"""Pictures as DINO, CLIP and Orient Anything take them: the published preprocessing, on tensors."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from math import floor

from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from ..common.images import SLIMMEST, ImageError, cut_off
from ..common.masks import fit_mask, subject_box

log = logging.getLogger(__name__)

# The published normalisations (RGB); part of the weights, so they are not read from a preprocessor file.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
HALF_LOST = 0.5  # share that the published crop may take without a word: of a square it takes 23 %, of 3:2 49 %
LARGEST = 4096  # px of a longest side from which a subject is cut out; what is larger is reduced before
FILL = 0.85  # longest side of the cut-out subject / side of the square that it is put into (Orient Anything)


@dataclass(frozen=True)
class Preprocessing:
    """Shorter side to `resize` px (bicubic, antialiased, 8 bits), the central `crop` x `crop` px, normalisation.

    The values are rounded to 8 bits as in a picture file. mean, std: of the training set, RGB; `normalisation`: whose.
    """

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


DINO = Preprocessing(256, 224, IMAGENET_MEAN, IMAGENET_STD, "ImageNet")  # DINO's and DINOv2's evaluation


def clip_preprocessing(size: int) -> Preprocessing:
    """CLIP's for an input of `size` px: the shorter side to that size, and the square at its centre."""
    return Preprocessing(size, size, CLIP_MEAN, CLIP_STD, "CLIP's")


def preprocess(image: Tensor, how: Preprocessing, begin: Callable[[float], int] = round) -> Tensor:
    """(H, W, 3) in 0..1 to (3, crop, crop) float32, as torchvision's Resize, CenterCrop and Normalize would.

    begin: how the half px is rounded where the crop is not in the middle: torchvision rounds, transformers floors.
    Raises ImageError for a picture so slender that its shorter side cannot be enlarged.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    if max(height, width) > SLIMMEST * short:
        raise ImageError(
            f"A picture is {width} x {height} px, expected sides at most {SLIMMEST}:1 apart. Crop it to the subject."
        )
    size = (how.resize * height // short, how.resize * width // short)
    if lost := cut_off(width, height, how.crop, how.crop, HALF_LOST, how.resize / short):
        log.warning("Preprocessing with %s normalisation: %s", how.normalisation, lost)
    image = rearrange(image.float(), "h w c -> 1 c h w")
    if size != (height, width):
        image = interpolate(image, size=size, mode="bicubic", antialias=True)
    top, left = (begin((side - how.crop) / 2) for side in size)
    image = image[0, :, top : top + how.crop, left : left + how.crop]
    image = (image.clamp(0, 1) * 255).round() / 255
    mean, std = (image.new_tensor(values)[:, None, None] for values in (how.mean, how.std))
    return (image - mean) / std


def preprocess_subject(image: Tensor, mask: Tensor | None = None) -> Tensor:
    """(H, W, 3) in 0..1 to (3, 224, 224) as Orient Anything takes it: the subject on black, at FILL of a square.

    The mask is (h, w) of any size, 1 where the subject is. None: the picture as it is, and what of it is longer than
    square is lost. Raises ImageError where the mask shows no subject.

    Source: Orient Anything's own cut-out, then transformers' image processor of DINOv2.
    """
    image = image.float().clamp(0, 1)
    if max(image.shape[:2]) > LARGEST:
        scale = LARGEST / max(image.shape[:2])
        planes = rearrange(image, "h w c -> 1 c h w")
        image = interpolate(planes, size=[max(1, round(side * scale)) for side in image.shape[:2]], mode="area")
        image = rearrange(image, "1 c h w -> h w c")
    if mask is not None:
        mask = fit_mask(mask, image)
        image = _centred(image * mask[..., None], subject_box(mask))
    return preprocess(image, DINO, floor)


def _centred(image: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """What is in the box, in the middle of a black square of which its longest side takes FILL."""
    top, bottom, left, right = box
    height, width = bottom - top, right - left
    longest = max(height, width)
    side = int(longest / FILL)
    # published in two steps, first square and then larger; each may be half a pixel off the middle
    down, across = ((longest - size) // 2 + (side - longest) // 2 for size in (height, width))
    square = image.new_zeros(side, side, 3)
    square[down : down + height, across : across + width] = image[top:bottom, left:right]
    return square
