"""Models at the size of their release with random weights, for measurements of time and memory; no files are needed.

Tensors of a state dict are views of one block of random numbers: the host copies them into its model, so that 24 GB of
weights take 24 GB, not 48, and are made in seconds.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...loaders.backbones import BACKBONES
from ...tests.small import dit
from ...tests.small.mllm import build_internvl, build_qwen3vl, build_qwen25vl
from ...tests.small.models import KL_VAE, host_shapes, kl_vae, random_like

CONTEXT_WIDTHS = {"flux": 4096, "flux2": 7680}  # of the releases, channels
SPREAD = 0.02  # standard deviation of matrices: states neither vanish nor overflow in random layers
DRAWN = 2**24 + 3  # numbers; no multiple of a matrix's side
MLLMS: dict[str, Any] = {  # name -> builder of a small folder, and what its config.json says at full size
    "InternVL3-8B": (
        build_internvl,
        dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, head_dim=128),
        dict(num_hidden_layers=28, max_window_layers=28),
        dict(
            hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24,
            image_size=[448, 448],
        ),
    ),
    "Qwen3-VL-4B": (
        build_qwen3vl,
        dict(hidden_size=2560, intermediate_size=9728, num_attention_heads=32, num_key_value_heads=8, head_dim=128),
        dict(
            num_hidden_layers=36,
            rope_scaling=dict(mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default"),
        ),
        dict(
            hidden_size=1024, intermediate_size=4096, num_heads=16, depth=24, deepstack_visual_indexes=[5, 11, 17],
            num_position_embeddings=2304, out_hidden_size=2560,
        ),
    ),
    "Qwen2.5-VL / 4": (  # a quarter of the 7B's widths and depths
        build_qwen25vl,
        dict(hidden_size=896, intermediate_size=4736, num_attention_heads=7, num_key_value_heads=1),
        dict(
            num_hidden_layers=7, max_window_layers=7, rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
        ),
        dict(
            hidden_size=320, intermediate_size=855, num_heads=4, depth=8, fullatt_block_indexes=[1, 3, 5, 7],
            out_hidden_size=896,
        ),
    ),
}  # fmt: skip


def release_sizes(family: str) -> dict[str, Any]:
    """Sizes of the family's release (FLUX.1-dev, FLUX.2 Klein 4B) over those of `tests.small.dit.CONFIGS`."""
    training = BACKBONES[family].training
    assert training
    depth = dict(depth=training.sizes.blocks, depth_single_blocks=training.sizes.single)
    return (dit.KLEIN if family == "flux2" else {}) | depth


def random_state(shapes: Mapping[str, torch.Size], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A state dict of views into one block: norm scales are one, all other numbers random."""
    largest = max(prod(shape) for shape in shapes.values())
    drawn = torch.empty(min(largest, DRAWN)).normal_(0, SPREAD)  # a processor draws no more than 10^8 a second
    block = drawn.to(dtype).repeat(-(-largest // len(drawn)))
    one = torch.ones(max((shape[0] for shape in shapes.values() if len(shape) == 1), default=1)).to(dtype)
    return {
        key: (one if len(shape) == 1 and not key.endswith("bias") else block)[: prod(shape)].view(shape)
        for key, shape in shapes.items()
    }


def random_dit(family: str, sizes: Mapping[str, Any], dtype: torch.dtype | None = None) -> Any:
    """MODEL through the host's detection. `sizes`: as for `tests.small.dit.build`; dtype: of storage, None = host's."""
    from ...loaders.dit import build_dit

    shapes = {key: value.shape for key, value in dit.build(family, sizes).state_dict().items()}
    return build_dit(random_state(shapes, dtype or torch.bfloat16), dict(sizes), {"dtype": dtype}, f"random {family}")


def timed_dit(family: str, full: bool, tiny: bool, device: torch.device) -> Any:
    """MODEL to time steps of, made on `device`: the release with `full`, a tiny one, else one double block of it."""
    with torch.device(device):
        if tiny:
            return dit.tiny(family)
        sizes = release_sizes(family) if full else {"depth": 1, "depth_single_blocks": 0}
        return random_dit(family, sizes, torch.bfloat16 if device.type == "cuda" else torch.float32)


def random_vae(family: str) -> Any:
    """The VAE of FLUX.1 or FLUX.2, at its size."""
    import comfy.sd

    if family == "flux2":
        return comfy.sd.VAE(sd=kl_vae())
    module, config = "comfy.ldm.modules.diffusionmodules.model", KL_VAE | {"z_channels": 16}
    parts = {part.lower(): host_shapes(module, part, config) for part in ("Encoder", "Decoder")}
    shapes = {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}
    return comfy.sd.VAE(sd=random_like(shapes, torch.float32))


def random_mllm(name: str, folder: Path, full: bool = True) -> Any:
    """An MLLM of MLLMS through this pack's loader of folders, bf16; with `full` False a tiny one of its kind.

    The file of weights is a hole of the right length: nothing of it is read, since each tensor is replaced.
    """
    from ...loaders.mllm.huggingface import load_folder

    build, text, depth, vision = MLLMS[name]
    build(folder)
    if not full:
        return load_folder(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.get("text_config", config).update(text | depth)
    config["vision_config"] |= vision
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    _write_hole(folder / "model.safetensors", _shapes(folder))
    mllm = load_folder(folder)
    parameters = dict(mllm.backbone.named_parameters())
    state = random_state({key: parameter.shape for key, parameter in parameters.items()})
    for key, parameter in parameters.items():
        parameter.data = state[key].to(parameter.dtype).clone()
    return mllm


def _shapes(folder: Path) -> dict[str, torch.Size]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    with torch.device("meta"):
        return {key: value.shape for key, value in transformers.AutoModel.from_config(config).state_dict().items()}


def _write_hole(path: Path, shapes: Mapping[str, torch.Size]) -> None:
    """A safetensors file in bf16 with a header and no data: file systems keep a hole without room for it."""
    header, at = {}, 0
    for key, shape in shapes.items():
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + 2 * prod(shape)]}
        at += 2 * prod(shape)
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def random_dla(mllm: Any, family: str, width: int) -> Any:
    """A DLA of this pack's default settings over every layer of an MLLM, for a context of `width` channels, bf16."""
    from ...dla import DLAConfig, DualLayerAggregator
    from ...loaders.dla import DLA

    config = DLAConfig(mllm.info, width, family)
    shapes = {key: value.shape for key, value in DualLayerAggregator(config, device="meta").state_dict().items()}
    return DLA(config, random_state(shapes), "random")
