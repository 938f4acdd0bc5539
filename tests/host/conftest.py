"""In-process host: the ComfyUI checkout named by COMFYUI_PATH, on the CPU from the first import on."""

import os
import sys
from pathlib import Path

COMFYUI = Path(os.environ.get("COMFYUI_PATH", ""))
if not (COMFYUI / "comfy").is_dir():
    raise RuntimeError(
        f"COMFYUI_PATH is {str(COMFYUI)!r}, expected a ComfyUI checkout (main.py, comfy/). `nox -s tests` sets it."
    )

sys.path.insert(0, str(COMFYUI))
sys.argv = sys.argv[:1]  # the host reads the command line when its options are imported

from comfy.cli_args import args  # noqa: E402

args.cpu = True
