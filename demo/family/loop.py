"""The training loop of the demo's VAE, MLLM, DiT and oracle, which the pack's own training does not cover.

A step is a function of the seed and its number, and checkpoints are atomic: the same command resumes a stopped run.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...common.bootstrap import start_host
from ...common.files import save_tensors

HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # elsewhere bf16 products are emulated, and slow


def setup(description: str, *steps: int) -> argparse.Namespace:
    """Reads comfyui, data, run, steps (a default per phase) and start from the command line; starts the host; seeds."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("comfyui")
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    phases = {"nargs": len(steps), "default": steps} if len(steps) > 1 else {"default": steps[0]}
    parser.add_argument("--steps", type=int, **phases)
    parser.add_argument("--start", type=Path, metavar="FILE", help="initial weights (.safetensors), where they fit")
    options = parser.parse_args()
    start_host(options.comfyui)
    torch.manual_seed(0)
    return options


def autocast() -> torch.autocast:
    """bf16 products where this processor has them."""
    return torch.autocast("cpu", torch.bfloat16, enabled=HAS_BF16)


def load_matching(model: nn.Module, file: Path | None, rename: Callable[[str], str] = str) -> None:
    """Loads the weights of `file` whose name (after `rename`) and shape are the model's; the others stay."""
    if file is None:
        return
    own = model.state_dict()
    found = {rename(key): value.float() for key, value in load_file(file).items()}
    matching = {key: value for key, value in found.items() if key in own and own[key].shape == value.shape}
    model.load_state_dict(matching, strict=False)
    log(f"{file.name}: {len(matching)} of {len(own)} weights loaded")


def train(
    name: str,
    model: nn.Module,
    loss_terms: Callable[[int], dict[str, Tensor]],
    folder: Path,
    *,
    steps: int,
    learning_rate: float,
    warmup: int = 100,
    context: Callable = nullcontext,
) -> dict:
    """Trains `model` in place with AdamW and leaves the moving average of its weights in it.

    Args:
        name: Of the run; its checkpoint is folder/name.pt.
        model: The module whose parameters all train.
        loss_terms: Step number to named terms, whose sum is the loss; called under `autocast`.
        folder: Where the checkpoint is.
        steps: Optimizer steps in all, those before a resume included.
        learning_rate: Peak rate, after a linear warmup and before a cosine decay to 0.
        warmup: Steps of the warmup.
        context: Makes the context manager around each forward and backward pass.

    Returns:
        The record of the run: name, steps, rate, seconds, and mean losses of every 100 steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.pt"
    record = {"name": name, "steps": steps, "rate": learning_rate, "seconds": 0.0, "losses": {}}
    mean = {key: value.detach().clone() for key, value in model.state_dict().items()}
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.98))
    start = 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        mean, start, record = state["mean"], state["step"], json.loads(state["record"]) | {"steps": steps}
        optimizer.load_state_dict(state["optimizer"])
        log(f"{name}: resuming at step {start}")
    timer, sums = time.monotonic(), {}
    model.train()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad(set_to_none=True)
        with context():
            with autocast():
                terms = loss_terms(step)
            sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(0.998, (1 + step) / (10 + step))
            for key, value in model.state_dict().items():
                if value.is_floating_point():
                    mean[key].lerp_(value, 1 - decay)
        for key, value in terms.items():
            sums.setdefault(key, []).append(float(value.detach()))
        if (step + 1) % 100 == 0:
            record["seconds"] += time.monotonic() - timer
            timer = time.monotonic()
            record["losses"][step + 1] = losses = {key: round(sum(v) / len(v), 5) for key, v in sums.items()}
            text = " ".join(f"{key} {value:.4f}" for key, value in losses.items())
            log(f"{name} {step + 1}/{steps} {text} ({record['seconds']:.0f} s)")
            sums = {}
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "mean": mean, "step": step + 1, "optimizer": optimizer.state_dict()}
            torch.save(state | {"record": json.dumps(record)}, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
    model.load_state_dict(mean)
    return record


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one training step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def save_weights(path: Path, weights: dict[str, Tensor], record: dict, metadata: dict[str, str] | None = None) -> None:
    """Writes the weights in fp16, and the record of their training in a JSON file beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {key: value.half().contiguous() for key, value in weights.items()}, metadata)
    path.with_suffix(".json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def log(text: str) -> None:
    """Prints a line at once."""
    print(text, flush=True)
