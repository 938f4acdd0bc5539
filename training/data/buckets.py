"""Picture sizes that stack, and the order in which a run meets its examples."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from math import log, sqrt

import torch

from ..flow import generator

RATIOS = (0.5, 4 / 7, 2 / 3, 3 / 4, 5 / 6, 1.0)  # and their inverses; our choice
ORDER = 100  # stream of random numbers, see flow.generator


def bucket(width: int, height: int, side: int, grid: int = 16) -> tuple[int, int]:
    """(width, height) in px of about side * side, in multiples of `grid`, of the ratio in RATIOS that is nearest."""
    ratios = [*RATIOS, *(1 / ratio for ratio in RATIOS[:-1])]
    ratio = min(ratios, key=lambda ratio: abs(log(width / height / ratio)))
    return tuple(max(grid, round(side * scale / grid) * grid) for scale in (sqrt(ratio), 1 / sqrt(ratio)))


class Order:
    """Micro-batches of a run: a function of keys, batch size, seed and position, so that resuming needs no state.

    All indices of one have the same key. Every epoch is a new permutation in which each example comes once.
    """

    def __init__(self, keys: Sequence[Hashable], batch_size: int, seed: int):
        self.groups: dict[Hashable, list[int]] = {}
        for index, key in enumerate(keys):
            self.groups.setdefault(key, []).append(index)
        self.batch_size, self.seed = batch_size, seed
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return sum(-(-len(group) // self.batch_size) for group in self.groups.values())

    def at(self, position: int) -> list[int]:
        """Indices of the micro-batch number `position`, counted from 0 over all epochs."""
        epoch, place = divmod(position, len(self))
        return self._epoch(epoch)[place]

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        draw = generator(self.seed, ORDER, epoch)
        batches = []
        for group in self.groups.values():
            mixed = [group[i] for i in torch.randperm(len(group), generator=draw).tolist()]
            batches += [mixed[i : i + self.batch_size] for i in range(0, len(mixed), self.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]
