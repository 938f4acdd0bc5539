"""A tiny model family with random weights, in the key layouts of the real ones: it exercises every step and draws
noise.

    python demo/family.py COMFYUI OUT

writes OUT/{mllm,dla,diffusion_models,vae}. The demo runs on it until a family trained by this project takes its place.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "mllm": "demo-qwen2.5-vl-random",
    "dla": "demo-dla-random.safetensors",
    "diffusion_models": "demo-flux-random.safetensors",
    "vae": "demo-taef1-random.safetensors",
}
CONTEXT_WIDTH = 128
# FLUX.1's layout with 2 heads of 128 in place of 24; older hosts take some sizes for granted, so the file says them
# (loaders/dit.py).
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "hidden_size": 256, "num_heads": 2,
    "mlp_ratio": 4.0, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True,
    "guidance_embed": True, "vec_in_dim": 768, "context_in_dim": CONTEXT_WIDTH, "txt_ids_dims": [],
}  # fmt: skip
SIZES = (
    "num_heads",
    "hidden_size",
    "context_in_dim",
    "vec_in_dim",
)  # the oldest host reads none of them from the weights


def complete(folder: Path) -> bool:
    return all((folder / kind / name).exists() for kind, name in NAMES.items())


def build(folder: Path) -> None:
    """Writes the family. Imports the host: its folder is on sys.path, its options are set."""
    from subject_dla.dla import DLAConfig, DualLayerAggregator, MLLMInfo, save_dla
    from subject_dla.tests.small.mllm import build_qwen25vl

    torch.manual_seed(0)
    places = {kind: folder / kind / name for kind, name in NAMES.items()}
    for place in places.values():
        place.parent.mkdir(parents=True, exist_ok=True)
    build_qwen25vl(places["mllm"], width=64, layers=3)
    info = MLLMInfo(NAMES["mllm"], "qwen2_5_vl", 3, 64)
    config = DLAConfig(info, CONTEXT_WIDTH, "flux", provenance={"training": "none: a new DLA"})
    save_dla(places["dla"], DualLayerAggregator(config))
    flux = random_like(host_shapes("comfy.ldm.flux.model", "Flux", FLUX))
    # The published files call the norms' weights "scale"; newer hosts rename them on loading.
    flux = {key.replace("_norm.weight", "_norm.scale"): value for key, value in flux.items()}
    sizes = {name: FLUX[name] for name in ("hidden_size", "num_heads", "context_in_dim")}
    save_file(flux, places["diffusion_models"], {"unet_config": json.dumps(sizes)})
    vae = random_like(host_shapes("comfy.taesd.taesd", "TAESD", {"latent_channels": 16}, own=False), torch.float32)
    vae |= {"vae_scale": torch.tensor(0.3611), "vae_shift": torch.tensor(0.1159)}  # FLUX.1's latent scale
    save_file(vae, places["vae"])


def host_shapes(module: str, name: str, config: dict, own: bool = True) -> dict[str, torch.Size]:
    """Keys and shapes of a class of the host, built without memory. own: it takes dtype, device and operations."""
    import inspect

    import comfy.ops

    code = importlib.import_module(module)
    parameters = getattr(code, "FluxParams", getattr(code, name)) if name == "Flux" else getattr(code, name)
    known = inspect.signature(parameters).parameters
    config = {key: value for key, value in config.items() if key in known or key == "image_model"}
    extra = {"device": "meta", "dtype": torch.bfloat16, "operations": comfy.ops.disable_weight_init} if own else {}
    with torch.device("meta"):
        model = getattr(code, name)(**config, **extra)
    return {key: value.shape for key, value in model.state_dict().items()}


def random_like(shapes: dict[str, torch.Size], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Weights that carry a signal through: matrices scaled by their fan-in, norms at one, small biases."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) >= 2:
            value = noise / shape[1:].numel() ** 0.5
        else:
            value = 1 + 0.02 * noise if "norm" in key and "bias" not in key else 0.02 * noise
        weights[key] = value.to(dtype)
    return weights


def import_pack() -> None:
    """Makes the pack importable as `subject_dla`, whatever its folder is called, as the host does with its own name."""
    if "subject_dla" not in sys.modules:
        place = importlib.util.spec_from_file_location(
            "subject_dla", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        module = importlib.util.module_from_spec(place)
        sys.modules["subject_dla"] = module
        place.loader.exec_module(module)


def start_host(comfyui: str) -> None:
    """Puts the host on sys.path, on the CPU, before anything imports its model management."""
    os.environ["COMFYUI_PATH"] = comfyui  # the MLLM's tokenizer is the host's
    sys.path.insert(0, comfyui)
    sys.argv = sys.argv[:1]  # the host reads the command line when its options are imported
    from comfy.cli_args import args

    args.cpu = True


if __name__ == "__main__":
    comfyui, out = sys.argv[1:3]
    import_pack()
    start_host(comfyui)
    build(Path(out))
