"""The loop that the demo's models share where the pack's own training has no part: VAE, MLLM, oracle and the DiT's base.

A step is a function of the seed and its number, and checkpoints are whole: the same command goes on after a stop.
"""

from __future__ import annotations

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

BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # products in bf16 are quick on such processors, and slow on others


def begin(description: str, *steps: int) -> argparse.Namespace:
    """comfyui, data, run and steps (a number, or one for each phase) from the command line; the host started, the seed set."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("comfyui")
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    many = {"nargs": len(steps), "default": steps} if len(steps) > 1 else {"default": steps[0]}
    parser.add_argument("--steps", type=int, **many)
    parser.add_argument(
        "--start", type=Path, metavar="FILE", help="weights (.safetensors) to begin with, where they fit"
    )
    options = parser.parse_args()
    start_host(options.comfyui)
    torch.manual_seed(0)
    return options


def mixed() -> torch.autocast:
    """bf16 products where this processor has them."""
    return torch.autocast("cpu", torch.bfloat16, enabled=BF16)


def start(model: nn.Module, file: Path | None, rename: Callable[[str], str] = str) -> None:
    """Puts the weights of `file` into `model` where name (after `rename`) and shape fit; the others stay as they are."""
    own = model.state_dict()
    found = {rename(key): value.float() for key, value in load_file(file).items()} if file else {}
    fits = {key: value for key, value in found.items() if key in own and own[key].shape == value.shape}
    model.load_state_dict(fits, strict=False)
    if file:
        say(f"{file.name}: {len(fits)} of {len(own)} weights taken over")


def fit(
    name: str,
    model: nn.Module,
    loss_at: Callable[[int], dict[str, Tensor]],
    folder: Path,
    *,
    steps: int,
    rate: float,
    warmup: int = 100,
    decay: float = 0.01,
    average: float = 0.998,
    every: int = 500,
    around: Callable = nullcontext,
) -> dict:
    """Trains `model` in place and leaves the moving average of its weights in it; what was run, with losses and seconds.

    loss_at: step number -> named terms, whose sum is the loss (computed under `mixed`). rate: AdamW's, rising over
    `warmup` steps and falling to 0 along a cosine. average: of the weights, per step. around: a context for forward and backward pass.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, record = folder / f"{name}.pt", {"name": name, "steps": steps, "rate": rate, "seconds": 0.0, "losses": {}}
    mean = {key: value.detach().clone() for key, value in model.state_dict().items()}
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}], rate, betas=(0.9, 0.98))  # fmt: skip
    start = 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        mean, start, record = state["mean"], state["step"], json.loads(state["record"]) | {"steps": steps}
        optimizer.load_state_dict(state["optimizer"])
        say(f"{name}: going on from step {start}")
    began, sums = time.monotonic(), {}
    model.train()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad(set_to_none=True)
        with around():
            with mixed():
                terms = loss_at(step)
            sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            share = min(average, (1 + step) / (10 + step))
            for key, value in model.state_dict().items():
                if value.is_floating_point():
                    mean[key].lerp_(value, 1 - share)
        for key, value in terms.items():
            sums.setdefault(key, []).append(float(value.detach()))
        if (step + 1) % 100 == 0:
            record["seconds"] += time.monotonic() - began
            began = time.monotonic()
            record["losses"][step + 1] = {key: round(sum(v) / len(v), 5) for key, v in sums.items()}
            words = " ".join(f"{key} {value:.4f}" for key, value in record["losses"][step + 1].items())
            say(f"{name} {step + 1}/{steps} {words} ({record['seconds']:.0f} s)")
            sums = {}
        if (step + 1) % every == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "mean": mean, "step": step + 1, "optimizer": optimizer.state_dict()}
            torch.save(state | {"record": json.dumps(record)}, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
    model.load_state_dict(mean)
    return record


def draw(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def keep(path: Path, weights: dict[str, Tensor], record: dict, metadata: dict[str, str] | None = None) -> None:
    """Writes fp16 weights, and beside them what was run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {key: value.half().contiguous() for key, value in weights.items()}, metadata)
    (path.parent / f"{path.stem}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def say(text: str) -> None:
    print(text, flush=True)
