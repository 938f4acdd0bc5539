"""Reference latents: the VAE's view of the subject, sized and placed as the DiT's family expects it."""

import logging
import re
from collections.abc import Iterable, Mapping
from math import isfinite, sqrt
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ..common.images import cut_off
from .backbones import backbone_of, pixel_family, titles, unread_family
from .conditioning import ReferenceSettings, add_references, reference_latents, reference_placement
from .dit import dit_of
from .encode_cache import encode_reference
from .host import IGNORES_REFERENCES, mentions, reads_references, show_on_node
from .images import collect_images
from .protocols import VAE, Model

UNO_LONGEST_SIDE = 512  # UNO's own preprocessing for one reference (it uses 320 for several)
UNKNOWN_FAMILY = (
    "this pack does not know the diffusion model %s (it knows %s). At which size it "
    "wants reference latents, and how placed, is not known: compare pictures. Only strengths 0 and 1 work."
)
IDENTITY_REFUSED = (
    "Add Identity: {family} ({model}) is refused. ComfyUI's source of it could not be read when this pack was written: "
    "at which size it wants reference latents, how it places them and how many it takes is not known. Add them with "
    "ComfyUI's own nodes, as the model's template does, or choose another model (docs/backbones.md), as FLUX.2 Klein."
)
NO_VAE_TOKENS = (
    "Add Identity: {family} reads reference images as patches of pixels and has no VAE, so that there are no VAE "
    "tokens to add. Remove Add Identity and connect the images to ComfyUI's node for this model (HiDream-O1 Reference "
    "Images)."
)
LARGEST_AREA = 1024 * 1024  # of the other families' defaults; smaller pictures are not enlarged

log = logging.getLogger(__name__)


def add_identity(
    conditioning: list,
    model: Model,
    vae: VAE,
    image: Tensor,
    mask: Tensor | None = None,
    *,
    strength: float = 1.0,
    size: int = 0,
    placement: str = "auto",
    region: Tensor | None = None,
    stages: Any = None,
) -> list:
    """A copy of CONDITIONING with one more reference latent per picture of `image` (b, h, w, 3) in 0..1.

    The aspect ratio is kept; what does not fill a token is cut off at the edges. Raises ValueError where the model,
    whose family decides the default size and placement, cannot do it.

    mask: (h, w) or (b, h, w), 1 = use. strength: multiplied into the schedule's. size: longest side of each reference,
    px; 0 = the default. placement: see reference_method. region: (h, w) or (b, h, w) over
    the canvas, 1 = image tokens there read the reference. stages: a schedule of its own, multiplied into the run's.
    """
    if not (isfinite(strength) and strength >= 0):
        raise ValueError(f"The reference's strength is {strength}, expected a finite number >= 0.")
    backbone = backbone_of(model)
    diffusion_model = dit_of(model.model)
    if family := unread_family(model):
        raise ValueError(IDENTITY_REFUSED.format(family=family, model=type(diffusion_model).__name__))
    if family := pixel_family(model):
        raise ValueError(NO_VAE_TOKENS.format(family=family))
    if warning := _model_warning(model):
        log.warning("Add Identity: %s", warning)
    method = reference_method(model, placement)
    side = backbone.reference_grid if backbone else 16
    images = collect_images(image)
    count = max((len(reference_latents(values)) for _, values in conditioning), default=0) + len(images)
    if backbone and backbone.most_references is not None and count > backbone.most_references:
        raise ValueError(
            f"{backbone.title} takes at most {backbone.most_references} references, this makes {count}. Leave some out."
        )
    latents, settings = [], []
    masks, regions = _masks(mask, len(images), "mask"), _masks(region, len(images), "region")
    for picture, picture_mask, picture_region in zip(images, masks, regions):
        width, height = reference_size(picture.shape[1], picture.shape[0], size, method == "uxo", side)
        latents.append(encode_reference(vae, resize(picture.movedim(-1, 0), width, height).movedim(0, -1)[None]))
        if picture_mask is not None:
            picture_mask = _stretched(picture_mask, (picture.shape[0], picture.shape[1]))
            picture_mask = resize(picture_mask[None], width, height)[0].clamp(0, 1)
            if not picture_mask.any():
                raise ValueError(
                    "The mask is black everywhere, which removes the whole reference. White is "
                    "what to use: invert the mask, or set strength 0."
                )
        if picture_region is not None and not picture_region.any():
            raise ValueError(
                "The region is black everywhere, so that no part of the picture reads the reference. White is where "
                "it is read: invert the region, or set strength 0."
            )
        settings.append(ReferenceSettings(strength, picture_mask, picture_region, stages))
    return add_references(conditioning, latents, settings, method)


def cut_hints(
    model: Model, sockets: Mapping[str, Tensor | None], size: int = 0, placement: str = "auto", **_: Any
) -> list[str]:
    """What Add Identity cuts off the pictures of some IMAGE sockets, (b, h, w, 3) by name: a text for each that loses.

    size, placement: see add_identity.
    """
    backbone = backbone_of(model)
    grid, uno = backbone.reference_grid if backbone else 16, reference_method(model, placement) == "uxo"
    pictures = {name: image.shape[1:3] for name, image in sockets.items() if image is not None}
    lost = {name: cut_off(w, h, *reference_size(w, h, size, uno, grid)) for name, (h, w) in pictures.items()}
    return [f"{name}: {text}" for name, text in lost.items() if text]


def reference_method(model: Model, placement: str) -> str | None:
    """The host's `reference_latents_method`, None = the model's default. Hosts take one unknown to them for another.

    placement: the method, the title of one of the family's releases, or "auto" = the family's default.
    """
    backbone = backbone_of(model)
    method: str | None = placement
    if placement == "auto":
        method = backbone.default_placement if backbone else None
    elif backbone:
        method = {release.title: release.placements[0] for release in backbone.releases}.get(placement, placement)
    if method is None:
        return None
    diffusion_model = dit_of(model.model)
    known = backbone is None or method in backbone.placements
    unnamed = backbone is not None and method == backbone.unnamed_placement
    if not known or not (unnamed or mentions(diffusion_model, method)):
        remedy = "Choose another placement, update ComfyUI, or load the model with ComfyUI's own loader."
        if backbone and not backbone.placements:
            remedy = f"Choose auto: {backbone.title} places references itself."
        raise ValueError(
            f"{type(diffusion_model).__name__} does not know the placement {method!r} here "
            f"and would silently place references elsewhere. {remedy}"
        )
    return method


def _model_warning(model: Model) -> str | None:
    """Why a MODEL may not do what is asked of its references; None = nothing speaks against it."""
    module = dit_of(model.model)
    if not reads_references(module):
        return IGNORES_REFERENCES % type(module).__name__
    return None if backbone_of(model) else UNKNOWN_FAMILY % (type(module).__name__, titles())


def report_placement(
    model: Model, conditioning: list, files: Iterable[str], node_id: str | None = None, hints: Iterable[str] = ()
) -> None:
    """Shows a CONDITIONING's placement on its node in the editor; warns, also in the log, where a file wants another.

    What is not known of the model's family is shown there, too.

    It is shown where all is well, too: the editor takes no empty text, so that nothing else would clear a warning.

    Args:
        model: The DiT that will sample.
        conditioning: With reference latents; without any, nothing is said.
        files: Names of the files that the model is made of, the only sign of some releases.
        node_id: Of the node in the queued graph; None = the log alone.
        hints: Further warnings, shown with these.
    """
    placed = [reference_placement(values) for _, values in conditioning if reference_latents(values)]
    if not placed:
        return
    backbone, module = backbone_of(model), dit_of(model.model)
    placement = placed[0] or getattr(getattr(module, "params", module), "default_ref_method", None)
    name = placement or "the model's own"
    warnings = [
        f"choose the placement {release.title!r}. By its name, {file!r} is for {' or '.join(release.placements)}, but"
        f" these references get {name}."
        for file in files
        for release in (backbone.releases if backbone else ())
        if re.search(release.file_name, file.lower().replace("_", "-")) and placement not in release.placements
    ]
    for warning in warnings:
        log.warning("Add Identity: %s", warning)
    if unsure := _model_warning(model):
        warnings.append(unsure)
    warnings += hints
    show_on_node("\n".join([f"Placement: {name}", *(f"Warning: {warning}" for warning in warnings)]), node_id)


def reference_size(width: int, height: int, size: int = 0, uno: bool = False, grid: int = 16) -> tuple[int, int]:
    """Size in px of a `width` x `height` px reference, of whole tokens (`grid` px a side).

    size: longest side that is asked for, px; 0 = the default: with `uno` UNO's, else at most one megapixel, never
    enlarged.

    Source: UNO's preprocessing for its placement; else the host's edit nodes, without their enlarging (our choice).
    """
    if size or uno:
        scale = (size or UNO_LONGEST_SIDE) / max(width, height)
    else:
        scale = min(1.0, sqrt(LARGEST_AREA / (width * height)))
    of_tokens = [max(grid, int(side * scale + 1e-6) // grid * grid) for side in (width, height)]
    return of_tokens[0], of_tokens[1]


def resize(picture: Tensor, width: int, height: int) -> Tensor:
    """(c, h, w) to exactly width x height: scaled evenly, then cut at the centre. Untouched where it already fits."""
    if picture.shape[-2:] == (height, width):
        return picture
    method = "area" if picture.shape[-1] >= width and picture.shape[-2] >= height else "bicubic"
    return comfy.utils.common_upscale(picture[None], width, height, method, "center")[0].clamp(0, 1)


def _stretched(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """A mask drawn at another size of the same picture, brought to the picture's."""
    if tuple(mask.shape) == tuple(shape):
        return mask
    return torch.nn.functional.interpolate(mask[None, None].float(), size=tuple(shape), mode="bilinear")[0, 0]


def _masks(mask: Tensor | None, count: int, what: str) -> list[Tensor | None]:
    if mask is None:
        return [None] * count
    if not mask.isfinite().all():
        raise ValueError(f"The {what} holds values that are NaN or infinite, expected 0 to 1. Check its source.")
    mask = mask.float().reshape(-1, *mask.shape[-2:])  # bool, too
    if len(mask) not in (1, count):
        raise ValueError(f"{len(mask)} {what}s for {count} images. Give one {what} for all, or one for each image.")
    return [mask[i % len(mask)] for i in range(count)]
