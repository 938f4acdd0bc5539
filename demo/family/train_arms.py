"""Trains the demo's pair of DLA and LoRA, and the evidence's (one setting changed in each), by the pack's own training.

    python common/bootstrap.py demo.family.train_arms COMFYUI DATA RUN [ARM ...] [--processes N]

reads RUN/models, writes RUN/models/{dla,loras}/ARM.safetensors; the same command resumes a stopped run.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from ...common.bootstrap import ROOT, start_host
from .data import picture_paths, read_entries
from .latents import fill_latent_cache
from .loop import HAS_BF16

STEPS, BATCH = {1: 200, 2: 1000}, 32  # STEPS: of each training stage
TWO, ONE = (1, 2), (2,)
ARMS: dict[str, tuple[tuple[str, ...], dict]] = {  # name -> training stages, changed settings
    "demo": (TWO, {}),
    "demo-seed1": (TWO, {"training.seed": 1}),
    "demo-seed2": (TWO, {"training.seed": 2}),
    "demo-last": (TWO, {"dla.modalities": "last"}),  # the MLLM's last layer, projected
    "demo-lap": (TWO, {"dla.modalities": "shared"}),  # one pooling for text and image tokens
    "demo-single": (ONE, {}),  # as many steps, with the same shares of conditions throughout
    "demo-single-both": (ONE, {"training.mllm_only": 0.0, "training.vae_only": 0.0}),  # both conditions throughout
    "demo-text": (TWO, {"data.mllm_images": False}),  # the MLLM reads the prompt alone
}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("arms", nargs="*", default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--processes", type=int, default=1, help=f"for the {BATCH} examples of a step; a divisor")
    options = parser.parse_args()
    if unknown := set(options.arms) - set(ARMS):
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(ARMS)}")
    for kind in ("dla", "loras"):  # the training writes into the first folder of this kind that exists
        (options.run / "models" / kind).mkdir(parents=True, exist_ok=True)
    work = options.run / "output" / "subject_dla"
    if not (work / "cache" / "latents").exists():
        start_host(str(options.comfyui))
        import folder_paths

        folder_paths.add_model_folder_path("vae", str((options.run / "models" / "vae").resolve()), is_default=True)
        paths = picture_paths(read_entries(options.data, "pairs"))
        fill_latent_cache(options.data, paths, options.run, work / "cache" / "latents")
    for arm in options.arms:
        started, results = time.monotonic(), []
        for stage in ARMS[arm][0]:
            done = subprocess.run(_command(options, arm, stage), stdout=subprocess.PIPE, text=True)
            if done.returncode:
                return done.returncode
            result = json.loads(done.stdout.splitlines()[-1])
            results.append(result | {kind: Path(result[kind]).name for kind in ("dla", "lora")})
        validation = (work / "runs" / arm / "validation.csv").read_text()
        record = {"arm": arm, "stages": results, "seconds": round(time.monotonic() - started), "held out": validation}
        path = options.run / "models" / "dla" / f"{arm}.json"
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")
        print(json.dumps(record), flush=True)
    return 0


def _command(options: argparse.Namespace, arm: str, stage: int) -> list[str]:
    stages, changes = ARMS[arm]
    start = f"{arm}-stage1.safetensors" if stages == TWO and stage == 2 else ""
    settings = {
        "data.source": str((options.data / "pairs.json").resolve()),
        "data.validation_source": str((options.data / "validation.json").resolve()),
        "training.stage": stage,
        "training.steps": STEPS[stage] if stages == TWO else sum(STEPS.values()),
        "training.batch_size": BATCH // options.processes,
        "training.mixed_precision": "bf16" if HAS_BF16 else "none",
        "run.name": arm if stage == 2 else f"{arm}-stage1",
        "run.start_dla": start,
        "run.start_lora": start,
        **changes,
    }
    if start:
        settings.pop("dla.modalities", None)  # of the DLA that it starts from
    parallel = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes)]
    recipe = ROOT / "demo" / "family" / "pair.toml"
    command = [sys.executable, *(parallel if options.processes > 1 else []), str(ROOT / "training"), str(recipe)]
    command += ["--comfyui", str(options.comfyui), "--models", str(options.run / "models")]
    command += ["--output", str(options.run / "output")]
    return command + [word for key, value in settings.items() for word in ("--set", f"{key} = {json.dumps(value)}")]


if __name__ == "__main__":
    sys.exit(main())
