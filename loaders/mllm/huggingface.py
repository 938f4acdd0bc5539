"""MLLMs from Hugging Face folders, run by transformers' model classes under the host's model management.

Only the backbone is built (no LM head), its leaves are the host's cast-at-use ones, and this pack, not the library,
prepares pixels, positions (mllm_vision) and image tokens: the library's own preprocessing changes between releases (PIL
or torchvision resize, `mm_token_type_ids`), and features must not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...dla.features import MLLMInfo
from .base import INTERNVL, MLLM, QWEN3_VL, QWEN_IMAGE, WEIGHT_DTYPES, MLLMError, Template, to_area
from .checkpoint import FILE_DTYPES, check_keys, read_config, read_headers, read_tokenizer, rename
from .vision import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Vision,
    internvl_tiles,
    mrope_positions,
    qwen_pixels,
)

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class Enough(Exception):
    """Raised by a hook at the first layer that nobody asked for."""


class Backbone(nn.Module):
    """Holds the library's model, because the host sets `.device`, which the library's makes read-only.

    The image part of each family returns its tokens (n, C) and what the decoder must be told besides.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model = model
        self.compute_dtype = dtype

    def loose(self, device: torch.device):
        """Bring to `device` what the host moves only on a full load: buffers, norm-sized raw parameters."""
        with torch.inference_mode(False), torch.no_grad():
            for module in self.modules():
                if hasattr(module, "comfy_cast_weights"):
                    continue
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    if tensor.device != device:
                        tensor.data = tensor.data.to(device)

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.language_model.embed_tokens(ids, out_dtype=self.compute_dtype)

    def states(
        self, embeds: Tensor, positions: Tensor | None, wanted: tuple[int, ...], keep: Callable, **extra
    ) -> list:
        """[keep(state)] for every wanted layer number, ascending. State i < L is what decoder layer i reads, whatever
        the library's own numbering does in this release; state L is the final norm's output."""
        decoder, top = self.model.language_model, wanted[-1]
        count = len(decoder.layers)
        found, hooks = {}, []
        if 0 in wanted:
            found[0] = keep(embeds)

        def read(number, module, args, kwargs):
            if number in wanted:
                found[number] = keep(args[0] if args else kwargs["hidden_states"])
            if number == top:
                raise Enough

        if top > 0:
            try:
                for number in range(1, min(top, count - 1) + 1):
                    hooks.append(
                        decoder.layers[number].register_forward_pre_hook(partial(read, number), with_kwargs=True)
                    )
                mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
                out = decoder(
                    inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False, **extra
                )  # the mask of ones keeps the library from reading image positions as packed sequences
                found[count] = keep(out.last_hidden_state)
            except Enough:
                pass
            finally:
                for hook in hooks:
                    hook.remove()
        return [found[number] for number in wanted]


@dataclass(frozen=True)
class Family:
    """What differs between the families: how images become tokens, and what the decoder is told about them."""

    template: Template
    placeholder: str
    default_size: int
    vision: Vision
    look: Callable  # (backbone, vision, image, size, tiles, device) -> tokens (n, C), grid (h, w) in tokens, deepstack
    mrope: bool = True


def look_qwen(backbone: Backbone, vision: Vision, image: Tensor, size: int, tiles: int, device):
    patches, (h, w) = qwen_pixels(to_area(image, size), vision)
    grid = torch.tensor([[1, h, w]], device=device)
    out = backbone.model.visual(patches.to(device, backbone.compute_dtype), grid_thw=grid)
    deepstack = []
    if isinstance(out, tuple) and not hasattr(out, "pooler_output"):  # Qwen3-VL, transformers 4
        out, deepstack = out
    elif hasattr(out, "pooler_output"):  # transformers 5
        out, deepstack = out.pooler_output, getattr(out, "deepstack_features", None) or []
    return out, (h // vision.merge, w // vision.merge), deepstack


def look_internvl(backbone: Backbone, vision: Vision, image: Tensor, size: int, tiles: int, device):
    model, factor = backbone.model, vision.patch * vision.merge
    side = max(1, round(size / factor)) * factor
    pixels = internvl_tiles(image, vision, side, tiles).to(device, backbone.compute_dtype)
    grid = side // vision.patch
    seen = model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]  # without the class token
    seen = model.pixel_shuffle(rearrange(seen, "n (h w) c -> n h w c", h=grid), scale_factor=1 / vision.merge)
    tokens = rearrange(model.multi_modal_projector(rearrange(seen, "n h w c -> n (h w) c")), "n t c -> (n t) c")
    return tokens, (1, len(tokens)), []


FAMILIES = {
    "qwen2_5_vl": Family(QWEN_IMAGE, "<|image_pad|>", 384, Vision(14, 2, CLIP_MEAN, CLIP_STD), look_qwen),
    "qwen3_vl": Family(QWEN3_VL, "<|image_pad|>", 384, Vision(16, 2, HALF, HALF), look_qwen),
    "internvl": Family(
        INTERNVL, "<IMG_CONTEXT>", 448, Vision(14, 2, IMAGENET_MEAN, IMAGENET_STD), look_internvl, mrope=False
    ),
}


class TransformersMLLM(MLLM):
    """An MLLM whose forward is transformers'."""

    def __init__(
        self, info: MLLMInfo, family: Family, vision: Vision, backbone: Backbone, patcher, tokenize, image_token: int
    ):
        self.info, self.family, self.vision, self.backbone, self.patcher = info, family, vision, backbone, patcher
        self.template, self.default_size = family.template, family.default_size
        self.tokenize, self._image_token = tokenize, image_token

    @torch.no_grad()
    def run(self, text, images, size, tiles, wanted):
        tokens, left = [], len(images)
        for token in self.tokenize(text):
            image = token == self._image_token and left > 0
            tokens.append(None if image else token)
            left -= image
        device, dtype, width = self.patcher.load_device, self.backbone.compute_dtype, self.info.width
        # States kept, and about as much again for one layer's working memory (our estimate).
        length = len(tokens) + len(images) * (size // 14) ** 2 * (tiles + 1)
        needed = length * width * dtype.itemsize * (len(wanted) + 32)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=needed)
        self.backbone.loose(device)
        out_device = comfy.model_management.intermediate_device()

        seen = [self.family.look(self.backbone, self.vision, image, size, tiles, device) for image in images]
        counts = [len(look[0]) for look in seen]
        ids = torch.tensor([[self._image_token if token is None else token for token in tokens]], device=device)
        repeats = torch.ones(len(tokens), dtype=torch.long)
        where = [position for position, token in enumerate(tokens) if token is None]
        repeats[where] = torch.tensor(counts, dtype=torch.long)
        ids = ids.repeat_interleave(repeats.to(device), dim=1)
        is_image = torch.tensor([token is None for token in tokens]).repeat_interleave(repeats)[None].to(device)

        embeds = self.backbone.embed(ids)
        extra, positions = {}, None
        if seen:
            embeds[is_image] = torch.cat([look[0] for look in seen]).to(embeds.dtype)
            if seen[0][2]:
                extra["visual_pos_masks"] = is_image
                extra["deepstack_visual_embeds"] = [
                    torch.cat(level) for level in zip(*(look[2] for look in seen), strict=True)
                ]
        if self.family.mrope:
            positions = mrope_positions(tokens, [look[1] for look in seen]).to(device)
        kept = self.backbone.states(embeds, positions, wanted, lambda state: state.to(out_device, copy=True), **extra)
        mask = torch.ones(1, ids.shape[1], dtype=torch.bool, device=out_device)
        return torch.stack(kept, dim=1), tokens, mask, counts


def load_folder(folder: Path, weight_dtype: str = "default") -> TransformersMLLM:
    """The MLLM in a Hugging Face folder. Everything that can be known from headers is checked before weights are read.

    weight_dtype: "default" (the file's), "bf16", "fp16", "fp32", or "fp8_e4m3fn"/"fp8_e5m2", which store the linear
    layers' weights so, unscaled as the host does, and compute as for "default". Raises MLLMError.
    """
    folder = Path(folder)
    if weight_dtype not in WEIGHT_DTYPES:
        raise MLLMError(f"weight_dtype is {weight_dtype!r}, expected one of {', '.join(WEIGHT_DTYPES)}.")
    raw = read_config(folder)
    family = FAMILIES[raw["model_type"]]
    headers = read_headers(folder)
    tokenize, image_token = read_tokenizer(folder, raw, family.placeholder)

    import transformers  # takes seconds

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise MLLMError(
            f"{folder / 'config.json'} cannot be read by transformers {transformers.__version__}: {error}"
        ) from error
    if (
        getattr(config, "vision_feature_layer", -1) != -1
        or getattr(config, "vision_feature_select_strategy", "default") != "default"
    ):
        raise MLLMError(
            f"{folder / 'config.json'}: vision_feature_layer is {config.vision_feature_layer} and"
            f" vision_feature_select_strategy {config.vision_feature_select_strategy!r}, expected -1 and 'default'."
        )
    with ParametersOnMeta(), torch.inference_mode(False):
        model = transformers.AutoModel.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:  # would be garbage later
            raise MLLMError(
                f"transformers {transformers.__version__} builds buffer {name} in a way this pack does not know."
            )
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = check_keys(headers, expected)

    device = comfy.model_management.text_encoder_device()
    weights = (FILE_DTYPES.get(headers[key].dtype) for key in names)
    storage, compute = pick_dtypes(weight_dtype, next(dtype for dtype in weights if dtype is not None), device)
    model = model.eval().requires_grad_(False)
    swap_leaves(model)
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    backbone = Backbone(model, compute)
    large = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    table = "language_model.embed_tokens.weight"

    state_dict = {}
    for path in dict.fromkeys(header.path for header in headers.values()):
        for key, tensor in comfy.utils.load_torch_file(str(path), safe_load=True).items():
            name = rename(key)
            if name not in expected:
                continue
            if name in large:
                tensor = tensor.to(storage)
            elif name == table:  # entry 0 of the features, so never 8 bits
                tensor = tensor.to(storage if storage.itemsize > 1 else torch.bfloat16)
            else:
                tensor = tensor.to(compute)
            state_dict[name] = tensor
    with torch.inference_mode(False):
        model.load_state_dict(state_dict, strict=True, assign=True)  # nothing to copy into: parameters are on meta
    model.requires_grad_(False)
    patcher = patcher_class(
        backbone, load_device=device, offload_device=comfy.model_management.text_encoder_offload_device()
    )
    decoder = model.language_model
    info = MLLMInfo(folder.name, raw["model_type"], len(decoder.layers), decoder.config.hidden_size)
    vision = family.vision
    sizes = raw.get("vision_config", {})
    patch = sizes.get("patch_size", vision.patch)
    merge = sizes.get("spatial_merge_size", vision.merge)
    if "downsample_ratio" in raw:
        merge = round(1 / raw["downsample_ratio"])
    vision = Vision(patch[0] if isinstance(patch, list) else patch, merge, vision.mean, vision.std)
    return TransformersMLLM(info, family, vision, backbone, patcher, tokenize, image_token)


class ParametersOnMeta(TorchFunctionMode):
    """Like `torch.device("meta")`, but only for what parameters are made of: buffers that a module computes, such as
    RoPE frequencies, come from `arange` and stay real. No checkpoint holds them, so on meta they would be lost."""

    ALLOCATE = (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand, torch.full)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in self.ALLOCATE and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


class RMSNorm(comfy.ops.manual_cast.RMSNorm):
    """transformers' RMSNorm to the bit (normalise in fp32, round, then scale) with the host's weight handling."""

    def forward_comfy_cast_weights(self, x: Tensor) -> Tensor:
        weight, _ = comfy.ops.cast_bias_weight(self, x)
        full = x.float()
        full = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + self.eps)
        return weight * full.to(x.dtype)


def swap_leaves(module: nn.Module):
    """Replace linear, convolution, norm and token embedding leaves by the host's, which cast and move at use. Small
    embeddings stay: the library reads their device and dtype, and `Backbone.loose` moves them."""
    ops = comfy.ops.manual_cast
    for name, child in module.named_children():
        where = {"device": "meta", "dtype": torch.float32}
        new = None
        if type(child) is nn.Linear:
            new = ops.Linear(child.in_features, child.out_features, bias=child.bias is not None, **where)
        elif type(child) in (nn.Conv2d, nn.Conv3d):
            conv = ops.Conv2d if type(child) is nn.Conv2d else ops.Conv3d
            new = conv(
                child.in_channels, child.out_channels, child.kernel_size, stride=child.stride, padding=child.padding,
                bias=child.bias is not None, **where,
            )  # fmt: skip
        elif type(child) is nn.LayerNorm:
            new = ops.LayerNorm(child.normalized_shape, eps=child.eps, bias=child.bias is not None, **where)
        elif type(child).__name__.endswith("RMSNorm"):
            new = RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, **where)
            new.bias = None
        elif type(child) is nn.Embedding and name == "embed_tokens":
            new = ops.Embedding(child.num_embeddings, child.embedding_dim, **where)
        if new is None:
            swap_leaves(child)
        else:
            setattr(module, name, new.eval().requires_grad_(False))


def pick_dtypes(weight_dtype: str, file_dtype: torch.dtype, device) -> tuple[torch.dtype, torch.dtype]:
    """(storage, compute). On the CPU computing is fp32; on a GPU the 16-bit type asked for, else bf16 where it is
    supported, else fp32 (Qwen2.5 overflows fp16)."""
    storage = DTYPES.get(weight_dtype, file_dtype)
    if comfy.model_management.is_device_cpu(device):
        return storage, torch.float32
    if weight_dtype in ("fp32", "fp16"):
        return storage, storage
    bf16 = comfy.model_management.should_use_bf16(device)
    return storage, torch.bfloat16 if bf16 else torch.float32
