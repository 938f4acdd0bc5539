"""A step of several processes, data parallel and sharded, against the same step of one process with the whole batch.

    python -m torch.distributed.run --nproc_per_node 2 common/bootstrap.py tests.small.several_processes FOLDER KIND...

KIND is one of KINDS. The main process prints one line of JSON.
"""

import json
import os
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

KINDS = {
    "ddp": {},
    "sharded": {"shard": True},
    "accumulated": {"shard": True, "passes": 2},
    "bf16": {"shard": True, "dtype": "bfloat16"},  # of the gathered LoRA, as it is for a DiT in bf16
    "replicas": {"shard": True, "replicas": 2},  # shards within a machine, replicas of them between machines
}


def numbers(log, operation: str, argument: int) -> list[int]:
    """How many numbers of all processes each call of a collective operation moved, by torch's profile."""
    return [prod(event.input_shapes[argument]) for event in log.events() if event.name == operation]


def main(folder: Path, kinds: list[str]) -> None:
    from ...common.bootstrap import start_host

    start_host(os.environ["COMFYUI_PATH"])
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    from ...training.models import load_models
    from ...training.recipe import Recipe
    from .training import small_family, small_recipe

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)])
    models = small_family(folder / "models")
    settings = {"training": {"stage": 2, "mllm_only": 0.0, "vae_only": 0.0}, "lora": {"rank": 3}}
    recipe = Recipe.from_dict(small_recipe(models, folder / "subjects", **settings))
    loaded = load_models(recipe)
    found = {kind: step(recipe, loaded, folder, accelerator, **KINDS[kind]) for kind in kinds}
    if accelerator.is_main_process:
        print(json.dumps(found))
    accelerator.wait_for_everyone()  # none takes the connections down while another still works
    accelerator.end_training()


def step(recipe, loaded, folder, accelerator, shard=False, passes=1, dtype="float32", replicas=1) -> dict:
    """What a step gave, held and sent; in the main process."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    from ...training.build import build
    from ...training.dit.frozen import FrozenDiT
    from ...training.processes import Processes, full

    count = accelerator.num_processes
    os.environ["ACCELERATE_USE_FSDP"] = str(shard).lower()
    if replicas > 1:  # as accelerate does by its ParallelismConfig, which it refuses on processors
        names = ("dp_replicate", "dp_shard")
        mesh = init_device_mesh("cpu", (replicas, count // replicas), mesh_dim_names=names)
        facts = {name: getattr(accelerator, name) for name in ("process_index", "num_processes", "distributed_type")}
        config = SimpleNamespace(fsdp_dim_names=names)
        processes = Processes(SimpleNamespace(torch_device_mesh=mesh, parallelism_config=config, **facts))
    else:
        processes = Processes(accelerator)
    assert processes.count == count and processes.sharded is shard
    FrozenDiT.compute_dtype = getattr(torch, dtype)
    parts = build(recipe, loaded, folder / f"cache{processes.rank}")
    module, optimizer, batches = parts.module, parts.optimizer, parts.batches
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a new LoRA's B is zero
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    plans = [batches.plan(position) for position in range(count * passes)]
    module.lora.attach()
    module.backbone.load()
    expected, loss = {}, 0.0
    if processes.main:  # one process, all batches at once
        joined = {name: sum((getattr(plan, name) for plan in plans), ()) for name in ("indices", "prompts")}
        batch = batches.load(replace(plans[0], **joined, t=torch.cat([plan.t for plan in plans])))
        batch = replace(batch, noise=torch.cat([batches.load(plan).noise for plan in plans]))
        with module.backbone.gradients():
            losses = module(batch).mean()
            losses.backward()
        loss = float(losses.detach())
        expected = {name: parameter.grad for name, parameter in module.named_parameters()}
        module.zero_grad()
    wrapped = processes.prepare(module, optimizer)
    own = 0.0
    width = 0
    with torch.profiler.profile(record_shapes=True) as log:
        for number in range(passes):
            batch = batches.load(plans[number * count + processes.rank])
            with processes.training_pass(wrapped, number == passes - 1), module.backbone.gradients():
                losses = wrapped(batch).mean() / passes
                width = next(module.lora.parameters()).dtype.itemsize  # as gathered
                (losses + module.untouched()).backward()
            own += float(losses.detach())
    mean = float(accelerator.reduce(torch.tensor(own), "mean"))
    gradients = {name: full(parameter.grad) for name, parameter in module.named_parameters()}
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    held = [[getattr(t, "_local_tensor", t).nbytes for t in ts] for ts in (list(module.parameters()), states)]
    held = accelerator.gather(torch.tensor([[sum(row) for row in held]])).tolist()
    module.lora.detach()
    if not processes.main:
        return {}
    out = {name: sum(p.numel() for p in getattr(module, name).parameters()) for name in ("dla", "lora")}
    gathers = numbers(log, "c10d::_allgather_base_", 0)
    out["gather"] = sum((4 if count == max(gathers) else width) * count for count in gathers)  # the DLA in fp32
    out["reduce_scatter"] = 4 * sum(numbers(log, "c10d::_reduce_scatter_base_", 1))
    out["all_reduce"] = 4 * sum(numbers(log, "gloo:all_reduce", 0))
    out["gradients"] = max(float((gradients[k] - g).norm() / g.norm()) for k, g in expected.items())
    out["digest"] = float(sum(g.double().abs().sum() for g in gradients.values()))
    return {**out, "losses": [mean, loss], "held": held, "shards": processes.shards}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
