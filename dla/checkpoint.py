"""The DLA file: one .safetensors, whose metadata holds the DLAConfig as JSON under the key "subject_dla".

The header (config, keys, shapes, dtypes) is checked before any weight is read, so that a wrong file fails at once with
the reason. Nothing is ever unpickled.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..common.dtypes import UNQUANTIZED
from ..common.files import save_tensors
from ..common.safetensors_header import SafetensorsHeader, TensorHeader, read_header
from ..common.untrusted_json import JSONError, parse_json
from .aggregator import DualLayerAggregator
from .config import DLAConfig
from .features import describe_layers

METADATA_KEY = "subject_dla"


class DLACheckpointError(ValueError):
    """A file that is no usable DLA; the text has file, key, value found, value expected and remedy."""

    def __init__(self, path: str | os.PathLike, problem: str):
        super().__init__(f"DLA file '{Path(path).name}': {problem}")


def save_dla(path: str | os.PathLike, dla: DualLayerAggregator) -> None:
    """Write a DLA as .safetensors, weights in their own dtype; at `path` there is always a whole file, old or new.

    Raises DLACheckpointError for weights that are not finite, OSError if writing fails.
    """
    path = Path(path)
    state = {key: value.detach().cpu().contiguous() for key, value in dla.state_dict().items()}
    check_finite(path, state)
    save_tensors(path, state, {METADATA_KEY: json.dumps(dla.config.to_dict())})


def read_config(path: str | os.PathLike) -> DLAConfig:
    """Config of a DLA file, from its header alone, every key, shape and dtype checked. Raises DLACheckpointError."""
    try:
        header = read_header(path)
        config = _parse_config(header)
        _check_keys(config, header.tensors)
    except ValueError as error:
        raise DLACheckpointError(path, getattr(error, "problem", str(error))) from None
    return config


def load_dla(
    path: str | os.PathLike, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> DualLayerAggregator:
    """Reads a DLA as torch's modules on `device` (None = CPU), `dtype` None = as stored. Raises DLACheckpointError."""
    config = read_config(path)
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise DLACheckpointError(path, f"cannot be read ({error}). Download or save it again.") from None
    check_finite(path, state)
    with torch.device("meta"):
        dla = DualLayerAggregator(config)
    dla.load_state_dict(state, assign=True)
    return dla.to(device=device, dtype=dtype).eval().requires_grad_(False)


def check_finite(path: str | os.PathLike, state: dict[str, Tensor]) -> None:
    """Raises DLACheckpointError if a weight is NaN or infinite. `path` is for the message."""
    for key, value in state.items():
        if not bool(value.isfinite().all()):
            count = int((~value.isfinite()).sum())
            problem = f"{key} has {count} of {value.numel()} values that are NaN or infinite, expected finite weights."
            raise DLACheckpointError(path, f"{problem} The training run diverged: take an earlier checkpoint.")


def describe(config: DLAConfig) -> str:
    """A DLA's pooling, MLLM, DiT and training, in a few lines for people."""
    pooling = {"softmax": "softmax over layers", "linear": "linear map over layers"}[config.pooling]
    kind = {
        "dual": f"dual: text and image tokens each with their own pooling, {config.blocks} block(s), {pooling}",
        "shared": f"shared: one pooling for all tokens, {config.blocks} block(s), {pooling}",
        "last": "no pooling",
    }[config.modalities]
    lines = [
        f"MLLM {config.mllm}",
        f"context width {config.context_width}, for {config.dit or 'any DiT of that width'}",
        f"{kind}; {describe_layers(config.pooled_layers)}",
        f"template tokens: {config.template}",
    ]
    if config.refiner_blocks:
        lines.append(f"refiner of {config.refiner_blocks} block(s) over the tokens")
    if config.vit_blend:
        lines.append(f"ViT features blended in at {config.vit_blend:g}")
    if config.provenance:
        lines.append("training: " + ", ".join(f"{key} {value}" for key, value in config.provenance.items()))
    return "\n".join(lines)


def _parse_config(header: SafetensorsHeader) -> DLAConfig:
    """The config in a header; raises ValueError."""
    if METADATA_KEY not in header.metadata:
        raise ValueError(f"is no DLA: its metadata has no entry {METADATA_KEY!r}. {_guess_kind(header.tensors)}")
    try:
        values = parse_json(header.metadata[METADATA_KEY])
    except JSONError as error:
        raise ValueError(f"metadata entry {METADATA_KEY!r} {error}. Save it again with save_dla.") from None
    return DLAConfig.from_dict(values)


def _check_keys(config: DLAConfig, found: dict[str, TensorHeader]) -> None:
    """Raises ValueError unless keys, shapes and dtypes are those of the config."""
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in DualLayerAggregator(config).state_dict().items()}
    for prefix in {key[: -len(end) - 1] for key in found for end in expected if key.endswith("." + end)}:
        if {key.removeprefix(prefix + ".") for key in found} == set(expected):
            raise ValueError(
                f"all keys begin with {prefix!r}: it was saved from inside another module. Save with save_dla."
            )
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    if missing and extra and len(missing) == len(extra):
        raise ValueError(
            f"{len(extra)} key(s) have other names: found {min(extra)!r}, expected {min(missing)!r}. It was written by "
            "another program or edited; save with save_dla."
        )
    if missing:
        raise ValueError(
            f"key {missing[0]!r} is missing ({len(missing)} of {len(expected)} are), expected with shape "
            f"{list(expected[missing[0]])}. The file is incomplete, or its config is of another DLA: save it again."
        )
    if extra:
        raise ValueError(
            f"key {extra[0]!r} is not part of this DLA ({len(extra)} such key(s)), expected only what its config "
            f"({config.modalities}, {config.pooling}, {config.blocks} block(s)) has. Save it again."
        )
    for key, shape in expected.items():
        if found[key].shape != shape:
            raise ValueError(
                f"{key} has shape {list(found[key].shape)}, expected {list(shape)} for MLLM width {config.mllm.width}, "
                f"{len(config.pooled_layers)} layers and context width {config.context_width}. Weights and config are "
                "of different DLAs: save it again."
            )
        if (dtype := found[key].dtype) not in UNQUANTIZED:
            raise ValueError(
                f"{key} has dtype {dtype}, expected {', '.join(UNQUANTIZED)}. Save it again in one of them."
            )


def _guess_kind(keys: Iterable[str]) -> str:
    """A guess, by its keys, at the kind of a file without DLA config."""
    if any("lora" in key.lower() for key in keys):
        return "It looks like a LoRA: put it into models/loras."
    if any(part in key for key in keys for part in ("double_blocks.", "transformer_blocks.", "diffusion_model.")):
        return "It looks like a diffusion model: put it into models/diffusion_models."
    if any(part in key for key in keys for part in ("embed_tokens.", "visual.", "lm_head.")):
        return "It looks like a language model: put it into models/mllm or models/text_encoders."
    if any(part in key for key in keys for part in ("decoder.", "taesd_decoder")):
        return "It looks like a VAE: put it into models/vae."
    return f"Its first key is {next(iter(keys), None)!r}. Choose a file that Train DLA made, or save_dla."
