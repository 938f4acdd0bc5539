"""Steps of two processes, data parallel and sharded, against the same step of one process with the whole batch.

    python -m torch.distributed.run --nproc_per_node 2 common/bootstrap.py tests.small.two_processes FOLDER

The main process prints one line of JSON.
"""

import json
import os
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

# in torch's profile: the operation, and which of its arguments has the numbers of all processes
SENT = {"all_reduce": ("gloo:all_reduce", 0), "gather": ("c10d::_allgather_base_", 0)}
SENT |= {"reduce_scatter": ("c10d::_reduce_scatter_base_", 1)}


def numbers(log, operation: str, argument: int) -> list[int]:
    """How many numbers each call of a collective operation moved, by torch's profile."""
    return [prod(event.input_shapes[argument]) for event in log.events() if event.name == operation]


def main(folder: Path) -> None:
    from ...common.bootstrap import start_host

    start_host(os.environ["COMFYUI_PATH"])
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    from ...training.build import build
    from ...training.models import load_models
    from ...training.processes import Processes, full
    from ...training.recipe import Recipe
    from .training import small_family, small_recipe

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)])
    found = {}
    models = small_family(folder / "models")
    settings = {"training": {"stage": 2, "mllm_only": 0.0, "vae_only": 0.0}, "lora": {"rank": 3}}
    recipe = Recipe.from_dict(small_recipe(models, folder / "subjects", **settings))
    loaded = load_models(recipe)
    for kind in ("ddp", "sharded"):
        os.environ["ACCELERATE_USE_FSDP"] = str(kind == "sharded").lower()
        processes = Processes(accelerator)
        assert processes.count == 2 and processes.sharded == (kind == "sharded")
        parts = build(recipe, loaded, folder / f"cache{processes.rank}")
        module, optimizer, batches = parts.module, parts.optimizer, parts.batches
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():  # a new LoRA's B is zero
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
        plans = [batches.plan(position) for position in range(2)]
        module.lora.attach()
        module.backbone.load()
        if processes.main:  # one process, both batches at once
            both = replace(
                plans[0],
                indices=plans[0].indices + plans[1].indices,
                prompts=plans[0].prompts + plans[1].prompts,
                t=torch.cat([plan.t for plan in plans]),
            )
            batch = batches.load(both)
            batch = replace(batch, noise=torch.cat([batches.load(plan).noise for plan in plans]))
            with module.backbone.gradients():
                loss = module(batch).mean()
                loss.backward()
            expected = {name: parameter.grad for name, parameter in module.named_parameters()}
            module.zero_grad()
        wrapped = processes.prepare(module, optimizer)
        batch = batches.load(plans[processes.rank])
        with torch.profiler.profile(record_shapes=True) as log:
            with processes.training_pass(wrapped, True), module.backbone.gradients():
                own = wrapped(batch).mean()
                (own + module.untouched()).backward()
        mean = processes.mean(float(own.detach()), torch.device("cpu"))
        gradients = {name: full(parameter.grad) for name, parameter in module.named_parameters()}
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
        held = [[getattr(t, "_local_tensor", t).nbytes for t in ts] for ts in (list(module.parameters()), states)]
        held = accelerator.gather(torch.tensor([[sum(row) for row in held]])).tolist()
        if processes.main:
            different = max(float((gradients[k] - g).norm() / g.norm()) for k, g in expected.items())
            sizes = {name: sum(p.numel() for p in getattr(module, name).parameters()) for name in ("dla", "lora")}
            found[kind] = {"losses": [mean, float(loss)], "gradients": different, "held": held, **sizes}
            found[kind] |= {name: 4 * sum(numbers(log, *where)) for name, where in SENT.items()}  # fp32
            found[kind]["digest"] = float(sum(g.double().abs().sum() for g in gradients.values()))
        module.lora.detach()
    if processes.main:
        print(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
