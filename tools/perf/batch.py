"""100 prompts on one subject, one after the other through a server: whether it slows down or grows.

    nox -s bench -- batch [--prompts 100]

Two servers with Qwen-Image-Edit, small and with random weights, take turns: one runs Subject Conditioning and Apply
Stages, the other the host's own nodes with the same sizes. Seconds are the host's own of each job; memory is what the
server's process holds (RSS). Compared are medians of the last ten prompts and of the first ten after five that warm up.
Last line: one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ...common.bootstrap import ROOT
from ...common.console import say
from ..comfy_client.client import WorkflowError, failure
from ..comfy_client.server import PACK, Server, device

WARM_UP, TEN = 5, 10
SUBJECT = ROOT / "demo" / "images" / "chelsea.jpg"
SAMPLING = {"cfg": 2.5, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
MODELS = {
    "dit": ("UNETLoader", {"unet_name": "qwen_image_edit_2509_fp8_e4m3fn.safetensors", "weight_dtype": "default"}),
    "clip": ("CLIPLoader", {"clip_name": "qwen_2.5_vl_7b_fp8_scaled.safetensors", "type": "qwen_image"}),
    "vae": ("VAELoader", {"vae_name": "qwen_image_vae.safetensors"}),
    "image": ("LoadImage", {"image": "subject.jpg"}),
    "decode": ("VAEDecode", {"samples": ["sample", 0], "vae": ["vae", 0]}),
    "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "batch"}),
}
OURS = {
    "mllm": ("SubjectMLLMFromCLIP", {"clip": ["clip", 0]}),
    "both": (
        "SubjectConditioning",
        {"model": ["dit", 0], "vae": ["vae", 0], "mllm": ["mllm", 0], "image_1": ["image", 0], "prompt": "",
         "negative_prompt": "", "width": 64, "height": 64, "batch_size": 1, "strength": 1.0, "size": 64,
         "placement": "auto", "encode_negative": True},
    ),
    "stages": (
        "SubjectApplyStages",
        {"model": ["dit", 0], "preset": "paper", "clock": "flow_time", "tau1": 0.95, "tau2": 0.5},
    ),
    "sample": (
        "KSampler",
        {"model": ["stages", 0], "positive": ["both", 0], "negative": ["both", 1], "latent_image": ["both", 2]},
    ),
}  # fmt: skip
STOCK = {
    "scaled": (
        "ImageScale",
        {"image": ["image", 0], "upscale_method": "area", "width": 64, "height": 64, "crop": "disabled"},
    ),
    "reference": ("VAEEncode", {"pixels": ["scaled", 0], "vae": ["vae", 0]}),
    "prompt": ("TextEncodeQwenImageEditPlus", {"clip": ["clip", 0], "image1": ["image", 0], "prompt": ""}),
    "nothing": ("TextEncodeQwenImageEditPlus", {"clip": ["clip", 0], "image1": ["image", 0], "prompt": ""}),
    "positive": ("ReferenceLatent", {"conditioning": ["prompt", 0], "latent": ["reference", 0]}),
    "negative": ("ReferenceLatent", {"conditioning": ["nothing", 0], "latent": ["reference", 0]}),
    "empty": ("EmptySD3LatentImage", {"width": 64, "height": 64, "batch_size": 1}),
    "sample": (
        "KSampler",
        {"model": ["dit", 0], "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["empty", 0]},
    ),
}
FORMS = {"ours": (OURS, "both"), "stock": (STOCK, "prompt")}  # nodes, the one with the prompt


def main(argv: list[str]) -> None:
    """Measures and prints one JSON object. `argv`: the command line without the benchmark's name."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- batch", description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=100)
    options = parser.parse_args(argv)
    comfyui = Path(os.environ["COMFYUI_PATH"])
    os.environ["OMP_NUM_THREADS"] = "1"

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        models = build_models(comfyui, Path(work) / "models")
        ours, stock = (small_server(comfyui, Path(work) / name, models) for name in FORMS)
        with ours, stock:
            runs = {name: Run(name, server) for name, server in zip(FORMS, (ours, stock))}
            for number in range(-WARM_UP, options.prompts):
                for run in list(runs.values())[:: 1 if number % 2 else -1]:
                    run.draw(number)
                if number % 20 == 0:
                    say(f"{number} prompts: " + ", ".join(f"{n} {r.seconds[-1]:.2f} s" for n, r in runs.items()))
    result = {"benchmark": "batch", "device": device()[-1].strip("-") if device() else "accelerator"}
    for name, run in runs.items():
        prefix = "" if name == "ours" else f"{name}_"
        result |= {
            f"{prefix}batch_drift": round(last_over_first(run.seconds), 4),
            f"{prefix}batch_growth": round(last_over_first(run.bytes) - 1, 4),
            f"{prefix}batch_seconds": round(statistics.median(run.seconds), 3),
            f"{prefix}batch_megabytes": round(run.bytes[-1] / 2**20),
            f"{prefix}batch_model_changes": changes(run.loads),
        }
    print(json.dumps(result))


def build_models(comfyui: Path, out: Path) -> Path:
    """The small random models of the tests; returns their folder."""
    bootstrap = str(ROOT / "common" / "bootstrap.py")
    command = [sys.executable, bootstrap, "tests.small.models", str(comfyui), str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return out


def small_server(comfyui: Path, base: Path, models: Path) -> Server:
    """A server with this pack, which reads such models and counts what it loads."""
    packs = {name: ROOT / "tests" / "server" / name for name in ("small_host", "load_counts")} | {PACK: ROOT}
    return Server(comfyui, base, packs=packs, models=[models], arguments=device())


def graph(form: str, text: str, seed: int, steps: int = 2) -> dict:
    """The workflow of "ours" or "stock" in API format, for a server that has the picture subject.jpg."""
    nodes, with_text = FORMS[form]
    made = {key: {"class_type": kind, "inputs": dict(inputs)} for key, (kind, inputs) in (MODELS | nodes).items()}
    made[with_text]["inputs"]["prompt"] = text
    made["sample"]["inputs"] |= SAMPLING | {"seed": seed, "steps": steps}
    return made


class Run:
    """One form's prompts on its server: seconds and bytes after each that does not warm up."""

    def __init__(self, form: str, server: Server):
        import psutil

        self.form, self.client = form, server.client
        self.process = psutil.Process(server.process.pid).children()[0]
        self.client.upload(SUBJECT, "subject.jpg")
        self.seconds: list[float] = []
        self.bytes: list[int] = []
        self.loads: list[list[str]] = []  # of the last prompt

    def draw(self, number: int) -> None:
        """One prompt of its own, with a seed of its own."""
        text = f"The subject of image 1 in a shop window, number {number}."
        prompt = graph(self.form, text, number + WARM_UP)
        before = len(self.client.get("/loads"))
        job = self.client.queue(prompt)
        while not (entry := self.client.get(f"/history/{job}").get(job)):
            time.sleep(0.02)
        if problem := failure(entry, prompt, {}):
            raise WorkflowError(problem)
        times = {kind: message["timestamp"] for kind, message in entry["status"]["messages"]}
        if number >= 0:
            self.seconds.append((times["execution_success"] - times["execution_start"]) / 1000)
            self.bytes.append(self.process.memory_info().rss)
            self.loads = self.client.get("/loads")[before:]


def last_over_first(values: Sequence[float]) -> float:
    """Median of the last ten over that of the first ten."""
    return statistics.median(values[-TEN:]) / statistics.median(values[:TEN])


def changes(loads: Sequence[list[str]]) -> int:
    """How often another model is asked for than just before."""
    return sum(models != before for before, models in zip([[], *loads], loads))
