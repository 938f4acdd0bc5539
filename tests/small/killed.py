"""A run's checkpoint with one value in it, and a program that is killed while it saves such checkpoints.

    python common/bootstrap.py tests.small.killed FOLDER

prints the last step that was saved and how often a kill left parts of a file.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch.nn import Linear, ModuleDict, ModuleList

from ...dla import DLAConfig, DualLayerAggregator, MLLMInfo
from ...loaders.backbones import BACKBONES
from ...training.checkpoints import checkpoints, read_state, restore, save
from ...training.dit.lora import LoRA
from ...training.processes import Processes

STATE = {"validation": {}, "identity": "a run", "recipe": {}, "mllm": "small", "family": "flux"}
STATE |= {"data": {"fingerprint": "0"}}


class Trained:
    """What a checkpoint holds; every weight is `value`, and the moments have seen gradients of it."""

    def __init__(self, value=0.0, width=32, rank=2):
        config = DLAConfig(MLLMInfo("small", "qwen2_5_vl", 3, width), width, "flux", heads=2)
        attention = ModuleDict({"img_attn": ModuleDict({"qkv": Linear(16, 48)})})
        dit = ModuleDict({"double_blocks": ModuleList([attention])})
        self.dla, self.lora = DualLayerAggregator(config), LoRA(dit, BACKBONES["flux"], rank)
        self.parameters = [*self.dla.parameters(), *self.lora.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3)
        self.fill(value)

    def fill(self, value):
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, value)
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.data.fill_(value)
            self.optimizer.state[parameter]["exp_avg"].fill_(value)

    def save(self, folder, step, keep=2):
        moments = Processes().moments(self.optimizer)
        return save(folder, step, self.dla, self.lora, moments, STATE | {"losses": [0.1] * step}, keep)

    def restore(self, checkpoint):
        Processes().load_moments(self.optimizer, restore(checkpoint, self.dla, self.lora, self.optimizer))
        return read_state(checkpoint)["step"]

    def values(self):
        moments = [self.optimizer.state[p]["exp_avg"] for p in self.parameters]
        return {float(value) for tensor in (*self.parameters, *moments) for value in tensor.detach().unique()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    draw = random.Random(0)
    last = parts = took = 0
    for _ in range(25):
        child = os.fork()
        if child == 0:
            trained, step = Trained(width=256), last
            while True:
                step += 1
                trained.fill(float(step))
                trained.save(folder, step)
        before = set(folder.iterdir())
        while set(folder.iterdir()) == before:  # until it saves, however busy the machine
            time.sleep(0.002)
        began = time.monotonic()
        while not checkpoints(folder):
            time.sleep(0.002)
        took = took or time.monotonic() - began  # of the first one
        time.sleep(draw.uniform(0, 2) * took)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        parts += any(path.name.startswith(".") for path in folder.iterdir())
        for checkpoint in checkpoints(folder):
            trained = Trained(width=256)
            step = trained.restore(checkpoint)
            assert trained.values() == {float(step)} and checkpoint.name.endswith(str(step)), (step, trained.values())
        assert step >= last, (step, last)
        last = step
    print(last, parts)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
