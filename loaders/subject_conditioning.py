"""From prompts and reference images to positive, negative and an empty latent: what a chain of single nodes makes."""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from .backbones import backbone_of
from .conditioning import aggregate_conditioning
from .dit import context_width
from .dla import DLA, check_dit
from .host import fit_latent, to_intermediate
from .images import collect_images
from .mllm import encode_subject
from .mllm.base import MLLM
from .protocols import VAE, Model
from .reference_latents import LARGEST_AREA, add_identity


def subject_conditioning(
    model: Model,
    vae: VAE,
    mllm: MLLM,
    prompt: str,
    negative_prompt: str = "",
    images: Sequence[Tensor | None] = (),
    masks: Sequence[Tensor | None] = (),
    regions: Sequence[Tensor | None] = (),
    *,
    dla: DLA | None = None,
    pooled_from: list | None = None,
    width: int = 0,
    height: int = 0,
    batch_size: int = 1,
    encode_negative: bool = True,
    **reference,
) -> tuple[list, list, dict]:
    """Positive and negative CONDITIONING with the references of some IMAGE sockets, and an empty LATENT for the model.

    The negative has the references too. Its text is read with the images, as the stock nodes of Qwen-Image-Edit do,
    or, for a DLA, alone, as DLAs are trained.

    Args:
        model: The DiT that will sample; its family decides sizes and placement.
        vae: The DiT's VAE.
        mllm: Reads prompts and images; one for text alone reads the prompts alone.
        prompt: What the picture shows; may be empty.
        negative_prompt: What CFG leads away from; may be empty.
        images: Each (b, h, w, 3) in 0..1 or None; a batch is several references.
        masks: Of the image at the same position, (h, w) or (b, h, w), 1 = use; None = all of it.
        regions: Of the image at the same position, (h, w) or (b, h, w) over the canvas, 1 = image tokens there read it;
            None = all of the canvas.
        dla: None = the context that the MLLM's own text encoder makes.
        pooled_from: See aggregate_conditioning; for the positive alone.
        width: Of the picture, px, brought to whole tokens; 0 = fitting: see canvas_size.
        height: The same.
        batch_size: Pictures in the latent.
        encode_negative: False = the negative is the positive with zeros for tokens, without a pass of the MLLM.
        **reference: strength, size and placement of each reference, see add_identity.

    Raises:
        ValueError: For parts that do not belong together, unusable images (by their socket), a mask without an image.
    """
    pictures = collect_images(*images, required=False)
    for name, sockets in (("mask", masks), ("region", regions)):
        for number, socket in enumerate(sockets, 1):
            if socket is not None and (number > len(images) or images[number - 1] is None):
                raise ValueError(
                    f"{name}_{number} is connected, but image_{number} is not. Connect the image of this {name}."
                )
    _check_width(model, mllm, dla)
    seen = images if mllm.reads_images else ()
    layers = None if dla else mllm.stock.numbers(mllm.info.layers)  # those above are not run
    features = encode_subject(mllm, prompt, seen, dla, layers=layers)
    positive = aggregate_conditioning(features, dla, pooled_from=pooled_from)
    if encode_negative:
        features = encode_subject(mllm, negative_prompt, seen if dla is None else (), dla, layers=layers)
        negative = aggregate_conditioning(features, dla)
    else:
        negative = [[torch.zeros_like(tokens), {**values, "pooled_output": None}] for tokens, values in positive]
    both = positive + negative  # in one list, so that each image goes through the VAE once
    for number, image in enumerate(images, 1):
        if image is not None:
            mask, region = (sockets[number - 1] if number <= len(sockets) else None for sockets in (masks, regions))
            try:
                both = add_identity(both, model, vae, image, mask, region=region, **reference)
            except ValueError as error:
                raise ValueError(f"image_{number}: {error}") from error
    backbone = backbone_of(model)
    token = backbone.token_side if backbone else 16
    pixels = backbone.latent_downscale if backbone else vae.spacial_compression_encode()
    first = pictures[0].shape[:2] if pictures else (1, 1)
    width, height = canvas_size(first[1] / first[0], width, height, token)
    empty = torch.zeros(batch_size, 1, height // pixels, width // pixels)
    return (
        both[: len(positive)],
        both[len(positive) :],
        {"samples": to_intermediate(fit_latent(model, {"samples": empty}))},
    )


def canvas_size(aspect_ratio: float, width: int = 0, height: int = 0, grid: int = 16) -> tuple[int, int]:
    """Width and height in px, of whole tokens (`grid` px a side); 0 = as the aspect ratio (width / height) has it.

    Where both are 0 the area is about one megapixel.
    """
    if not width and not height:
        width_px, height_px = sqrt(LARGEST_AREA * aspect_ratio), sqrt(LARGEST_AREA / aspect_ratio)
    else:
        width_px, height_px = width or height * aspect_ratio, height or width / aspect_ratio
    return max(grid, round(width_px / grid) * grid), max(grid, round(height_px / grid) * grid)


def _check_width(model: Model, mllm: MLLM, dla: DLA | None) -> None:
    """Before anything is run: whether the DiT reads the tokens that the MLLM or the DLA makes."""
    backbone, width = backbone_of(model), context_width(model)
    if dla is not None:
        check_dit(dla.config, dla.name, width, backbone.name if backbone else "")
    elif width not in (None, mllm.context_width):
        raise ValueError(
            f"{mllm.info.name} makes tokens {mllm.context_width} wide, but this diffusion model"
            f" ({backbone.title if backbone else type(model.model).__name__}) reads tokens {width} wide. Connect the"
            " MLLM that belongs to the model, or a DLA trained for both."
        )
