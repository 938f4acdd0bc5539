"""The demo's family of models: trained by this project on rendered toys (docs/demo-family.md), small enough for a CPU,
in the layouts and folders of the real ones.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "demo" / "models"  # laid out like ComfyUI's
NAMES = {
    "mllm": "demo-qwen2.5-vl",
    "dla": "demo.safetensors",
    "loras": "demo.safetensors",
    "diffusion_models": "demo-flux.safetensors",
    "vae": "demo-taef1.safetensors",
}
SIDE = 112  # px of its pictures: a multiple of the MLLM's 28 and of the DiT's 16
CONTEXT_WIDTH = 128
FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159  # FLUX.1's latents, as the host takes them to the DiT
# FLUX.1's layout made small, without the distilled guidance; older hosts take some sizes for granted, so the file says
# them (loaders/dit.py).
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "hidden_size": 192, "num_heads": 6,
    "mlp_ratio": 4.0, "depth": 3, "depth_single_blocks": 6, "axes_dim": [8, 12, 12], "theta": 10000, "qkv_bias": True,
    "guidance_embed": False, "vec_in_dim": 16, "context_in_dim": CONTEXT_WIDTH, "txt_ids_dims": [],
}  # fmt: skip
SIZES = ("num_heads", "hidden_size", "context_in_dim", "vec_in_dim", "axes_dim")  # not read from weights by every host


def flux_config() -> dict:
    """FLUX as far as this host's class knows its parameters."""
    import inspect

    import comfy.ldm.flux.model

    known = inspect.signature(comfy.ldm.flux.model.FluxParams).parameters
    return {key: value for key, value in FLUX.items() if key in known}


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
