"""The MLLM inside a CLIP socket: the host's own Qwen2.5-VL, quantised, LoRA-patched or from GGUF as the user has it.

Only the socket's public face is used (`load_model`, `tokenize`, `cond_stage_model`), so that whatever a loader put
behind it goes on working.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from ...dla.features import MLLMInfo
from .base import MLLM, OMNIGEN2, QWEN_IMAGE, MLLMError, Template, to_area
from .vision import CLIP_MEAN, CLIP_STD, Vision, qwen_pixels

VISION = Vision(14, 2, CLIP_MEAN, CLIP_STD)


@dataclass(frozen=True)
class Native:
    family: str
    template: Template
    drop_leading_template: bool
    reads_images: bool


# By the name under which the host's text encoder holds its LLM.
NATIVE = {
    "qwen25_7b": Native("qwen2_5_vl", QWEN_IMAGE, True, True),
    "qwen25_3b": Native("qwen2_5", OMNIGEN2, False, False),
}


class ClipMLLM(MLLM):
    """A CLIP as an MLLM. All its layers run in the host's own forward, which knows no early stop, in fp32."""

    default_size = 384  # the host's TextEncodeQwenImageEditPlus

    def __init__(self, clip, name: str = ""):
        encoder = getattr(clip, "cond_stage_model", None)
        key = getattr(encoder, "clip", None)
        native = NATIVE.get(key)
        inner = getattr(encoder, key, None) if isinstance(key, str) else None
        model = getattr(getattr(inner, "transformer", None), "model", None)
        if native is None or model is None:
            found = key if isinstance(key, str) else type(encoder).__name__
            raise MLLMError(
                f"This CLIP is {found!r}, expected a multimodal LLM: {', '.join(NATIVE)} (Qwen2.5-VL 7B as in"
                " Qwen-Image, or OmniGen2's Qwen2.5 3B, text only). Load one with the host's Load CLIP node (type"
                " qwen_image or omnigen2), or load a Hugging Face folder with Load MLLM."
            )
        self.visual = getattr(inner.transformer, "visual", None)
        self.clip, self.key, self.template = clip, key, native.template
        self.reads_images = native.reads_images and self.visual is not None
        width = model.config.hidden_size
        self.info = MLLMInfo(name or key, native.family, inner.num_layers, width, native.drop_leading_template)

    @property
    def patcher(self):
        return self.clip.patcher

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text by the CLIP's tokenizer, without its template."""
        if not text:
            return []
        return [token for token, *_ in self.clip.tokenize(text, llama_template="{}")[self.key][0]]

    @torch.no_grad()
    def run(self, text, images, size, tiles, wanted):
        seen = [to_area(image, size)[None] for image in images]
        extra = {"images": seen} if self.reads_images else {}
        # The text carries its template; a tokenizer that adds one anyway gets an empty one.
        chunks = self.clip.tokenize(text, llama_template="{}", **extra)[self.key]
        if len(chunks) != 1:
            raise MLLMError(
                f"{self.info.name} cut the prompt into {len(chunks)} pieces, expected one. Shorten the prompt."
            )
        # Emphasis as in (word:1.2) is a blend on the last layer only: read the words, leave their weights out.
        tokens = [token for token, *_ in chunks[0]]
        pairs = [[(token, 1.0) for token in tokens]]
        grids = [qwen_pixels(image[0], VISION)[1] for image in seen]

        encoder = self.clip.cond_stage_model
        inner = getattr(encoder, self.key)
        encoder.reset_clip_options()
        hook = None
        if seen and window_ordered(type(self.visual)):
            hook = self.visual.register_forward_hook(to_raster)
        try:
            if inspect.signature(self.clip.load_model).parameters:  # newer hosts estimate memory from the tokens
                self.clip.load_model({self.key: pairs})
            else:
                self.clip.load_model()
            encoder.set_clip_options({"execution_device": self.clip.patcher.load_device})
            inner.layer = "all"  # last: set_clip_options may put it back
            out = inner.encode_token_weights(pairs)
        finally:
            encoder.reset_clip_options()
            if hook is not None:
                hook.remove()
        states = out[0]
        if states.ndim != 4 or states.shape[1] != self.info.layers + 1:
            raise MLLMError(
                f"{self.info.name} gave hidden states {tuple(states.shape)}, expected (1, {self.info.layers + 1},"
                f" tokens, {self.info.width}). A node has probably replaced its forward."
            )
        states = states[:, list(wanted)]
        tokens = [token if isinstance(token, int) else None for token in map(_plain, tokens)]
        counts = [h * w // VISION.merge**2 for h, w in grids]
        mask = out[2].get("attention_mask") if len(out) > 2 else None
        mask = torch.ones(states.shape[0], states.shape[2]) if mask is None else mask
        return states, tokens, mask.bool().to(states.device), counts


def _plain(token):
    return int(token) if not isinstance(token, dict) and not torch.is_tensor(token) else token


def window_index(visual, grid: tuple[int, int]) -> Tensor:
    """Raster number of each token in the vision tower's window order; grid (h, w) in patches."""
    return visual.get_window_index(torch.tensor([[1, *grid]]))[0]


def to_raster(visual, args, tokens: Tensor) -> Tensor:
    """Forward hook of the vision tower: its tokens (n, C) from window order to row by row. It must happen here, before
    the decoder: that places token k of an image at row and column k, so that putting its output in order afterwards
    would not give what Hugging Face and newer hosts give."""
    index = window_index(visual, args[1][0, 1:].tolist())
    return tokens[index.argsort().to(tokens.device)]


@lru_cache
def window_ordered(tower: type) -> bool:
    """Whether the host's vision tower returns its tokens in window order (before 0.19) and not row by row.

    Found by trying: a tower without blocks is one map per token, so its output shows the order. Neither a version
    number nor the text of the source is asked, which forks and backports would make wrong.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        small = tower(hidden_size=16, output_hidden_size=8, intermediate_size=16, num_heads=2, num_layers=0,
                      device="cpu", dtype=torch.float32, ops=nn)  # fmt: skip
        grid = torch.tensor([[1, 20, 12]])
        patches = torch.randn(20 * 12, 3 * 2 * 14 * 14)
        raster = small.merger(small.patch_embed(patches))
        out = small(patches, grid)
    if torch.allclose(out, raster, atol=1e-5):
        return False
    if torch.allclose(out, raster[small.get_window_index(grid)[0]], atol=1e-5):
        return True
    raise MLLMError(
        "The host's Qwen2.5-VL vision tower returns its tokens in an order this pack does not know. Use Load MLLM with"
        " a Hugging Face folder, and report it with your ComfyUI version."
    )
