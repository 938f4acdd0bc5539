"""The DiT, loaded by the host, and what its file's header tells without reading weights."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import Any

from ..common import safetensors_header
from ..common.dtypes import DTYPES as TORCH_DTYPES
from ..common.dtypes import FILE_DTYPES
from ..common.safetensors_header import SafetensorsError, SafetensorsHeader
from .backbones import Backbone, backbone_of, backbone_of_keys
from .protocols import Model

# Prefixes under which checkpoints keep the DiT's keys.
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "net.")
DTYPES = ("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")


@dataclass(frozen=True)
class DiTHeader:
    """What a file's header tells: its family and the width of its context in channels; None = not known."""

    backbone: Backbone | None = None
    context_width: int | None = None


def read_header(path: str) -> DiTHeader:
    """Family and context width from a safetensors header, without reading weights.

    A file of another kind (GGUF, a pickle) or of an unknown layout gives an empty header: its own loader knows better.
    Raises ValueError for a .safetensors whose header cannot be read.
    """
    tensors = _file_header(path).tensors
    found = ((backbone_of_keys(set(tensors), prefix), prefix) for prefix in PREFIXES[::-1])
    backbone, prefix = next(((backbone, prefix) for backbone, prefix in found if backbone), (None, ""))
    layer = tensors.get(f"{prefix}{backbone.context_layer}.weight") if backbone else None
    # Packed 4-bit weights are whole numbers with half the columns.
    plain = layer is not None and layer.dtype in FILE_DTYPES and FILE_DTYPES[layer.dtype].is_floating_point
    return DiTHeader(backbone, layer.shape[1] if layer and plain else None)


def _file_header(path: str) -> SafetensorsHeader:
    """Of a safetensors file; an empty one of other files. Raises ValueError where it cannot be read."""
    if not str(path).endswith((".safetensors", ".sft")):
        return SafetensorsHeader({}, {})
    try:
        return safetensors_header.read_header(path)
    except SafetensorsError as error:
        raise ValueError(f"{path}: expected a safetensors file, but it {error.problem}") from error
    except OSError as error:
        raise ValueError(f"{path}: its header cannot be read ({error}). Fetch the file again.") from error


def load_dit(name: str, weight_dtype: str = "default") -> Model:
    """MODEL (a ModelPatcher) of a file under `models/diffusion_models`, through the host's loader.

    weight_dtype: one of DTYPES, as in the host's Load Diffusion Model. A safetensors file whose metadata has
    `unet_config`
    (JSON) overrides sizes that the host's detection takes for granted, e.g. {"num_heads": 2} for the demo's small FLUX.
    """
    import comfy.sd
    import comfy.utils
    import folder_paths

    if weight_dtype not in DTYPES:
        raise ValueError(f"weight_dtype is {weight_dtype!r}, expected one of {', '.join(DTYPES)}.")
    path = folder_paths.get_full_path_or_raise("diffusion_models", name)
    options: dict[str, Any] = {}
    if weight_dtype != "default":
        options["dtype"] = TORCH_DTYPES[weight_dtype.removesuffix("_fast")]
    if weight_dtype.endswith("_fast"):
        options["fp8_optimizations"] = True
    sizes = declared_sizes(path)
    if not sizes:
        return comfy.sd.load_diffusion_model(path, model_options=options)
    return build_dit(comfy.utils.load_torch_file(path, safe_load=True), sizes, options, path)


def declared_sizes(path: str) -> dict:
    """The `unet_config` in a safetensors file's metadata; {} without one."""
    text = _file_header(path).metadata.get("unet_config")
    try:
        sizes = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: metadata `unet_config` is not JSON ({error}).") from error
    if not isinstance(sizes, dict):
        raise ValueError(f"{path}: metadata `unet_config` is {sizes!r}, expected a JSON object of sizes.")
    return sizes


def build_dit(state_dict: dict, sizes: dict, options: dict, path: str) -> Model:
    """The host's own detection with `sizes` laid over it, then the host's class and patcher, as its loader does it."""
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.utils
    from comfy import model_detection

    config = model_detection.detect_unet_config(state_dict, "")
    found = model_detection.model_config_from_unet_config({**config, **sizes}, state_dict) if config else None
    if found is None:
        raise ValueError(f"{path}: the host knows no model with these keys and the sizes {sizes} in `unet_config`.")
    device, offload = management.get_torch_device(), management.unet_offload_device()
    dtype = options.get("dtype") or management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state_dict),
        supported_dtypes=list(found.supported_inference_dtypes),
        weight_dtype=comfy.utils.weight_dtype(state_dict),
    )
    found.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, found.supported_inference_dtypes))
    if options.get("fp8_optimizations"):
        found.optimizations["fp8"] = True
    model = found.get_model(state_dict, "")
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    patcher = patcher_class(model, load_device=device, offload_device=offload)
    dynamic = getattr(patcher, "is_dynamic", lambda: False)()
    assign = {"assign": dynamic} if "assign" in inspect.signature(model.load_model_weights).parameters else {}
    check_keys(model, state_dict, path, dynamic)
    model.load_model_weights(state_dict, "", **assign)
    if not dynamic:
        model.to(offload)
    return patcher


def check_keys(model, state_dict: dict, path: str, dynamic: bool) -> None:
    """The host only warns about missing keys (and newer hosts fill them with zeros): a file of ours has them all."""
    expected = set(model.diffusion_model.state_dict()) if not dynamic else set()
    missing = expected - set(model.model_config.process_unet_state_dict(dict(state_dict)))
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} keys are missing, the first is {min(missing)!r}. Fetch or make the file again."
        )


def context_width(model: Model) -> int | None:
    """Width of the context tokens that a MODEL reads, in channels; None where it cannot be known."""
    layer, backbone = getattr(model.model, "diffusion_model", None), backbone_of(model)
    for name in backbone.context_layer.split(".") if backbone else ():
        layer = getattr(layer, name, None)  # nn.Sequential, too, has its parts under "0", "1", …
    width = getattr(layer, "in_features", None)
    if width is None:
        width = (getattr(getattr(model.model, "model_config", None), "unet_config", None) or {}).get("context_in_dim")
    return width
