"""Checks the paper's claims on the demo's family: pictures of held-out toys under every schedule and by every pair of DLA
and LoRA, read by the oracle, and a page with tables and pictures.

    nox -s evidence                  writes docs/evidence.md; the last line of standard output is one JSON object
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from ...common import bootstrap
from ...common.bootstrap import ROOT
from ..family.layout import MODELS
from .kept import Kept
from .rows import ROWS

SHOWN = 6  # cases whose pictures are kept for the page


def main() -> int:
    parser = argparse.ArgumentParser(prog="nox -s evidence --", description=__doc__.split("\n")[0])
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"))
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / ".cache" / "evidence",
        help="of data and figures; a row there is not drawn again",
    )
    parser.add_argument(
        "--models", type=Path, default=MODELS, help="a models folder with another family of these names"
    )
    parser.add_argument("--cases", type=float, default=1.0, help="share of each set's cases, for a quick look")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "evidence.md")
    parser.add_argument(
        "--record", action="store_true", help="keep the rows of pairs that do not ship in demo/evidence/recorded.json"
    )
    parser.add_argument("--worker", type=int, default=-1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cases != 1:  # a quick look's rows are no others'
        options.work /= f"cases-{options.cases}"
    options.work.mkdir(parents=True, exist_ok=True)
    if options.worker >= 0:
        draw(options)
        return 0
    started = time.monotonic()
    data = options.work / "data"
    test = data / "test.json"
    known = {entry["set"] for entry in json.loads(test.read_text(encoding="utf-8"))} if test.exists() else set()
    if {row.cases for row in ROWS} - known:
        subprocess.run([sys.executable, bootstrap.__file__, "demo.family.data", str(data), "--examples", "0"], check=True, stdout=sys.stderr)  # fmt: skip
    command = [
        sys.executable,
        bootstrap.__file__,
        "demo.evidence.run",
        *sys.argv[1:],
        "--comfyui",
        str(options.comfyui),
    ]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # two processes of one thread each are quicker than one of two
    workers = [subprocess.Popen([*command, "--worker", str(number)], env=one, stdout=sys.stderr) for number in range(2)]
    if any([worker.wait() for worker in workers]):
        return 1
    from .page import write_page

    kept = Kept(options.work, options.models)
    if options.record:
        ships = Kept(options.work, MODELS)
        kept.record([row for row in ROWS if not ships.drawable(row)])
    figures = write_page(options.page, kept, data, time.monotonic() - started)
    print(json.dumps(figures), flush=True)
    return 0


def draw(options) -> None:
    """Every other row, each kept as JSON as soon as it is done."""
    bootstrap.start_host(str(options.comfyui))
    import comfy.utils
    import folder_paths
    from PIL import Image

    from ...loaders import folders
    from ..family.oracle import load_oracle
    from .draw import Family

    folders.register()
    for kind in ("mllm", "dla", "diffusion_models", "vae", "loras"):
        folder_paths.add_model_folder_path(kind, str((options.models / kind).resolve()), is_default=True)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    kept = Kept(options.work, options.models)
    rows = [row for row in ROWS if kept.drawable(row)][options.worker :: 2]
    rows = [row for row in rows if not kept.file(row).exists()]
    if not rows:
        return
    family, oracle = Family(), load_oracle(options.models.parent / "oracle.safetensors")
    cases = family.cases(options.work / "data")
    arm = None
    for row in rows:
        started = time.monotonic()
        if arm is None or arm.name != row.arm:
            arm = family.arm(row.arm)
        chosen = [case for case in cases if case.entry["set"] == row.cases]
        chosen = chosen[: max(2, round(len(chosen) * options.cases * row.share))]
        drawn = arm.draw(chosen, row.stages, images=row.images, change=row.change, seed=row.seed)
        reading = oracle.read(drawn)
        sheet = torch.cat(list(drawn[:SHOWN]), 2).mul(255).byte().permute(1, 2, 0).numpy()
        file = kept.file(row)
        Image.fromarray(sheet).save(file.with_suffix(".png"))
        result = {
            "angles": reading.angles.tolist(),
            "traits": {name: values.tolist() for name, values in reading.traits.items()},
            "seconds": round(time.monotonic() - started, 1),
        }
        file.write_text(json.dumps(result), encoding="utf-8")
        print(f"{row.key}: {len(chosen)} pictures in {result['seconds']} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
