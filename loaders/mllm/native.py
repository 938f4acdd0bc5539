"""The MLLM inside a CLIP socket: the host's own Qwen2.5-VL, quantised, LoRA-patched or from GGUF as the user has it.

Only the socket's public interface is used (`load_model`, `tokenize`, `cond_stage_model`), so that it works with
whatever a loader put behind it.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..host import load_text_encoder
from ..protocols import CLIP
from .base import MLLM, MLLMError
from .families import CLIP_FAMILIES
from .vision import qwen_grid, to_area


class ClipMLLM(MLLM):
    """A CLIP as an MLLM; all its layers run in the host's own forward, which cannot stop early, in fp32."""

    def __init__(self, clip: CLIP, name: str = ""):
        encoder = getattr(clip, "cond_stage_model", None)
        key: Any = getattr(encoder, "clip", None)
        family = CLIP_FAMILIES.get(key)
        inner: Any = getattr(encoder, key, None) if isinstance(key, str) else None
        model = getattr(getattr(inner, "transformer", None), "model", None)
        if family is None or model is None:
            found = key if isinstance(key, str) else type(encoder).__name__
            raise MLLMError(
                f"This CLIP is {found!r}, expected a multimodal LLM: {', '.join(CLIP_FAMILIES)} (Qwen2.5-VL 7B as in"
                " Qwen-Image, or OmniGen2's Qwen2.5 3B, text only). Load one with the host's Load CLIP node (type"
                " qwen_image or omnigen2), or load a Hugging Face folder with Load MLLM."
            )
        super().__init__(family.info(name or key, inner.num_layers, model.config.hidden_size), family)
        self.clip, self.patcher, self.key = clip, clip.patcher, key
        self.vision: Any = family.vision
        self.visual: Any = getattr(inner.transformer, "visual", None)
        self.reads_images = self.reads_images and self.visual is not None

    def tokenize(self, text: str) -> list[int]:  # noqa: D102
        if not text:
            return []
        return [token for token, *_ in self.clip.tokenize(text, llama_template="{}")[self.key][0]]

    @torch.no_grad()
    def run(self, text, images, size, tiles, wanted):  # noqa: D102
        resized = [to_area(image, size)[None] for image in images]
        extra: dict[str, Any] = {"images": resized} if self.reads_images else {}
        # The text carries its template; a tokenizer that adds one anyway gets an empty one.
        chunks = self.clip.tokenize(text, llama_template="{}", **extra)[self.key]
        if len(chunks) != 1:
            raise MLLMError(
                f"{self.info.name} cut the prompt into {len(chunks)} pieces, expected one. Shorten the prompt."
            )
        # Emphasis as in (word:1.2) is a blend on the last layer only: read the words, leave their weights out.
        tokens = [token for token, *_ in chunks[0]]
        pairs = [[(token, 1.0) for token in tokens]]
        grids = [qwen_grid(image.shape[1], image.shape[2], self.vision) for image in resized]

        encoder = self.clip.cond_stage_model
        inner = getattr(encoder, self.key)
        encoder.reset_clip_options()
        tower: Any = type(self.visual)
        hook = None
        if resized and window_ordered(tower):
            hook = self.visual.register_forward_hook(to_raster)
        try:
            load_text_encoder(self.clip, {self.key: pairs})
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
        tokens = [None if isinstance(token, dict) or torch.is_tensor(token) else int(token) for token in tokens]
        mask = out[2].get("attention_mask") if len(out) > 2 else None
        mask = torch.ones(states.shape[0], states.shape[2]) if mask is None else mask
        return states, tokens, mask.bool().to(states.device), grids


def to_raster(visual, args, tokens: Tensor) -> Tensor:
    """Forward hook of the vision tower: its tokens (n, C) from window order to row by row.

    It must happen before the decoder, which gives token k of an image the k-th raster position: reordering the output
    of the decoder would not give what Hugging Face and newer hosts give.
    """
    index = visual.get_window_index(args[1].cpu())[0]
    return tokens[index.argsort().to(tokens.device)]


@lru_cache
def window_ordered(tower: type) -> bool:
    """Whether the host's vision tower returns its tokens in window order (before 0.19) and not row by row.

    Found by trying: a tower without blocks is one map per token, so its output shows the order. A version number or
    the source text would be wrong on forks and backports. Raises MLLMError for another order.
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
