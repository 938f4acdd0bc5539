"""Multimodal LLMs, by their names under models/mllm or from a CLIP socket; nothing heavy is imported before use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ...dla.features import Features, MLLMInfo
    from ..dla import DLA
    from ..protocols import CLIP
    from .base import MLLM


def load_mllm(name: str, weight_dtype: str = "default") -> MLLM:
    """The MLLM in the folder `name` under models/mllm, see huggingface.load_folder. Raises ValueError."""
    from ..folders import find
    from .huggingface import load_folder

    return load_folder(find("mllm", name), weight_dtype)


def mllm_from_clip(clip: CLIP, name: str = "") -> MLLM:
    """The MLLM inside a CLIP socket (the host's Qwen2.5-VL). Raises MLLMError for any other text encoder."""
    from .native import ClipMLLM

    return ClipMLLM(clip, name)


def read_info(name: str) -> MLLMInfo:
    """Which MLLM the folder `name` under models/mllm holds, from its config.json alone. Raises ValueError."""
    from ..folders import find
    from .checkpoint import read_info

    return read_info(find("mllm", name))


def encode_subject(
    mllm: MLLM, prompt: str, sockets: Sequence[Tensor | None] = (), dla: DLA | None = None, **options
) -> Features:
    """Features of a prompt read together with the images of some IMAGE sockets; a batch is several references.

    A DLA is checked against the MLLM, and only the layers that it reads are run. options: see MLLM.encode. Raises
    ValueError for unusable images, a DLA of another MLLM, or what the MLLM cannot read.
    """
    from ..images import collect_images

    if dla is not None:
        dla.check_mllm(mllm.info)
        options["layers"] = dla.config.required_layers
    return mllm.encode(prompt, collect_images(*sockets, required=False), **options)
