"""The DiT, loaded by the host, and what its file's header says."""

import re
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open

from ..common import safetensors_header
from ..common.dtypes import FILE_DTYPES
from ..common.safetensors_header import SafetensorsError, SafetensorsHeader
from ..common.untrusted_json import JSONError, parse_json
from .backbones import Backbone, backbone_of, backbone_of_keys
from .host import DIT_OPTIONS, file_errors, is_dynamic, load_model_weights, make_patcher
from .protocols import Model
from .weight_folders import check_finite

MOST_BLOCKS = 512  # of a DiT, or of experts in one; FLUX.1 has 57
BLOCK = re.compile(r"\.(\d{1,5})\.")  # a block's number in a key
# What `unet_config` may set that has to be a size.
SIZES = ("num_heads", "hidden_size", "depth", "depth_single_blocks", "in_channels", "patch_size", "axes_dim", "theta")
WEIGHTS = (".weight", ".bias")
NOT_WHOLE = ("disable_unet_model_creation", "final_layer")  # the host's, by which it builds none, or a part of one
# Prefixes under which checkpoints keep the DiT's keys.
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "net.")


@dataclass(frozen=True)
class DiTHeader:
    """What a file's header says: its family and the width of its context in channels; None = not known."""

    backbone: Backbone | None = None
    context_width: int | None = None


def read_header(path: str) -> DiTHeader:
    """Family and context width from a safetensors header, without reading weights.

    A file of another kind (GGUF, a pickle) or of an unknown layout gives an empty header: its own loader knows better.
    Raises ValueError for a .safetensors whose header cannot be read.
    """
    tensors = _file_header(path).tensors
    for prefix in PREFIXES[::-1]:
        if backbone := backbone_of_keys({key: tensor.shape for key, tensor in tensors.items()}, prefix):
            layer = tensors.get(f"{prefix}{backbone.context_layer}.weight")
            stack = tensors.get(f"{prefix}{backbone.stacked_by}.weight") if backbone.stacked_by else None
            # packed 4-bit weights are whole numbers with half the columns
            plain = layer is not None and layer.dtype in FILE_DTYPES and FILE_DTYPES[layer.dtype].is_floating_point
            width = layer.shape[1] * (stack.shape[1] if stack else 1) if layer and plain else None
            return DiTHeader(backbone, width)
    return DiTHeader()


def _file_header(path: str) -> SafetensorsHeader:
    """Of a safetensors file; an empty one of other files. Raises ValueError where it cannot be read."""
    if not str(path).endswith((".safetensors", ".sft")):
        return SafetensorsHeader({}, {})
    try:
        return safetensors_header.read_header(path)
    except SafetensorsError as error:
        raise ValueError(f"{path}: it {error.problem}") from error
    except OSError as error:
        raise ValueError(f"{path}: its header cannot be read ({error}). Fetch the file again.") from error


def load_dit(name: str, weight_dtype: str = "default") -> Model:
    """MODEL of a file under `models/diffusion_models`; names and dtypes are those of the host's Load Diffusion Model.

    A safetensors file whose metadata has `unet_config` (JSON) overrides sizes that the host's detection takes for
    granted, e.g. {"num_heads": 2} for the demo's small FLUX.1. Raises ValueError for another kind of file or dtype.
    """
    import comfy.sd
    import comfy.utils
    import folder_paths

    if weight_dtype not in DIT_OPTIONS:
        raise ValueError(f"weight_dtype is {weight_dtype!r}, expected one of {', '.join(DIT_OPTIONS)}.")
    path = folder_paths.get_full_path_or_raise("diffusion_models", name)
    options = dict(DIT_OPTIONS[weight_dtype])
    sizes = declared_sizes(path)
    check_weights(path)
    way_out = " Fetch the file again, or choose a diffusion model."
    with file_errors(f"{path}: the host cannot load it as a diffusion model", way_out):
        if not sizes:
            return comfy.sd.load_diffusion_model(path, model_options=options)
        state_dict = comfy.utils.load_torch_file(path, safe_load=True)
    return build_dit(state_dict, sizes, options, path)


def check_weights(path: str) -> None:
    """Raises ValueError for weights of a safetensors file that are NaN, infinite, or whole numbers without a scale.

    One at a time, before the host maps the same pages of the file: it would make noise or a black picture of them.
    """
    tensors = _file_header(path).tensors
    dtypes = {key: FILE_DTYPES[tensor.dtype] for key, tensor in tensors.items() if tensor.dtype in FILE_DTYPES}
    quantised = {key.rpartition(".")[0].removesuffix(".weight") for key in tensors if not key.endswith(WEIGHTS)}
    for key, dtype in dtypes.items():
        if key.endswith(WEIGHTS) and not dtype.is_floating_point and key.rpartition(".")[0] not in quantised:
            raise ValueError(
                f"{path}: {key} is {tensors[key].dtype}, expected floating-point numbers, or a scale beside it as "
                "quantised weights have. Fetch the file again."
            )
    if dtypes:
        with safe_open(path, framework="pt") as file:
            for key in (key for key, dtype in dtypes.items() if dtype.is_floating_point):
                check_finite(path, {key: file.get_tensor(key)})


def declared_sizes(path: str) -> dict:
    """The `unet_config` in a safetensors file's metadata; {} without one."""
    header = _file_header(path)
    text = header.metadata.get("unet_config")
    try:
        sizes = parse_json(text) if text else {}
    except JSONError as error:
        raise ValueError(f"{path}: metadata `unet_config` {error}. Fetch or make the file again.") from None
    for key, tensor in header.tensors.items():
        if sizes and not (tensor.dtype in FILE_DTYPES and FILE_DTYPES[tensor.dtype].is_floating_point):
            raise ValueError(f"{path}: {key} is {tensor.dtype}, expected floating-point numbers. Fetch the file again.")
    widest = max(
        (size for tensor in header.tensors.values() if 0 not in tensor.shape for size in tensor.shape), default=0
    )
    blocks = max((int(found[1]) + 1 for key in header.tensors if (found := BLOCK.search(key))), default=0)
    if blocks > MOST_BLOCKS:  # the host would build each, whatever is in it
        raise ValueError(
            f"{path}: it has a block {blocks - 1}, expected less than {MOST_BLOCKS}. Fetch the file again."
        )
    for name, value in sizes.items():
        most = blocks if "depth" in name or "layers" in name else widest
        plain = value is None or type(value) in (bool, str)
        if plain and name in SIZES or not plain and not _is_size(value, name, most):
            raise ValueError(
                f"{path}: metadata `unet_config` has {name} {value!r:.60}, expected a size that is no larger than the "
                f"weights' ({most:,}). Fetch or make the file again."
            )
    return sizes


def _is_size(value: Any, name: str, widest: int) -> bool:
    """Whether a number, or each in a list, is one that the weights can have; theta is RoPE's base, and free."""
    if isinstance(value, list):
        return len(value) <= 64 and all(type(item) is int and 0 <= item <= widest for item in value)
    if type(value) is float or name == "theta":
        return type(value) in (int, float) and (0 < value if name == "theta" else -1e9 <= value) and value <= 1e9
    return type(value) is int and (0 < value if name in SIZES else 0 <= value) and value <= widest


def build_dit(state_dict: dict, sizes: dict, options: dict, path: str) -> Model:
    """The host's own detection with `sizes` laid over it, then the host's class and patcher, as its loader does it."""
    import comfy.model_management as management
    import comfy.utils
    from comfy import model_detection

    unknown = f"{path}: the host knows no model with these keys and the sizes {sizes!s:.200} in `unet_config`"
    with file_errors(unknown):
        config = model_detection.detect_unet_config(state_dict, "")
        if others := [name for name in NOT_WHOLE if name in sizes and name not in (config or ())]:
            raise ValueError(f"{others[0]!r} is no setting of it")
        found = model_detection.model_config_from_unet_config({**config, **sizes}, state_dict) if config else None
    if found is None:
        raise ValueError(f"{unknown}.")
    device, offload = management.get_torch_device(), management.unet_offload_device()
    dtype = options.get("dtype") or management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state_dict),
        supported_dtypes=list(found.supported_inference_dtypes),
        weight_dtype=comfy.utils.weight_dtype(state_dict),
    )
    found.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, found.supported_inference_dtypes))
    if options.get("fp8_optimizations"):
        found.optimizations["fp8"] = True
    with file_errors(unknown):
        model = found.get_model(state_dict, "")
    patcher = make_patcher(model, device, offload)
    if not is_dynamic(patcher):
        check_keys(model, state_dict, path)
    with file_errors(unknown):  # shapes
        load_model_weights(patcher, state_dict)
    return patcher


def check_keys(model, state_dict: dict, path: str) -> None:
    """The host only warns about missing keys (and newer hosts fill them with zeros): a file of ours has them all."""
    found = model.model_config.process_unet_state_dict(dict(state_dict))
    missing = set(model.diffusion_model.state_dict()) - set(found)
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} keys are missing, the first is {min(missing)!r}. Fetch or make the file again."
        )


def dit_of(model: Any) -> Any:
    """The DiT's module of the host's model (MODEL's `.model`), without the wrapper of torch.compile."""
    module = getattr(model, "diffusion_model", None)
    return getattr(module, "_orig_mod", module)


def context_width(model: Model) -> int | None:
    """Width of the context tokens that a MODEL reads, in channels; None where it cannot be known."""
    module, backbone = dit_of(model.model), backbone_of(model)
    width = _columns(module, backbone.context_layer) if backbone else None
    if width is not None and backbone and backbone.stacked_by:
        width *= _columns(module, backbone.stacked_by) or 1
    if width is None:
        width = (getattr(getattr(model.model, "model_config", None), "unet_config", None) or {}).get("context_in_dim")
    return width


def pooled_width(model: Model) -> int | None:
    """Width of the pooled vector that a MODEL reads (FLUX.1: CLIP-L's), in channels; None where it reads none."""
    return _columns(dit_of(model.model), "vector_in.in_layer")


def _columns(module: Any, path: str) -> int | None:
    """What a linear map at a dotted path reads, in channels."""
    for name in path.split("."):
        module = getattr(module, name, None)  # nn.Sequential, too, has its parts under "0", "1", …
    return getattr(module, "in_features", None)
