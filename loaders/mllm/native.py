"""The MLLM inside a CLIP socket: the host's own, quantised, LoRA-patched or from GGUF as the user has it.

Only the socket's public interface is used (`load_model`, `tokenize`, `cond_stage_model`), so that it works with
whatever a loader put behind it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...dla.features import ImageGrid
from ..encode_cache import MLLM_STATES, content, stored, weights
from ..host import load_text_encoder
from ..protocols import CLIP
from .base import MLLM, MLLMError
from .encoders import ENCODERS, built_on, encoder_of, titles
from .vision import Vision, image_numbers, qwen_grid, qwen_pixels, to_grid

log = logging.getLogger(__name__)


class ClipMLLM(MLLM):
    """A CLIP as an MLLM; its layers up to the last wanted run in one pass of the host's forward; images are kept."""

    def __init__(self, clip: CLIP, name: str = ""):
        module = getattr(clip, "cond_stage_model", None)
        keys = (getattr(module, "clip", None), getattr(module, "text_encoder_key", None))  # the second of LTX-2's
        key: Any = next(filter(None, keys), getattr(getattr(clip, "tokenizer", None), "embedding_key", None))
        encoder = encoder_of(module, key)
        alone = getattr(module, "gemma3_12b", module)  # LTX-2's name for any LLM; Gemma 3 12B is the module itself
        inner: Any = getattr(module, key, alone) if isinstance(key, str) else None
        model = getattr(getattr(inner, "transformer", None), "model", None)
        if encoder is None or model is None:
            found = built_on(module) or (key if isinstance(key, str) else type(module).__name__)
            known = ", ".join(dict.fromkeys(key for encoder in ENCODERS for key in encoder.keys))
            raise MLLMError(
                f"This CLIP is {found!r}, expected an LLM: {known}. Load the text encoder of one of these models with"
                f" the host's Load CLIP node and its type: {titles()}. Or load a Hugging Face folder with Load MLLM."
            )
        if other := built_on(module):
            log.warning(
                "MLLM from CLIP: this CLIP is %s's. It is read as that of %s, so that without a DLA the context is not"
                " the one that %s samples with.", other, encoder.title, other,
            )  # fmt: skip
        family, drop = encoder.family, encoder.drop_leading_template
        super().__init__(family.info(name or key, inner.num_layers, model.config.hidden_size, drop), family)
        self.clip, self.patcher, self.key = clip, clip.patcher, key
        self.encoder, self.stock, self.prefix = encoder, encoder.stock, encoder.prefix
        self.drop_header = encoder.drop_header
        self.most_images, self._inner, self._model = encoder.most_images, inner, model
        tokenizer: Any = clip.tokenizer  # whose name for the LLM is another with Gemma 3 4B's vision tower
        self.tokenizer: Any = getattr(tokenizer, key, getattr(tokenizer, getattr(tokenizer, "clip", ""), tokenizer))
        self.starts = int(getattr(self.tokenizer, "start_token", None) is not None)
        self.template = encoder.template or family.template
        self.fixed_size = getattr(inner.transformer, "image_size", 0)  # Gemma 3's
        self.default_size = self.fixed_size or encoder.default_size or family.default_size
        if getattr(model, "norm", None) is None:  # pruned: the last layer is as it is
            self.stock = replace(self.stock, normed=True)
        self.vision: Any = family.vision
        self.visual: Any = _visual(inner.transformer)
        if getattr(model.config, "vision_bidirectional", False):  # Gemma 4 31B, 12B: not as the original in every layer
            self.visual = None
        self.reads_images = encoder.reads_images and self.visual is not None

    def tokenize(self, text: str) -> list[int]:  # noqa: D102
        pad = getattr(self.tokenizer, "pad_token", None)
        tokens = self._tokens(text) if text else []
        while tokens and tokens[0] in (getattr(self.tokenizer, "start_token", None), pad):
            del tokens[0]
        while tokens and tokens[-1] == pad:
            del tokens[-1]
        return [int(token) for token in tokens]

    def _tokens(self, text: str, **images: Any) -> list[Any]:
        """The host's tokens of a text that carries its template."""
        # a tokenizer that adds a template anyway gets an empty one; thinking: Qwen3-VL's appends to it otherwise
        chunks: Any = self.clip.tokenize(text, llama_template="{}", thinking=True, **images)
        if isinstance(chunks, dict):
            chunks = chunks.get(self.key) or next(iter(chunks.values()))
        if len(chunks) != 1:
            raise MLLMError(
                f"{self.info.name} cut the prompt into {len(chunks)} pieces, expected one. Shorten the prompt."
            )
        return [token for token, *_ in chunks[0]]

    @torch.no_grad()
    def run(self, text, images, size, tiles, wanted):  # noqa: D102
        resized = [self.encoder.resize(image, size)[None] for image in images]
        tokens = self._tokens(text, **({"images": resized} if self.reads_images else {}))
        grids = [qwen_grid(image.shape[1], image.shape[2], self.vision) for image in resized]
        if images and not any(isinstance(token, dict) for token in tokens):
            tokens = self._with_images(text, resized, grids)
        # Emphasis as in (word:1.2) is a blend on the last layer only: read the words, leave their weights out.
        pairs = [[(token, 1.0) for token in tokens]]
        states, mask = self._states(pairs, grids, wanted)
        if self.encoder.cut_tail:
            cut = tokens[::-1].index(self.tokenize("<|im_start|><|im_end|>")[1]) + 1
            tokens, states, mask = tokens[:-cut], states[:, :, :-cut], mask[:, :-cut]
        tokens = [None if isinstance(token, dict) or torch.is_tensor(token) else int(token) for token in tokens]
        return states, tokens, mask, grids

    def _with_images(self, text: str, images: list[Tensor], grids: list[ImageGrid]) -> list[Any]:
        """Tokens of a text with images (1, H, W, 3), scaled to their grids, in place of its placeholders.

        Gemma's tokenizers take images of one size alone, and Gemma 3's loses a word before a placeholder.
        """
        plain = replace(self.vision, mean=(0.0,) * 3, std=(1.0,) * 3)  # the host normalises
        first, *parts = text.split(self.family.placeholder, len(images))
        tokens = self._tokens(first)
        for image, grid, part in zip(images, grids, parts, strict=True):
            pixels = to_grid(image[0], grid, plain).movedim(0, -1)[None]
            tokens += [{"type": "image", "data": pixels}, *self.tokenize(part)]
        return tokens

    def _states(self, pairs: list, grids: list, wanted: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Hidden states (1, M, T, C) of the layers `wanted`, by the host's forward, and the mask (1, T)."""
        encoder, inner, every = self.clip.cond_stage_model, self._inner, self._model.layers
        top = self.info.layers
        if not hasattr(self._model, "embed_tokens_per_layer"):  # Gemma 4's share keys by their numbers: all are run
            top = min(top, wanted[-1])
        encoder.reset_clip_options()
        tokens = [token if isinstance(token, int) else None for token, _ in pairs[0]]
        numbers = image_numbers(tokens, grids)
        normed, hooks, raw = inner.layer_norm_hidden_state, [], []
        tower: Any = type(self.visual)
        if grids and hasattr(tower, "get_window_index") and window_ordered(tower):
            hooks.append(self.visual.register_forward_hook(to_raster))
        see = None
        if grids and self.encoder.own_images:
            see = partial(_see, self.visual, self.vision)
            rotate = partial(interleaved, self._model.compute_freqs_cis, self._model.config.mrope_section)
            self._model.compute_freqs_cis = rotate
        if grids and self.family.bidirectional:
            attend = partial(_attend, (numbers[:, None] == numbers) & (numbers > 0))
            hooks += [layer.register_forward_pre_hook(attend, with_kwargs=True) for layer in self._model.layers]
        unnormed = wanted[-1] > top or top < self.info.layers
        if unnormed and self._model.norm is not None:
            hooks.append(self._model.norm.register_forward_pre_hook(lambda module, args: raw.append(args[0].float())))
        if hasattr(self._model, "embed_tokens_per_layer"):  # Gemma 4, which the host encodes without their part
            ids = numbers.new_zeros(numbers.shape)  # 0 = padding, at images
            ids[numbers == 0] = torch.tensor([token for token in tokens if token is not None])
            hooks.append(self._model.register_forward_pre_hook(partial(_with_ids, ids[None]), with_kwargs=True))
        try:
            load_text_encoder(self.clip, {self.key: pairs})
            encoder.set_clip_options({"execution_device": self.clip.patcher.load_device})
            if top < self.info.layers:
                self._model.layers = every[:top]  # after the host has loaded them all
            inner.layer = "all"  # last: set_clip_options may put it back
            inner.layer_norm_hidden_state = False  # it would norm every layer
            with vision_kept(inner.transformer, self.patcher, see):
                out = inner.encode_token_weights(pairs)
        finally:
            self._model.layers = every
            encoder.reset_clip_options()
            inner.layer_norm_hidden_state = normed
            for hook in hooks:
                hook.remove()
            vars(self._model).pop("compute_freqs_cis", None)  # the class's own again
        states = out[0]
        if states.ndim != 4 or states.shape[1] != top + 1:
            raise MLLMError(
                f"{self.info.name} gave hidden states {tuple(states.shape)}, expected (1, {top + 1},"
                f" tokens, {self.info.width}). A node has probably replaced its forward."
            )
        if raw:
            below = states if wanted[-1] > top else states[:, :-1]  # whose last is normed
            states = torch.cat((below, raw[0][:, None].to(states)), dim=1)
        mask = out[2].get("attention_mask") if len(out) > 2 else None
        mask = torch.ones(states.shape[0], states.shape[2]) if mask is None else mask
        return states[:, list(wanted)], mask.bool().to(states.device)


@contextmanager
def vision_kept(transformer: Any, patcher: Any, see: Callable | None = None) -> Iterator[None]:
    """Inside, the host's text encoder gives an image's tokens from memory, where it has seen that image before.

    Args:
        transformer: The module whose `preprocess_embed` reads images; another one is left as it is.
        patcher: The host's, of the CLIP.
        see: In place of the host's `preprocess_embed`.
    """
    visual: Any = _visual(transformer)
    if visual is None:
        yield
        return
    before, see = vars(transformer).get("preprocess_embed"), see or transformer.preprocess_embed

    def keep_seen(embed: dict, device: torch.device) -> Any:
        settings = sorted((name, repr(value)) for name, value in embed.items() if name != "data")
        hooks = tuple(map(id, visual._forward_hooks.values()))
        facts = (content(embed["data"]), str(settings), weights(transformer, patcher), str(device), hooks)

        def see_to_keep() -> tuple:
            return tree_map(lambda x: stored(x) if _is_state(x) else x, tuple(see(embed, device=device)))

        kept = MLLM_STATES.get(transformer, facts, see_to_keep)
        return tree_map(lambda x: x.to(device, copy=True) if _is_state(x) else x, kept)

    transformer.preprocess_embed = keep_seen
    try:
        yield
    finally:
        del transformer.preprocess_embed  # the class's own again
        if before is not None:
            transformer.preprocess_embed = before


def _visual(transformer: Any) -> Any:
    return getattr(transformer, "visual", getattr(transformer, "vision_model", None))


def _is_state(value: Any) -> bool:
    """Whether it is of the vision tower and not, as an image's grid, of the host's bookkeeping."""
    return torch.is_tensor(value) and value.is_floating_point()


def _with_ids(ids: Tensor, module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward hook that gives a decoder the tokens beside their embeddings."""
    return args, kwargs | {"input_ids": ids.to(kwargs["embeds"].device)}


def _attend(together: Tensor, module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward hook of a layer: tokens (T, T) of one image see each other, also later ones."""
    mask = kwargs["attention_mask"]
    return args, kwargs | {"attention_mask": mask.masked_fill(together.to(mask.device), 0)}


def _see(visual, vision: Vision, embed: dict, device: torch.device) -> tuple[Tensor, Tensor]:
    """In place of the host's preprocess_embed: an image's tokens and its grid in patches."""
    image = embed["data"][0]
    grid = qwen_grid(image.shape[0], image.shape[1], vision)
    sizes = torch.tensor([[1, grid.rows * vision.merge, grid.columns * vision.merge]], device=device)
    return visual(qwen_pixels(image, grid, vision).to(device), sizes), sizes


def interleaved(compute: Callable, section: Sequence[int], positions: Tensor, device: torch.device) -> Any:
    """A decoder's rotations, where axes of image positions (3, T) alternate from channel to channel.

    The host has them in blocks, one after the other. Source: Qwen3.5.
    """
    if len(positions) != 3:
        return compute(positions, device)
    axis = torch.zeros(sum(section), dtype=torch.long, device=device)
    for number in (1, 2):
        axis[number : 3 * section[number] : 3] = number
    by_axis = [torch.cat(tables) for tables in zip(*(compute(row, device) for row in positions.split(1)), strict=True)]
    channels = [axis.repeat(table.shape[-1] // len(axis)) for table in by_axis]
    return tuple(
        table[pick, 0, :, range(len(pick))].T[None, None] for table, pick in zip(by_axis, channels, strict=True)
    )


def to_raster(visual, args, tokens: Tensor) -> Tensor:
    """Forward hook of the vision tower: its tokens (n, C) from window order to row by row.

    It must happen before the decoder, which gives token k of an image the k-th raster position: reordering the output
    of the decoder would not give what Hugging Face and newer hosts give.
    """
    index = visual.get_window_index(args[1].cpu())[0]
    return tokens[index.argsort().to(tokens.device)]


@lru_cache
def window_ordered(tower: type) -> bool:
    """Whether the host's vision tower returns its tokens in window order (Qwen2.5-VL's before 0.19) and not row by row.

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
