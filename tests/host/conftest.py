"""In-process host: the ComfyUI checkout named by COMFYUI_PATH, on the CPU from the first import on."""

import os
from pathlib import Path

from subject_dla.common.bootstrap import start_host

COMFYUI = Path(os.environ.get("COMFYUI_PATH", ""))
if not (COMFYUI / "comfy").is_dir():
    raise RuntimeError(
        f"COMFYUI_PATH is {str(COMFYUI)!r}, expected a ComfyUI checkout (main.py, comfy/). `nox -s tests` sets it."
    )
start_host(COMFYUI)
