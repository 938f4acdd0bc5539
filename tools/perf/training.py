"""Whether training is right, and what it needs: gradients, resuming, a short run, peak memory.

    nox -s bench -- training [--steps 60]

- gradients of a DLA's parameters, through one-layer full-width DiTs of every family that is trained, against
  central differences in fp32, along a random direction in every parameter: |differences - gradients| / |differences|
- a run of the small family stopped at three places and resumed, against the run that was not stopped
- its loss at start and end, in training and held out
- peak memory of a step through a FLUX of twelve blocks and 1,000 tokens, with and without checkpointing

The last line is one JSON object.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import pytest

from ...common.bootstrap import start_host
from ...common.console import say
from ...loaders.backbones import TRAINED
from ._measure import cpu_peak


def main(argv: list[str]) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- training", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="of the short run")
    options = parser.parse_args(argv)

    start_host(os.environ["COMFYUI_PATH"])  # on the CPU: gradients are compared in fp32
    errors = {}
    for family in (backbone.name for backbone in TRAINED):
        errors[family] = gradient_error(family)
        say(f"{family}: gradients differ from finite differences by {errors[family]:.2e}")
    with tempfile.TemporaryDirectory() as folder:
        difference, losses = runs(Path(folder), options.steps)
    say(f"resumed runs differ from the whole one by {difference}")
    say(f"loss {losses}")
    memory = {"plain": peak(False), "checkpointing": peak(True)}
    memory["ratio"] = round(memory["checkpointing"] / memory["plain"], 3)
    say(f"peak memory of a step in MB: {memory}")
    result = {"grad_rel_error": max(errors.values()), "grad_rel_error_by_dit": errors}
    print(json.dumps({**result, "resume_max_diff": difference, "loss": losses, "peak_memory_mb": memory}))


class Stop(Exception):
    """Ends a run in the middle, as an interrupt does."""


def gradient_error(family: str) -> float:
    """Returns the worst error of every pooling, with and without checkpointing, along a random direction each."""
    import torch

    from ...dla import DLAConfig, DualLayerAggregator, Features, MLLMInfo, Modality, aggregate
    from ...tests.small.dit import load_trained
    from ...training.dit.frozen import FrozenDiT

    with pytest.MonkeyPatch.context() as monkeypatch:
        backbone = FrozenDiT(load_trained(family, monkeypatch))
    backbone.load()
    draw = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=draw)

    info = MLLMInfo("random", "qwen2_5_vl", 4, 128)
    modality = torch.tensor([[Modality.TEXT] * 4 + [Modality.IMAGE] * 6]).to(torch.uint8)
    index = torch.where(modality == Modality.IMAGE, 0, -1).to(torch.int16)
    features = Features(random(1, 5, 10, 128), tuple(range(5)), modality, index, torch.ones(1, 10).bool(), info)
    frames = (1,) * (backbone.family.latent_dimensions - 2)
    noisy, target = (random(1, backbone.latent_channels, *frames, 16, 16) for _ in range(2))
    reference = random(1, backbone.latent_channels, *frames, 8, 12)
    method, guidance = backbone.family.default_placement, 1.0 if backbone.family.takes_guidance else None
    worst = 0.0

    def loss(dla):
        context = aggregate(features, dla)
        out = backbone.velocity(noisy, torch.tensor([0.6]), context, [reference], method=method, guidance=guidance)
        return (out - target).square().mean()

    def difference(dla, parameter, direction, size=1e-2):
        with torch.no_grad():
            start, sides = parameter.clone(), []
            for sign in (1, -1):
                parameter.copy_(start + sign * size * direction)
                sides.append(loss(dla).double())
            parameter.copy_(start)
        return (sides[0] - sides[1]) / (2 * size)

    for pooling, scores in (("softmax", "states"), ("linear", "states"), ("softmax", "heads")):
        sizes = dict(pooling=pooling, scores=scores, heads=2, refiner_blocks=int(pooling == "linear"))
        dla = DualLayerAggregator(DLAConfig(info, backbone.context_width, **sizes))
        parameters = list(dla.parameters())
        for parameter in parameters:  # a new DLA has gradients of zero: its branches start at zero
            parameter.data = random(*parameter.shape) * parameter.shape[-1] ** -0.5
        directions = [random(*p.shape) * p.detach().square().mean().sqrt() for p in parameters]
        found = torch.stack([difference(dla, *pair) for pair in zip(parameters, directions)])
        for backbone.checkpointing in (True, False):
            dla.zero_grad()
            with backbone.gradients():
                loss(dla).backward()
            ours = torch.stack([(p.grad * d).sum() for p, d in zip(parameters, directions)]).double()
            worst = max(worst, float((found - ours).norm() / found.norm()))
    return worst


def runs(folder: Path, steps: int) -> tuple[float, dict]:
    """Returns the largest difference between a whole run and one in four parts, and the whole one's losses."""
    import torch

    from ...dla import load_dla
    from ...tests.small.training import paint_subjects, small_family, small_recipe
    from ...training.models import load_models
    from ...training.paths import RunPaths
    from ...training.recipe import Recipe
    from ...training.run import train

    models, data = small_family(folder / "models"), paint_subjects(folder / "subjects")
    settings = {
        "training": {"stage": 2, "steps": steps, "batch_size": 4},
        "lora": {"rank": 8, "learning_rate": 2e-3},
        "run": {"validate_every": steps, "validation_examples": 8},
    }
    ends = {}

    def go(name, stops=()):
        recipe = Recipe.from_dict(small_recipe(models, data, **{**settings, "run": {**settings["run"], "name": name}}))
        files = (folder / name / f"{kind}.safetensors" for kind in ("dla", "lora"))
        paths = RunPaths(folder / "runs" / name, folder / "runs" / name / "cache", *files)

        def stop(progress):
            if progress.seconds is not None and progress.step in stops:
                raise Stop

        for _ in range(len(stops) + 1):
            try:
                result = train(recipe, load_models(recipe), paths, stop)
            except Stop:
                stops = [stop for stop in stops if stop != min(stops)]
        state = dict(load_dla(result.dla).state_dict())
        from safetensors.torch import load_file

        state |= load_file(result.lora)
        ends[name] = (state, result)

    go("whole")
    go("parts", [steps // 5, steps // 2, steps - 1])
    (whole, result), (parts, resumed) = ends["whole"], ends["parts"]
    result, resumed = result.history, resumed.history
    difference = max(float((whole[key].double() - parts[key].double()).abs().max()) for key in whole)
    difference = max([difference, *(abs(a - b) for a, b in zip(result.losses, resumed.losses, strict=True))])
    tenth = max(1, steps // 10)
    losses = {"start": sum(result.losses[:tenth]) / tenth, "end": sum(result.losses[-tenth:]) / tenth}
    losses |= {"held_out_start": result.held_out[0], "held_out_end": result.held_out[steps], "steps": steps}
    assert torch.isfinite(torch.tensor(list(losses.values()))).all()
    return difference, losses


def peak(checkpointing: bool) -> float:
    """Returns the peak in MB that a forward and backward pass allocates."""
    import torch

    from ...dla.context import Context
    from ...tests.small.dit import tiny_flux
    from ...training.dit.frozen import FrozenDiT

    sizes = dict(num_heads=4, axes_dim=[16, 56, 56], hidden_size=512, vec_in_dim=64)
    backbone = FrozenDiT(tiny_flux(512, **sizes, depth=4, depth_single_blocks=8), checkpointing)
    backbone.load()
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 64, 512, generator=draw).requires_grad_()
    mask, none = torch.ones(1, 64).bool(), torch.zeros(1, 64, dtype=torch.int16)
    noisy = torch.randn(1, 16, 64, 64, generator=draw)

    def step() -> None:
        context = Context(tokens, mask, none.to(torch.uint8), none)
        backbone.velocity(noisy, torch.tensor([0.5]), context, guidance=1.0).square().mean().backward()

    with backbone.gradients():
        return round(cpu_peak(step) / 1e6, 1)
