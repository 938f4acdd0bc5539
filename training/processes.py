"""The processes of a run: one alone, or those that Hugging Face's accelerate launches, on one machine or on several.

Data parallel, each process holds all that is trained and the gradients are averaged. Where accelerate is configured for
FSDP, each holds its share of weights, gradients and moments, by torch's `fully_shard`: all is gathered before a pass
and reduced behind it, never in between, so that passes of other conditions or lengths do not wait for one another.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .recipe import RecipeError

if TYPE_CHECKING:  # it needs the host
    from .step import TrainingStep

T = TypeVar("T")
Moments = dict[int, dict[str, Any]]  # an optimizer's state by the position of a parameter in its groups


class Processes:
    """What the training loop asks of the other processes; `accelerator` is None for a process alone."""

    def __init__(self, accelerator: Any = None):
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index if accelerator else 0
        self.count: int = accelerator.num_processes if accelerator else 1
        self.main = self.rank == 0
        kind = accelerator.distributed_type.value if accelerator else "NO"
        if kind in ("DEEPSPEED", "MEGATRON_LM", "TP"):
            raise RecipeError(
                f"accelerate is configured for {kind}, expected several processes with or without FSDP. Shard what is "
                "trained by FSDP instead: accelerate launch --use_fsdp --fsdp_version 2."
            )
        # what accelerate's launcher sets from its config; the Accelerator itself knows of FSDP on devices alone
        self.sharded = self.count > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        self.shards = self.count if self.sharded else 1  # over how many what is trained is spread
        self.stopped = False  # an interrupt came to one of them; all know of it
        self._interrupted = False  # to this one
        self._units: list[Any] = []  # modules that are sharded, the outermost first

    # before the first step ------------------------------------------------------------------------------------------

    def from_main(self, make: Callable[[], T]) -> T:
        """Returns in every process what `make` returns in the main one, or raises its ValueError."""
        if self.count == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        found: list[Any] = [None, None]
        error = None
        if self.main:
            try:
                found[0] = make()
            except ValueError as problem:
                error = problem
                found[1] = str(problem)
        broadcast_object_list(found)
        if error is not None:
            raise error
        if found[1] is not None:
            raise ValueError(found[1])
        return found[0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Around what the main process does alone, and the others when it is finished or has failed."""
        if not self.main:
            self.wait()
        try:
            yield
        finally:
            if self.main:
                self.wait()

    def prepare(self, module: "TrainingStep", optimizer: Optimizer) -> nn.Module:
        """Returns the module to call in training passes; `module`'s weights are then the main process's in all."""
        if self.count == 1:
            return module
        if not self.sharded:
            return self.accelerator.prepare_model(module)
        if not isinstance(optimizer, torch.optim.AdamW):
            raise RecipeError(
                f"training.optimizer is of bitsandbytes ({type(optimizer).__name__}), which cannot be sharded. Choose "
                "adamw, or launch without FSDP."
            )
        for parameter in module.parameters():
            dist.broadcast(parameter.data, 0)
        self._shard(module, optimizer)
        return module

    def load_moments(self, optimizer: Optimizer, moments: Moments) -> None:
        """Gives the optimizer the main process's `moments`; those of other processes are not read."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        layout = self.from_main(lambda: {i: {k: _meta(v) for k, v in state.items()} for i, state in moments.items()})
        state: Moments = {}
        for index, entries in layout.items():
            state[index] = {}
            for name, like in entries.items():
                value = moments[index][name] if self.main else like
                if isinstance(like, Tensor) and self.count > 1:
                    value = self._spread(
                        value if self.main else torch.empty_like(like, device="cpu"), parameters[index]
                    )
                state[index][name] = value
        # rates and decay are the recipe's, which may have changed
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    # steps ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def training_pass(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Around the forward and backward pass; gradients are averaged in the `last` pass of a step."""
        for unit in self._units:
            unit.unshard()
        if self.sharded:
            wrapped.set_requires_gradient_sync(last)
        no_sync = self.count > 1 and not self.sharded and not last
        with self.accelerator.no_sync(wrapped) if no_sync else nullcontext():
            yield

    def mean(self, value: float, device: torch.device) -> float:
        """Averages a number over the processes, and tells them of an interrupt that one of them got."""
        if self.count == 1:
            return value
        found = torch.tensor([value, float(self._interrupted)], device=device)
        mean, interrupted = self.accelerator.reduce(found, "mean").tolist()
        self.stopped = interrupted > 0
        return mean

    def collect(self, items: list[T]) -> list[T]:
        """Returns the items of all processes in each of them."""
        if self.count == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """Inside, an interrupt of sharded processes waits for the end of a step, since saving needs all of them.

        A second one ends its process at once.
        """
        if not self.sharded or threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if os.name == "posix" else []))

        def note(number, frame):
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        before = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def apart(self) -> bool:
        """Whether processes that need each other for saving may be at different points, since one has failed."""
        return self.sharded and not self.stopped

    def wait(self) -> None:
        """Waits for all."""
        if self.count > 1:
            self.accelerator.wait_for_everyone()

    # what needs all weights -----------------------------------------------------------------------------------------

    @contextmanager
    def whole(self, module: nn.Module, device: torch.device | None = None) -> Iterator[None]:
        """Inside, all weights are plain tensors, of sharded ones copies on `device`.

        Without a device they are whole on the CPU, in the main process alone. All processes must come here; inside,
        each may do without the others.
        """
        sharded = []
        for part in module.modules() if self.sharded else ():
            for name, parameter in list(part._parameters.items()):
                if parameter is None:
                    continue
                value = full(parameter.detach())
                if self.main or device is not None:
                    sharded.append((part, name, parameter))
                    part._parameters[name] = nn.Parameter(value.to(device or "cpu"), requires_grad=False)
                del value
        try:
            yield
        finally:
            for part, name, parameter in sharded:
                part._parameters[name] = parameter

    def moments(self, optimizer: Optimizer) -> Moments:
        """Returns the optimizer's state, whole, in the main process; of sharded ones all must come here."""
        if not self.sharded:
            return optimizer.state_dict()["state"]
        found: Moments = {}
        for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            for name, value in optimizer.state.get(parameter, {}).items():
                value = full(value)
                if self.main:
                    found.setdefault(index, {})[name] = value.cpu() if isinstance(value, Tensor) else value
        return found

    # sharding -------------------------------------------------------------------------------------------------------

    def _shard(self, module: "TrainingStep", optimizer: Optimizer) -> None:
        """Leaves each process its share of the module's weights, and the optimizer these."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        before = list(module.parameters())
        mesh = getattr(self.accelerator, "torch_device_mesh", None)  # replicas of shards, where accelerate is set so
        if mesh is None:
            mesh = init_device_mesh(before[0].device.type, (self.count,))
        else:
            mesh = mesh[tuple(self.accelerator.parallelism_config.fsdp_dim_names)]
            self.shards = mesh.size(mesh.ndim - 1)
        pairs = list(module.lora.pairs.values()) if module.lora is not None else []
        # as the LoRA would cast them at each use; they are averaged in fp32
        policy = MixedPrecisionPolicy(param_dtype=module.backbone.compute_dtype, reduce_dtype=torch.float32)
        for pair in pairs:
            fully_shard(pair, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
        self._units = [module, *pairs]
        shard = dict(zip(before, module.parameters(), strict=True))
        for group in optimizer.param_groups:
            group["params"] = [shard[parameter] for parameter in group["params"]]

    def _spread(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """The main process's tensor in all of them; where it has a sharded parameter's shape, sharded as that is."""
        value = value.to(parameter.device) if self.main else torch.empty_like(value, device=parameter.device)
        if self.sharded and value.shape == parameter.shape:
            from torch.distributed.tensor import distribute_tensor

            return distribute_tensor(value, parameter.device_mesh, parameter.placements)
        dist.broadcast(value, 0)
        return value


def full(value: Any) -> Any:
    """Returns a sharded tensor as a plain one, for which all processes must come here; other values as they are."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _meta(value: Any) -> Any:
    """Shape and type of a tensor, as a tensor without values; other values as they are."""
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value
