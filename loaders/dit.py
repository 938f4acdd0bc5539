"""The DiT, loaded by the host, and what its file's header tells without reading weights."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError, safe_open

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
    if not str(path).endswith((".safetensors", ".sft")):
        return DiTHeader()
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            found = ((backbone_of_keys(keys, prefix), prefix) for prefix in PREFIXES[::-1])
            backbone, prefix = next(((backbone, prefix) for backbone, prefix in found if backbone), (None, ""))
            key = f"{prefix}{backbone.context_layer}.weight" if backbone else ""
            # Packed 4-bit weights have half the columns: read plain matrices only.
            plain = key in keys and file.get_slice(key).get_dtype() in ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
            return DiTHeader(backbone, file.get_slice(key).get_shape()[1] if plain else None)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: expected a safetensors file, but its header cannot be read ({error}). "
            "It is truncated, or another kind of file under this name: fetch it again."
        ) from error


def load_dit(name: str, weight_dtype: str = "default") -> Model:
    """MODEL (a ModelPatcher) of a file under `models/diffusion_models`, through the host's loader.

    weight_dtype: one of DTYPES, as in the host's Load Diffusion Model. A safetensors file whose metadata has
    `unet_config`
    (JSON) overrides sizes that the host's detection takes for granted, e.g. {"num_heads": 2} for the demo's small FLUX.
    """
    import comfy.sd
    import comfy.utils
    import folder_paths
    import torch

    if weight_dtype not in DTYPES:
        raise ValueError(f"weight_dtype is {weight_dtype!r}, expected one of {', '.join(DTYPES)}.")
    path = folder_paths.get_full_path_or_raise("diffusion_models", name)
    options: dict[str, Any] = {}
    if weight_dtype.startswith("fp8_e4m3fn"):
        options["dtype"] = torch.float8_e4m3fn
    elif weight_dtype == "fp8_e5m2":
        options["dtype"] = torch.float8_e5m2
    if weight_dtype.endswith("_fast"):
        options["fp8_optimizations"] = True
    sizes = declared_sizes(path)
    if not sizes:
        return comfy.sd.load_diffusion_model(path, model_options=options)
    return build_dit(comfy.utils.load_torch_file(path, safe_load=True), sizes, options, path)


def declared_sizes(path: str) -> dict:
    """The `unet_config` in a safetensors file's metadata; {} without one."""
    if not str(path).endswith((".safetensors", ".sft")):
        return {}
    read_header(path)  # a broken file gets this pack's error rather than the library's
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("unet_config")
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
