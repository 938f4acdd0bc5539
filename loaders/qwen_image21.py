"""Prompt and images for Qwen-Image 2.1, encoded as the host's node does it, for stages with references and without."""

from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from .conditioning import add_context_with_images
from .encode_cache import encode_reference
from .host import qwen_image21_encoder
from .mllm.native import vision_kept
from .protocols import CLIP, VAE


def encode_for_stages(
    clip: CLIP, vae: VAE, prompt: str, negative_prompt: str, images: list[Tensor | None], resolution: int
) -> tuple[list, list, dict]:
    """Positive and negative CONDITIONING, and an empty LATENT of the first image's size; images seen before are kept.

    Args:
        clip: Qwen-Image 2.1's text encoder.
        vae: Its VAE.
        prompt: For the positive one.
        negative_prompt: For the other.
        images: (b, h, w, 3 or 4) each in 0..1, what each socket brings; None = nothing.
        resolution: Square root of the area of each reference, px; 0 = its own size.

    Raises:
        ValueError: Where the host does not know the model.
    """
    encode = qwen_image21_encoder()
    if encode is None:
        raise ValueError(
            "This ComfyUI has no node TextEncodeQwenImage21, which Encode Qwen-Image 2.1 for Stages calls: expected "
            "0.37 or later. Update ComfyUI."
        )
    pictures = [image[i : i + 1] for image in images if image is not None for i in range(len(image))]
    single = {f"image_{number}": picture for number, picture in enumerate(pictures, 1)}
    arguments: dict[str, Any] = {"images": single, "resolution": resolution}
    cached = SimpleNamespace(encode=partial(encode_reference, vae))  # all that the host's node does with a VAE
    module = clip.cond_stage_model
    encoder = getattr(module, str(getattr(module, "clip", None)), None)
    with vision_kept(getattr(encoder, "transformer", None), clip.patcher):
        *pair, latent = encode(clip, prompt, negative_prompt, vae=cached, **arguments)
        if not single:
            return pair[0], pair[1], latent
        *others, _ = encode(clip, prompt, negative_prompt, **arguments)
    positive, negative = map(add_context_with_images, pair, others)
    return positive, negative, latent
