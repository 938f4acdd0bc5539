"""Image sizes that stack, and the order in which a run reads its examples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from math import log, sqrt

import numpy
import torch
from numpy.typing import NDArray

from ..flow import generator

RATIOS = (0.5, 4 / 7, 2 / 3, 3 / 4, 5 / 6, 1.0)  # and their inverses; our choice
ORDER = 100  # stream of random numbers, see flow.generator


def bucket(width: int, height: int, side: int, grid: int = 16) -> tuple[int, int]:
    """Returns the bucket's (width, height) in px: about side * side, multiples of `grid`, the nearest of RATIOS."""
    ratios = [*RATIOS, *(1 / ratio for ratio in RATIOS[:-1])]
    ratio = min(ratios, key=lambda ratio: abs(log(width / height / ratio)))
    return tuple(max(grid, round(side * scale / grid) * grid) for scale in (sqrt(ratio), 1 / sqrt(ratio)))


class Sizes(Sequence[tuple[tuple[int, int], ...]]):
    """(width, height) in px of the target and references of each example, snapped so that they stack.

    Args:
        targets: (n, 2) px.
        references: (k, 2) px, those of one example after those of the one before.
        ends: (n,) where each example's end.
    """

    def __init__(self, targets: NDArray, references: NDArray, ends: NDArray):
        self.targets, self.references, self.ends = targets, references, ends

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row):
        references = self.references[self.ends[row - 1] if row else 0 : self.ends[row]]
        return tuple(map(tuple, (self.targets[row].tolist(), *references.tolist())))

    def keys(self) -> NDArray:
        """(n,) equal for examples of equal sizes."""
        first = numpy.concatenate([[0], self.ends[:-1]]).astype(numpy.int64)
        counts = self.ends - first
        keys, of_references = _pack(self.targets), _pack(self.references)
        for number in range(int(counts.max(initial=0))):
            column = numpy.full(len(self), -1, numpy.int64)
            there = counts > number
            column[there] = of_references[first[there] + number]
            keys = numpy.unique(keys, return_inverse=True)[1] * 2**32 + numpy.unique(column, return_inverse=True)[1]
        return keys

    def largest(self) -> tuple[tuple[int, int], ...]:
        """The sizes of the first example with the most pixels."""
        pixels = self.targets.astype(numpy.int64).prod(1)
        total = numpy.concatenate([[0], numpy.cumsum(self.references.astype(numpy.int64).prod(1))])[self.ends]
        return self[int((pixels + numpy.diff(total, prepend=0)).argmax())]


def snapped(sizes: NDArray, snap: Callable[[int, int], tuple[int, int]]) -> NDArray:
    """(n, 2) px: what `snap` makes of (n, 2) px, called once for each size."""
    found, of = numpy.unique(_pack(sizes), return_inverse=True)
    table = [snap(int(size >> 32), int(size & 0xFFFFFFFF)) for size in found]
    return numpy.array(table, numpy.int32).reshape(-1, 2)[of]


def _pack(sizes: NDArray) -> NDArray:
    return sizes[:, 0].astype(numpy.int64) << 32 | sizes[:, 1]


class Order:
    """Micro-batches of a run: a function of keys, batch size, seed and position, so that resuming needs no state.

    All examples of one micro-batch have the same key. Every epoch is a new permutation with each example once.
    """

    def __init__(self, keys: Sequence[Hashable] | NDArray, batch_size: int, seed: int):
        numbers: dict[Hashable, int] = {}
        labels = keys if isinstance(keys, numpy.ndarray) else [numbers.setdefault(key, len(numbers)) for key in keys]
        _, first, of, counts = numpy.unique(labels, return_index=True, return_inverse=True, return_counts=True)
        rows = numpy.split(numpy.argsort(of, kind="stable").astype(numpy.int32), numpy.cumsum(counts)[:-1])
        self.groups = [rows[group] for group in numpy.argsort(first)]  # as they come first
        self.batch_size, self.seed = batch_size, seed
        self._length = sum(-(-len(group) // batch_size) for group in self.groups)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __len__(self) -> int:
        """Number of micro-batches of an epoch."""
        return self._length

    def at(self, position: int) -> list[int]:
        """Returns the example indices of micro-batch number `position`, counted from 0 over all epochs."""
        epoch, offset = divmod(position, len(self))
        mixed, start, end, order = self._epoch(epoch)
        batch = order[offset]
        return mixed[start[batch] : end[batch]].tolist()

    def next(self, row: int) -> int:
        """The example behind one among those of its key, of the last one the first."""
        group = next(group for group in self.groups if row in group)
        return int(group[(numpy.searchsorted(group, row) + 1) % len(group)])

    def _make_epoch(self, epoch: int) -> tuple[NDArray, NDArray, NDArray, NDArray]:
        """All examples, where each batch starts and ends among them, and the order of the batches."""
        draw, mixed, starts, ends, done = generator(self.seed, ORDER, epoch), [], [], [], 0
        for group in self.groups:
            mixed.append(group[torch.randperm(len(group), generator=draw).numpy()])
            starts.append(numpy.arange(done, done + len(group), self.batch_size))
            done += len(group)
            ends.append(numpy.minimum(starts[-1] + self.batch_size, done))
        order = torch.randperm(len(self), generator=draw).numpy()
        return numpy.concatenate(mixed), numpy.concatenate(starts), numpy.concatenate(ends), order
