"""MLLMs from Hugging Face folders, run by transformers' model classes under the host's model management.

Only the backbone is built (no LM head), its leaves are the host's cast-at-use ones, and this file, not the library,
prepares pixels, positions and image tokens: the library's own preprocessing changes between releases (PIL or
torchvision resize, `mm_token_type_ids`), and features must not.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..dla.features import MLLMInfo
from .mllm import INTERNVL, MLLM, QWEN3_VL, QWEN_IMAGE, WEIGHT_DTYPES, MLLMError, Template, to_area

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
FILE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


# ---------------------------------------------------------------------------------------------------- pixels


@dataclass(frozen=True)
class Vision:
    """What the vision tower expects: px of a patch, patches merged to a token (a side), normalisation (RGB)."""

    patch: int
    merge: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    frames: int = 2  # Qwen: a still is two equal frames

    def normalize(self, image: Tensor) -> Tensor:
        """(3, H, W) in 0..1 -> the same, normalised."""
        mean, std = image.new_tensor(self.mean), image.new_tensor(self.std)
        return (image - mean[:, None, None]) / std[:, None, None]


def qwen_pixels(
    image: Tensor, vision: Vision, least: int = 3136, most: int = 12845056
) -> tuple[Tensor, tuple[int, int]]:
    """(H, W, 3) -> patches (h w, 3 frames patch patch) ordered in merge x merge blocks, and the grid (h, w) in patches.

    Sides go to the nearest multiple of patch x merge, bilinearly, as the host's Qwen2.5-VL does.
    """
    factor = vision.patch * vision.merge
    height, width = image.shape[:2]
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    pixels = F.interpolate(image.movedim(-1, 0)[None], size=(rows, columns), mode="bilinear", align_corners=False)[0]
    pixels = vision.normalize(pixels)[None].expand(vision.frames, -1, -1, -1)
    patches = rearrange(
        pixels, "t c (h mh ph) (w mw pw) -> (h w mh mw) (c t ph pw)",
        mh=vision.merge, mw=vision.merge, ph=vision.patch, pw=vision.patch,
    )  # fmt: skip
    return patches, (rows // vision.patch, columns // vision.patch)


def internvl_tiles(image: Tensor, vision: Vision, side: int, most: int) -> Tensor:
    """(H, W, 3) -> tiles (n, 3, side, side), with a thumbnail of the whole last where there are several.

    The grid is InternVL's: the one of at most `most` tiles whose aspect is nearest the image's. InternVL then stretches
    the image to the grid; our choice is to fit it inside, aspect kept, centred on the mean colour.
    """
    height, width = image.shape[:2]
    best, gap = (1, 1), math.inf
    for columns, rows in sorted(((c, r) for c in range(1, most + 1) for r in range(1, most // c + 1)), key=math.prod):
        difference = abs(width / height - columns / rows)
        if difference < gap or (difference == gap and height * width > 0.5 * side * side * columns * rows):
            best, gap = (columns, rows), difference
    columns, rows = best
    tiles = rearrange(
        _fit(image, vision, rows * side, columns * side), "c (r h) (k w) -> (r k) c h w", r=rows, k=columns
    )
    if len(tiles) > 1:
        tiles = torch.cat((tiles, _fit(image, vision, side, side)[None]))
    return tiles


def _fit(image: Tensor, vision: Vision, rows: int, columns: int) -> Tensor:
    height, width = image.shape[:2]
    scale = min(rows / height, columns / width)
    h, w = min(rows, max(1, round(height * scale))), min(columns, max(1, round(width * scale)))
    inner = F.interpolate(image.movedim(-1, 0)[None], size=(h, w), mode="bicubic", antialias=True, align_corners=False)
    out = image.new_zeros(3, rows, columns)  # zero is the mean colour once normalised
    top, left = (rows - h) // 2, (columns - w) // 2
    out[:, top : top + h, left : left + w] = vision.normalize(inner[0].clamp(0, 1))
    return out


def mrope_positions(tokens: list, grids: list[tuple[int, int]]) -> Tensor:
    """Positions (3, 1, T) in time, height and width of a text with images (None in `tokens`; grids in tokens).

    Text counts on; an image stands at one time and spans its grid; the text after it starts past its longer side.
    """
    runs, at, grid = [], 0, iter(grids)
    for token in tokens:
        if token is None:
            h, w = next(grid)
            y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            runs.append(torch.stack((torch.zeros_like(y), y, x)).flatten(1) + at)
            at += max(h, w)
        else:
            runs.append(torch.full((3, 1), at))
            at += 1
    return torch.cat(runs, dim=1)[:, None]


# ---------------------------------------------------------------------------------------------------- families


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


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
# Normalisation is each family's published one and part of the weights, so it is not read from a preprocessor file.
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


# ---------------------------------------------------------------------------------------------------- files


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
    tokenize, image_token = read_tokenizer(folder, raw, family)

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


def read_config(folder: Path) -> dict:
    """config.json of a folder whose model type is supported."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise MLLMError(
            f"{folder} is not a folder, expected a Hugging Face folder with config.json, tokenizer and *.safetensors. A"
            " single-file text encoder goes through the host's CLIP loader and MLLM from CLIP."
        )
    if not path.is_file():
        raise MLLMError(
            f"{folder} has no config.json, expected a whole Hugging Face folder. Download the repository again."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MLLMError(f"{path} is not JSON ({error}). Download it again.") from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found not in FAMILIES:
        hint = " Take the repository whose name ends in -hf." if found == "internvl_chat" else ""
        raise MLLMError(f"{path}: model_type is {found!r}, expected one of {', '.join(sorted(FAMILIES))}.{hint}")
    return config


@dataclass(frozen=True)
class Header:
    path: Path
    dtype: str
    shape: tuple[int, ...]


def read_headers(folder: Path) -> dict[str, Header]:
    """Key -> header, from model.safetensors or the shards of its index; every file is there and whole."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise MLLMError(f"{index} is damaged ({error!r}). Download it again.") from error
        files = [folder / name for name in names]
        for path in files:
            if not path.is_file():
                raise MLLMError(f"{path} is missing: {index.name} names it, one of {len(files)} files. Download it.")
    else:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
                raise MLLMError(
                    f"{folder} has weights only as pickles (.bin), which can run code and are not loaded. Take the"
                    " repository's safetensors revision, or convert with transformers' save_pretrained."
                )
            raise MLLMError(f"{folder} has no *.safetensors. Download the weights (all shards) into it.")
        if len(files) > 1 and (folder / "model.safetensors") in files:
            files = [folder / "model.safetensors"]
        elif len(files) > 1:
            raise MLLMError(f"{folder} has {len(files)} *.safetensors but no {index.name}. Download the index too.")
    headers = {}
    for path in files:
        headers.update(read_header(path))
    return headers


def read_header(path: Path) -> dict[str, Header]:
    """Header of one safetensors file, checked against the file's size."""
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError(f"header of {length} bytes")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        headers = {key: Header(path, entry["dtype"], tuple(entry["shape"])) for key, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise MLLMError(
            f"{path} is no safetensors file, or cut off in its header ({error}). Download it again."
        ) from error
    if size < end:
        raise MLLMError(f"{path} is {size} bytes, expected {end}: the download was cut off. Download it again.")
    return headers


def rename(key: str) -> str | None:
    """A checkpoint's key -> the backbone's, None for what the backbone has not (the LM head, old RoPE buffers).

    Three layouts exist: "model.layers", "visual" (Qwen2.5-VL as published); "language_model.model", "vision_tower"
    (InternVL as published); "model.language_model", "model.visual" (Qwen3-VL, and what transformers saves since 4.52).
    """
    if re.match(r"(model\.)?(language_model\.)?lm_head\.", key) or key.endswith("rotary_emb.inv_freq"):
        return None
    key = re.sub(r"^model\.(?=(language_model|visual|vision_tower|multi_modal_projector)\.)", "", key)
    key = re.sub(r"^language_model\.model\.", "language_model.", key)
    return re.sub(r"^model\.(?=(embed_tokens|layers|norm)\.)", "language_model.", key)


def check_keys(headers: dict[str, Header], expected: dict[str, tuple]) -> list[str]:
    """The checkpoint's keys that are used; every expected one is there once, in its shape, and nothing is left over."""
    found, used = {}, []
    for key, header in headers.items():
        name = rename(key)
        if name is None:
            continue
        if name not in expected:
            hint = "Weights and config.json do not belong together: download both from one repository."
            if re.search(r"scale|qweight|qzeros|absmax", key):
                hint = "Quantised repositories (FP8, AWQ, GPTQ) are not read: take the original one."
            raise MLLMError(f"{header.path}: unknown key {key!r} {header.shape}. {hint}")
        if header.shape != expected[name]:
            raise MLLMError(
                f"{header.path}: {key!r} has shape {header.shape}, expected {expected[name]} by config.json. Weights"
                " and config.json do not belong together: download both from one repository."
            )
        if header.dtype not in FILE_DTYPES:
            raise MLLMError(
                f"{header.path}: {key!r} is {header.dtype}, expected one of {', '.join(FILE_DTYPES)}. Take the"
                " unquantised repository; weight_dtype makes it fp8 while loading."
            )
        found[name] = key
        used.append(key)
    missing = [name for name in expected if name not in found]
    if missing:
        files = ", ".join(sorted({header.path.name for header in headers.values()}))
        where = next(iter(headers.values())).path.parent if headers else ""
        raise MLLMError(
            f"{where}: {files} lack {len(missing)} of {len(expected)} keys, first {missing[0]!r}, expected shape"
            f" {expected[missing[0]]}. Download all shards."
        )
    return used


def read_tokenizer(folder: Path, config: dict, family: Family):
    """-> (text -> ids, id of the image placeholder). tokenizer.json is read by the `tokenizers` library itself: what
    transformers makes of it differs between its releases."""
    fast = folder / "tokenizer.json"
    if fast.is_file():
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(fast))
        except Exception as error:
            raise MLLMError(f"{fast} is damaged ({error}). Download it again.") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()

        def tokenize(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids

    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)

        def tokenize(text: str) -> list[int]:
            return slow(text, add_special_tokens=False)["input_ids"]

    else:
        raise MLLMError(
            f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt. Download them."
        )
    expected = config.get("image_token_id", config.get("image_token_index"))
    for token in (family.placeholder, "<|im_start|>", "<|im_end|>"):
        ids = tokenize(token)
        if len(ids) != 1 or (token == family.placeholder and expected is not None and ids[0] != expected):
            want = expected if token == family.placeholder else "one id"
            raise MLLMError(
                f"{folder}: the tokenizer reads {token} as {ids}, expected {want} by config.json. Tokenizer and model"
                " do not belong together: download both from one repository."
            )
    return tokenize, tokenize(family.placeholder)[0]


# ---------------------------------------------------------------------------------------------------- building


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
