"""MLLMs from Hugging Face folders, run by transformers' model classes under the host's model management.

Only the backbone is built (no LM head), its layers are the host's cast-at-use ones, and this pack, not the library,
prepares pixels, positions and image tokens: the library's own preprocessing changes between releases (PIL or
torchvision resize, `mm_token_type_ids`), and features must not.
"""

from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from einops import rearrange
from torch import Tensor, nn

from ...common.dtypes import DTYPES, UNQUANTIZED
from ...dla.features import ImageGrid
from ..encode_cache import MLLM_STATES, content, stored, weights
from ..host import file_errors, make_patcher
from ..weight_folders import Headers, check_finite, check_sizes, read_headers, with_dtype
from .backbone import MLLMBackbone
from .base import MLLM, MLLMError
from .cast_layers import ParametersOnMeta, swap_layers
from .checkpoint import check_keys, read_config, read_tokenizer
from .families import FAMILIES, MLLMFamily
from .vision import (
    Vision,
    image_numbers,
    internvl_grid,
    internvl_tiles,
    mrope_positions,
    pooled_pixels,
    qwen_grid,
    qwen_pixels,
    to_area,
)

Seen = tuple[Tensor, ImageGrid, list[Tensor]]  # an image's tokens (n, C), their grid, what DeepStack adds per layer


class TransformersMLLM(MLLM):
    """An MLLM whose forward is transformers'."""

    def __init__(
        self, folder: Path, info, family, vision: Vision, backbone: MLLMBackbone, patcher, tokenizer, image_token: int
    ):
        super().__init__(info, family)
        self._config = folder / "config.json"
        self.vision, self.backbone, self.patcher = vision, backbone, patcher
        self._tokenizer, self._image_token, self.starts = tokenizer, image_token, int(bool(family.start))

    def tokenize(self, text: str) -> list[int]:  # noqa: D102
        return self._tokenizer(text)

    def run(self, text, images, size, tiles, wanted):  # noqa: D102
        problem = f"{self._config}: transformers {version('transformers')} cannot run {self.family.name} as it says"
        with file_errors(problem, " Download it again, or update transformers.", MLLMError):
            return self._run(text, images, size, tiles, wanted)

    @torch.no_grad()
    def _run(self, text, images, size, tiles, wanted):
        tokens, left = [], len(images)
        for token in self.tokenize(self.family.start + text):
            is_image = token == self._image_token and left > 0
            tokens.append(None if is_image else token)
            left -= is_image
            if not 0 <= token < self.backbone.vocabulary:
                raise MLLMError(
                    f"{self.info.name}: its tokenizer gives the token {token}, expected one below "
                    f"{self.backbone.vocabulary}, as many as the model has. Download the folder again."
                )
        device, dtype, width = self.patcher.load_device, self.backbone.compute_dtype, self.info.width
        # States kept, and about as much again for one layer's working memory (our estimate).
        length = len(tokens) + len(images) * (size // 14) ** 2 * (tiles + 1)
        needed = length * width * dtype.itemsize * (len(wanted) + 32)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=needed)
        self.backbone.move_unmanaged(device)
        names = [content(image) for image in images]
        model = (weights(self.backbone, self.patcher), str(device), dtype, size, tiles) if images else None

        def see() -> list[Seen]:
            return [
                MLLM_STATES.get(self.backbone, ("image", name, model), partial(self._see, image, size, tiles, device))
                for name, image in zip(names, images, strict=True)
            ]

        end = self._prefix_end(tokens, length)
        if end:
            facts = ("prefix", tuple(tokens[:end]), tuple(names), model)
            layers, before, pairs, grids = MLLM_STATES.get(
                self.backbone, facts, lambda: self._read(tokens[:end], see(), wanted, device, keep=True),
                fits=lambda kept: set(wanted) <= set(kept[0]),
            )  # fmt: skip
            if layers != wanted:
                before = before[:, [layers.index(layer) for layer in wanted]]
            after = self._continue(tokens, end, pairs, grids, wanted, device)
            states = torch.cat((before, after), dim=2)
        else:
            _, states, _, grids = self._read(tokens, see(), wanted, device)
        return states, tokens, torch.ones(1, states.shape[2], dtype=torch.bool, device=states.device), grids

    def _prefix_end(self, tokens: list[int | None], length: int) -> int:
        """Tokens up to the last image's, which are read first and by themselves; 0 = all are read at once."""
        end = max((number for number, token in enumerate(tokens, 1) if token is None), default=0)
        # beyond, InternVL's rotations depend on how long the whole text is
        longest = getattr(self.backbone.model.language_model.config, "max_position_embeddings", length)
        return end if self.family.keeps_prefix and end < len(tokens) and length <= longest else 0

    def _see(self, image: Tensor, size: int, tiles: int, device) -> Seen:
        """What the decoder reads of an image, to be kept."""
        encode = self._encode_image
        if self.family.pooled or self.family.tiled:
            encode = self._encode_pooled if self.family.pooled else self._encode_tiles
        seen, grid, deepstack = encode(image, size, tiles, device)
        return stored(seen), grid, [stored(level) for level in deepstack]

    def _read(self, tokens: list[int | None], seen: list[Seen], wanted: tuple[int, ...], device, keep=False) -> tuple:
        """Layer numbers, states (1, M, T, C), the layers' keys and values if `keep`, grids: of a whole text."""
        from transformers import DynamicCache

        grids = [grid for _, grid, _ in seen]
        numbers = image_numbers(tokens, grids)[None].to(device)
        image_mask = numbers > 0
        ids = torch.full_like(numbers, self._image_token)
        ids[~image_mask] = torch.tensor([token for token in tokens if token is not None], device=device)

        embeds = self.backbone.embed(ids)
        extra: dict[str, Any] = {}
        if seen:
            embeds[image_mask] = torch.cat([image.to(device) for image, _, _ in seen]).to(embeds.dtype)
            if seen[0][2]:
                levels = [torch.cat(level).to(device) for level in zip(*(levels for _, _, levels in seen), strict=True)]
                extra |= {"visual_pos_masks": image_mask, "deepstack_visual_embeds": levels}
        if self.family.pooled:
            extra = self.backbone.pooled_inputs(ids, numbers)
        positions = mrope_positions(tokens, grids).to(device) if self.family.mrope else None
        cache = DynamicCache() if keep else None
        states = self.backbone.states(embeds, positions, wanted, stored, cache, **extra)
        pairs = [(stored(layer.keys), stored(layer.values)) for layer in cache.layers] if cache is not None else []
        return wanted, torch.stack(states, dim=1), pairs, grids

    def _continue(
        self, tokens: list[int | None], end: int, pairs: list, grids: list[ImageGrid], wanted: tuple[int, ...], device
    ) -> Tensor:
        """States (1, M, T, C) of the words from token `end` on, behind the keys and values of what precedes them."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, (keys, values) in enumerate(pairs[: wanted[-1]]):
            cache.update(keys.to(device), values.to(device), number)
        ids = torch.tensor([tokens[end:]], device=device)
        positions = None
        if self.family.mrope:
            positions = mrope_positions(tokens, grids)[:, :, -ids.shape[1] :].to(device)
        return torch.stack(self.backbone.states(self.backbone.embed(ids), positions, wanted, stored, cache), dim=1)

    def _encode_image(self, image: Tensor, size: int, tiles: int, device) -> tuple[Tensor, ImageGrid, list[Tensor]]:
        """Tokens (n, C) of an image (H, W, 3) by Qwen's vision tower, their grid, and what DeepStack adds per layer."""
        image, merge = to_area(image, size), self.vision.merge
        grid = qwen_grid(image.shape[0], image.shape[1], self.vision)
        patches = qwen_pixels(image, grid, self.vision).to(device, self.backbone.compute_dtype)
        sizes = torch.tensor([[1, grid.rows * merge, grid.columns * merge]], device=device)
        out, deepstack = self.backbone.model.visual(patches, grid_thw=sizes), []
        if isinstance(out, tuple) and not hasattr(out, "pooler_output"):  # Qwen3-VL, transformers 4
            out, deepstack = out
        elif hasattr(out, "pooler_output"):  # transformers 5
            out, deepstack = out.pooler_output, getattr(out, "deepstack_features", None) or []
        return out, grid, deepstack

    def _encode_pooled(self, image: Tensor, size: int, tiles: int, device) -> tuple[Tensor, ImageGrid, list[Tensor]]:
        """As _encode_image, by Gemma 4's vision tower."""
        image, model = to_area(image, size), self.backbone.model
        grid = qwen_grid(image.shape[0], image.shape[1], self.vision)
        patches, places = pooled_pixels(image, grid, self.vision)
        patches = patches.to(device, self.backbone.compute_dtype)
        seen = model.vision_tower(pixel_values=patches, pixel_position_ids=places.to(device)).last_hidden_state
        return model.embed_vision(inputs_embeds=seen), grid, []

    def _encode_tiles(self, image: Tensor, size: int, tiles: int, device) -> tuple[Tensor, ImageGrid, list[Tensor]]:
        """As _encode_image, by InternVL's vision tower, tile by tile."""
        model, vision = self.backbone.model, self.vision
        side = max(1, round(size / vision.token)) * vision.token
        grid = internvl_grid(image.shape[0], image.shape[1], vision, side, tiles)
        pixels = internvl_tiles(image, grid, vision).to(device, self.backbone.compute_dtype)
        seen = model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]  # without the class token
        seen = rearrange(seen, "n (h w) c -> n h w c", h=side // vision.patch)
        seen = rearrange(model.pixel_shuffle(seen, scale_factor=1 / vision.merge), "n h w c -> n (h w) c")
        return rearrange(model.multi_modal_projector(seen), "n t c -> (n t) c"), grid, []


def load_folder(folder: Path, weight_dtype: str = "default") -> TransformersMLLM:
    """The MLLM in a Hugging Face folder; all that headers can show to be wrong is found before weights are read.

    Args:
        folder: With config.json, tokenizer and *.safetensors.
        weight_dtype: "default" (the file's), "bf16", "fp16", "fp32", or "fp8_e4m3fn"/"fp8_e5m2", which store the linear
            layers' weights so, unscaled as the host does, and compute as for "default".

    Raises:
        MLLMError: With file, value found, value expected and remedy.
    """
    folder = Path(folder)
    if weight_dtype not in ("default", *DTYPES):
        raise MLLMError(f"weight_dtype is {weight_dtype!r}, expected one of default, {', '.join(DTYPES)}.")
    raw = read_config(folder)
    family = FAMILIES[raw["model_type"]]
    try:
        headers = read_headers(folder)
        check_sizes(raw, headers, folder / "config.json")
    except ValueError as error:
        raise MLLMError(str(error)) from None
    tokenizer, image_token = read_tokenizer(folder, raw, family)
    model, tied = _build_model(folder, raw, family, headers)
    decoder = model.language_model
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unused = getattr(decoder, "_keys_to_ignore_on_load_unexpected", None) or ()  # Gemma 4: keys of other layers' keys
    names = check_keys(headers, expected, tuple(f"language_model.{key}." for key in unused), tied)

    device = comfy.model_management.text_encoder_device()
    storage, compute = _pick_dtypes(weight_dtype, UNQUANTIZED[headers[next(iter(names))][1].dtype], device)
    swap_layers(model)
    weights = _read_weights(headers, names, model, storage, compute)
    with torch.inference_mode(False):
        model.load_state_dict(weights, strict=True, assign=True)  # nothing to copy into: parameters are on meta
    model.requires_grad_(False)
    backbone = MLLMBackbone(model, compute)
    patcher = make_patcher(backbone, device, comfy.model_management.text_encoder_offload_device())
    info = family.info(folder.name, len(decoder.layers), decoder.config.hidden_size)
    return TransformersMLLM(folder, info, family, _vision(family, raw), backbone, patcher, tokenizer, image_token)


def _build_model(folder: Path, raw: dict[str, Any], family: MLLMFamily, headers: Headers) -> tuple[Any, bool]:
    """The library's model for a config, parameters on meta and buffers real; and whether head and embedding are one."""
    import transformers  # takes seconds
    from transformers.models.auto import configuration_auto

    dtypes = (UNQUANTIZED[header.dtype] for _, header in headers.values() if header.dtype in UNQUANTIZED)
    try:
        kind = configuration_auto.CONFIG_MAPPING[raw["model_type"]]
        config = kind.from_dict(with_dtype(raw, next(dtypes, torch.float32)))
    except Exception as error:
        raise MLLMError(
            f"{folder / 'config.json'}: {family.name} cannot be read by transformers {transformers.__version__},"
            f" expected {family.transformers} or newer. Update transformers in ComfyUI's Python, or download the file"
            f" again. ({error!s:.300})"
        ) from error
    if getattr(config.get_text_config(), "enable_moe_block", False):
        raise MLLMError(f"{folder / 'config.json'}: enable_moe_block is true, expected a model without experts.")
    for part, kinds in family.parts.items():
        found = getattr(getattr(config, part, None), "model_type", None)
        if found not in kinds:
            raise MLLMError(
                f"{folder / 'config.json'}: {part}'s model_type is {found!r:.60}, expected {' or '.join(kinds)}."
            )
    layer = getattr(config, "vision_feature_layer", -1)
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    if layer != -1 or strategy != "default":
        raise MLLMError(
            f"{folder / 'config.json'}: vision_feature_layer is {layer} and vision_feature_select_strategy"
            f" {strategy!r}, expected -1 and 'default'."
        )
    if hasattr(config, "audio_config"):
        config.audio_config = None  # not built
    try:
        with ParametersOnMeta(), torch.inference_mode(False):
            model = transformers.AutoModel.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    except Exception as error:  # the library checks few of its settings
        raise MLLMError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} builds no {family.name} of it"
            f" ({type(error).__name__}: {error!s:.300}). Download it again, or update transformers."
        ) from error
    for name in {name for name, buffer in model.named_buffers() if buffer.is_meta} - set(model.state_dict()):
        raise MLLMError(  # it would be garbage later
            f"transformers {transformers.__version__} builds buffer {name} in a way this pack does not know."
        )
    last = model.language_model.layers[-1]
    if getattr(model.language_model.config, "num_kv_shared_layers", 0) and hasattr(last.self_attn, "k_proj"):
        raise MLLMError(
            f"transformers {transformers.__version__} computes keys that {family.name} shares between layers, expected"
            f" {family.transformers} or newer. Update transformers in ComfyUI's Python."
        )
    tied = any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))
    return model.eval().requires_grad_(False), tied


def _read_weights(
    headers: Headers, names: dict[str, str], model: Any, storage: torch.dtype, compute: torch.dtype
) -> dict[str, Tensor]:
    """State dict of the model: linear weights in the storage dtype, all others in the compute dtype."""
    modules = dict(model.named_modules())
    large = {f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.Linear)}
    large -= {"vision_tower.patch_embedder.input_proj.weight"}  # in whose dtype Gemma 4's vision tower computes
    dtypes = dict.fromkeys(model.state_dict(), compute) | dict.fromkeys(large, storage)
    for name in (name for name in dtypes if name.startswith("language_model.embed_tokens")):
        dtypes[name] = storage if storage.itemsize > 1 else torch.bfloat16  # entry 0 of the features, so never 8 bits
    state_dict: dict[str, Tensor] = {}
    for path in dict.fromkeys(path for path, _ in headers.values()):
        tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
        tensors = {key: tensor for key, tensor in tensors.items() if key in names and headers[key][0] == path}
        try:
            check_finite(path, tensors)
        except ValueError as error:
            raise MLLMError(str(error)) from None
        state_dict |= {names[key]: tensor.to(dtypes[names[key]]) for key, tensor in tensors.items()}
    return state_dict


def _vision(family: MLLMFamily, config: dict) -> Vision:
    """The family's, with the sizes of a folder's config.json."""
    assert family.vision is not None  # FOLDER_FAMILIES all read images
    sizes = config.get("vision_config", {})
    patch = sizes.get("patch_size", family.vision.patch)
    merge = sizes.get("spatial_merge_size", sizes.get("pooling_kernel_size", family.vision.merge))
    if "downsample_ratio" in config:
        merge = round(1 / config["downsample_ratio"])
    return replace(family.vision, patch=patch[0] if isinstance(patch, list) else patch, merge=merge)


def _pick_dtypes(weight_dtype: str, file_dtype: torch.dtype, device) -> tuple[torch.dtype, torch.dtype]:
    """(storage, compute); compute is fp32 on the CPU, on a GPU the 16-bit type asked for, else bf16 where supported."""
    storage = DTYPES.get(weight_dtype, file_dtype)
    if comfy.model_management.is_device_cpu(device):
        return storage, torch.float32
    if weight_dtype in ("fp32", "fp16"):
        return storage, storage
    bf16 = comfy.model_management.should_use_bf16(device)
    return storage, torch.bfloat16 if bf16 else torch.float32  # Qwen2.5 overflows fp16
