"""Which examples are held out, and a fingerprint of them all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

import numpy
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from ...common.list_files import digest
from .examples import Examples


def held_out(examples: Examples, share: float, seed: int) -> NDArray:
    """For each example whether it is held out.

    Each subject is, with probability `share`, by a hash of its name, so that a new subject does not move the others;
    but one at least is, and one is not (of the lowest and highest hash). Subjects that share a picture go together, the
    largest such group is trained on; where there is but one group, subjects are split, and with one subject, targets.
    """
    groupings = (grouping for grouping in _groupings(examples) if len(grouping[0]) > 1) if share > 0 else iter(())
    names, of = next(groupings, ((), None))
    if of is None:
        return numpy.zeros(len(examples), bool)
    numbers = numpy.array([int(digest(seed, name)[:13], 16) / 16**13 for name in names])
    pairs = numpy.unique(numpy.stack([of, examples.index.subject[examples.sample]]), axis=1)
    sizes = numpy.bincount(pairs[0], minlength=len(names))  # in subjects

    def place(group: int) -> tuple[float, str]:
        return numbers[group], names[group]

    out = numbers < share
    largest = max(numpy.flatnonzero(sizes == sizes.max()), key=place)
    out[largest] = False
    out[min((group for group in range(len(names)) if group != largest), key=place)] = True
    return out[of]


def _groupings(examples: Examples) -> Iterator[tuple[list[str], NDArray]]:
    """Names of groups and each example's group: by shared pictures, by subject, by target.

    A group of several subjects has the first one's name.
    """
    index, counts = examples.index, numpy.diff(examples.ends, prepend=0)
    subject, target = index.subject[examples.sample], index.target[examples.sample]
    pictures = numpy.concatenate([target, examples.references]) + len(index.subjects)
    edges = numpy.concatenate([subject, numpy.repeat(subject, counts)]), pictures
    nodes = len(index.subjects) + len(index.paths)
    linked = connected_components(coo_matrix((numpy.ones(len(pictures), bool), edges), (nodes, nodes)), False)[1]
    groups, of = numpy.unique(linked[subject], return_inverse=True)
    first: dict[int, str] = {}
    for number in numpy.unique(subject):
        name, group = index.subjects[number], int(linked[number])
        first[group] = min(name, first.get(group, name))
    yield [first[int(group)] for group in groups], of
    for texts, numbers in ((index.subjects, subject), (index.paths, target)):
        found, of = numpy.unique(numbers, return_inverse=True)
        yield [texts[number] for number in found], of


def fingerprint(training: Examples, validation: Examples) -> str:
    """SHA-256 of the examples, their order, split, and the bytes and times of their files."""
    found, mark = hashlib.sha256(), b""
    for side, examples in (("training", training), ("validation", validation)):
        index = examples.index
        for row, sample in enumerate(examples.sample):
            subject, prompt = index.subjects.raw(index.subject[sample]), index.prompts.raw(sample)
            lines = [side.encode() + b"\0" + subject + b"\0" + prompt]
            for picture in examples.pictures(row):
                version = f"\0{index.size[picture]}\0{index.mtime[picture]}"
                lines.append(index.paths.raw(picture) + version.encode())
            found.update(mark + b"\n".join(lines))
            mark = b"\n"
    return found.hexdigest()


def outside(examples: Examples, trained: Examples) -> NDArray:
    """For each example whether no file that is a target in `trained` is its target."""
    targets = set(_real_targets(trained))
    return numpy.array([target not in targets for target in _real_targets(examples)], bool)


def _real_targets(examples: Examples) -> Iterator[str]:
    """Where each example's target is, behind symbolic links."""
    index, folders = examples.index, {}
    for sample in examples.sample:
        path = os.path.join(index.root, index.paths[index.target[sample]])
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        yield os.path.realpath(path) if os.path.islink(path) else os.path.join(folders[folder], name)
