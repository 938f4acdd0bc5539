"""Trains DLA and LoRA by the pack's own training: the demo's own pair, and the pairs that the evidence compares it with,
each differing in one thing.

    python common/bootstrap.py demo.family.train_arms COMFYUI DATA RUN [ARM ...] [--processes N]

reads RUN/models, writes RUN/models/{dla,loras}/ARM.safetensors; the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from ...common.bootstrap import ROOT, start_host
from . import fit, latents, pictures

STEPS, BATCH = (200, 1000), 32  # of the two stages
TWO, ONE = ("stage1", "stage2"), ("stage2",)
ARMS: dict[str, tuple[tuple[str, ...], dict]] = {
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("arms", nargs="*", default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument(
        "--processes", type=int, default=1, help="that share a step's examples; a divisor of %d" % BATCH
    )
    options = parser.parse_args()
    if unknown := set(options.arms) - set(ARMS):
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(ARMS)}")
    for kind in ("dla", "loras"):  # where the host knows them, what is trained goes there
        (options.run / "models" / kind).mkdir(parents=True, exist_ok=True)
    output = options.run / "output"
    if not (output / "subject_dla" / "cache" / "latents").exists():
        start_host(str(options.comfyui))
        import folder_paths

        folder_paths.add_model_folder_path("vae", str((options.run / "models" / "vae").resolve()), is_default=True)
        names = [name for row in pictures.entries(options.data, "pairs") for name in pictures.paths(row)]
        latents.hand_over(options.data, names, options.run, output / "subject_dla" / "cache" / "latents")
    for name in options.arms:
        stages, changes = ARMS[name]
        started, lines = time.monotonic(), []
        for stage in stages:
            last = stage == stages[-1]
            steps = STEPS[int(stage[-1]) - 1] if len(stages) > 1 else sum(STEPS)
            settings = {
                "data.source": str((options.data / "pairs.json").resolve()),
                "data.validation_source": str((options.data / "validation.json").resolve()),
                "training.steps": steps,
                "training.batch_size": BATCH // options.processes,
                "training.mixed_precision": "bf16" if fit.BF16 else "none",
                "run.name": name if last else f"{name}-{stage}",
                **({"run.start_dla": "", "run.start_lora": ""} if len(stages) == 1 else {}),
                **({"run.start_dla": f"{name}-stage1.safetensors", "run.start_lora": f"{name}-stage1.safetensors"} if last and len(stages) > 1 else {}),
                **changes,
            }  # fmt: skip
            if stage == "stage2" and len(stages) > 1:
                settings.pop("dla.modalities", None)  # goes on from that DLA
            several = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes))
            command = [
                sys.executable,
                *(several if options.processes > 1 else ()),
                str(ROOT / "training"),
                str(ROOT / "demo" / "family" / f"{stage}.toml"),
            ]
            command += ["--comfyui", str(options.comfyui), "--models", str(options.run / "models"), "--output", str(output)]  # fmt: skip
            for key, value in settings.items():
                command += ["--set", f"{key} = {json.dumps(value)}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                return done.returncode
            line = json.loads(done.stdout.splitlines()[-1])
            lines.append(line | {kind: Path(line[kind]).name for kind in ("dla", "lora")})
        folder = options.run / "models" / "dla"
        validation = (output / "subject_dla" / "runs" / name / "validation.csv").read_text()
        record = {"arm": name, "stages": lines, "seconds": round(time.monotonic() - started), "held out": validation}
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
