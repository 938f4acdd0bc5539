"""Image sizes that stack, and the order in which a run reads its examples."""

from collections.abc import Hashable, Sequence
from functools import lru_cache
from math import log, sqrt

import torch

from ..flow import generator

RATIOS = (0.5, 4 / 7, 2 / 3, 3 / 4, 5 / 6, 1.0)  # and their inverses; our choice
ORDER = 100  # stream of random numbers, see flow.generator


def bucket(width: int, height: int, side: int, grid: int = 16) -> tuple[int, int]:
    """Returns the bucket's (width, height) in px: about side * side, multiples of `grid`, the nearest of RATIOS."""
    ratios = [*RATIOS, *(1 / ratio for ratio in RATIOS[:-1])]
    ratio = min(ratios, key=lambda ratio: abs(log(width / height / ratio)))
    return tuple(max(grid, round(side * scale / grid) * grid) for scale in (sqrt(ratio), 1 / sqrt(ratio)))


class Order:
    """Micro-batches of a run: a function of keys, batch size, seed and position, so that resuming needs no state.

    All examples of one micro-batch have the same key. Every epoch is a new permutation with each example once.
    """

    def __init__(self, keys: Sequence[Hashable], batch_size: int, seed: int):
        self.groups: dict[Hashable, list[int]] = {}
        for index, key in enumerate(keys):
            self.groups.setdefault(key, []).append(index)
        self.batch_size, self.seed = batch_size, seed
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __len__(self) -> int:
        """Number of micro-batches of an epoch."""
        return sum(-(-len(group) // self.batch_size) for group in self.groups.values())

    def at(self, position: int) -> list[int]:
        """Returns the example indices of micro-batch number `position`, counted from 0 over all epochs."""
        epoch, offset = divmod(position, len(self))
        return self._epoch(epoch)[offset]

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        draw = generator(self.seed, ORDER, epoch)
        batches = []
        for group in self.groups.values():
            mixed = [group[i] for i in torch.randperm(len(group), generator=draw).tolist()]
            batches += [mixed[i : i + self.batch_size] for i in range(0, len(mixed), self.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]
