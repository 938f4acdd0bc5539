"""The examples that an index gives: a sample's own references, or pairs of pictures of one subject."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby

import numpy
from numpy.typing import NDArray

from ...common.list_files import DataReader, Example, size_or_problem
from ...common.picture_files import whole_pictures
from .index import BAD, HEADER, WHOLE, Index

MANY = 2_000  # pictures of a subject; with more, references are not chosen among all of them, see `_others`


class Examples(Sequence[Example]):
    """The examples of one side of a run: rows of an index.

    Args:
        index: Of their source.
        sample: (n,) sample of each.
        references: (k,) pictures, those of one example after those of the one before.
        ends: (n,) where each example's end.
    """

    def __init__(self, index: Index, sample: NDArray, references: NDArray, ends: NDArray):
        self.index, self.sample, self.references, self.ends = index, sample, references, ends

    def __len__(self) -> int:
        return len(self.sample)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Examples):
            return NotImplemented
        return len(self) == len(other) and all(ours == theirs for ours, theirs in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, row):
        if isinstance(row, slice):
            return [self[number] for number in range(len(self))[row]]
        row, index = range(len(self))[row], self.index
        sample, pictures = self.sample[row], self.pictures(row)
        target, *references = map(index.picture, pictures)
        size, *sizes = ((int(index.width[picture]), int(index.height[picture])) for picture in pictures)
        prompt, source = index.prompts[sample], index.number[sample]
        source = f"{index.name} entry {source}" if source else ""
        return Example(self.subject(row), prompt, tuple(references), target, size, tuple(sizes), source)

    def subject(self, row: int) -> str:
        """The name of an example's subject."""
        return self.index.subjects[self.index.subject[self.sample[row]]]

    def pictures(self, row: int) -> list[int]:
        """The numbers of an example's pictures, the target first."""
        references = self.references[self.ends[row - 1] if row else 0 : self.ends[row]]
        return [int(self.index.target[self.sample[row]]), *references.tolist()]

    def where(self, chosen: NDArray) -> Examples:
        """Those of a (n,) boolean choice."""
        counts = numpy.diff(self.ends, prepend=0)
        references = self.references[numpy.repeat(chosen, counts)]
        return Examples(self.index, self.sample[chosen], references, numpy.cumsum(counts[chosen]))

    def damage(self, row: int) -> str:
        """Decodes pictures of an example of which the header alone was read; why one cannot be used, or nothing."""
        for picture in self.pictures(row):
            if self.index.state[picture] == HEADER:
                with whole_pictures():
                    found = size_or_problem(self.index.picture(picture))
                if isinstance(found, str):
                    self.index.fail(picture, found)
                else:
                    self.index.state[picture] = WHOLE
            if self.index.state[picture] == BAD:
                return self.index.texts[self.index.problem[picture]]
        return ""

    @cached_property
    def most_references(self) -> int:
        """The references of the example with the most."""
        return int(numpy.diff(self.ends, prepend=0).max(initial=0))


def find_examples(index: Index, reader: DataReader, seed: int, pairs: int) -> Examples:
    """The examples of an index, and the problems of the others.

    Args:
        index: The index.
        reader: Gets the problems.
        seed: Of the choice of references.
        pairs: Examples for each target without references of its own.
    """
    reader.problems += index.problems
    counts = numpy.diff(index.reference_ends, prepend=0)
    usable = index.is_usable(slice(None))
    all_usable = usable[index.target] & (counts > 0)
    all_usable[numpy.repeat(numpy.arange(len(counts)), counts)[~usable[index.references]]] = False
    for sample in numpy.flatnonzero((counts > 0) & ~all_usable):
        end = index.reference_ends[sample]
        for picture in (index.target[sample], *index.references[end - counts[sample] : end]):
            if not usable[picture]:
                _problem(reader, index, picture, int(index.number[sample]))
    own = Examples(index, numpy.arange(len(counts)), index.references, index.reference_ends).where(all_usable)
    sample, reference = array("i", own.sample.astype("i").tobytes()), array("i")
    for target, other in _pairs(index, reader, usable, seed, pairs):
        sample.append(target)
        reference.append(index.target[other])
    ends = numpy.concatenate([own.ends, len(own.references) + 1 + numpy.arange(len(reference))])
    references = numpy.concatenate([own.references, numpy.frombuffer(reference, "i")])
    return Examples(index, numpy.frombuffer(sample, "i"), references.astype("i"), ends.astype("q"))


def _pairs(index: Index, reader: DataReader, usable: NDArray, seed: int, pairs: int) -> Iterator[tuple[int, int]]:
    """(sample, sample with its reference) of those without references of their own, subject by subject."""
    rows = numpy.flatnonzero(numpy.diff(index.reference_ends, prepend=0) == 0)
    rows = rows[numpy.argsort(index.subject[rows], kind="stable")]
    captioned = numpy.diff(index.prompts.ends, prepend=0) > 0

    def group(row: int) -> tuple[int, str]:  # a folder may have the name of the folder that it is in
        folder = "" if len(index.shards) else index.paths[index.target[row]].rpartition("/")[0]
        return index.subject[row], folder

    for (subject, _), all_rows in groupby(rows.tolist(), group):
        found, subject = [], index.subjects[subject]
        for row in all_rows:
            if usable[index.target[row]]:
                found.append(row)
            else:
                _problem(reader, index, index.target[row])
        if len(found) < 2:
            reader.problem(subject, f"{len(found)} picture(s), expected at least two of a subject")
            continue
        targets = [row for row in found if captioned[row]]
        if not targets:
            reader.problem(subject, "no picture has a caption, expected a .txt beside each target")
        names = {row: index.paths[index.target[row]].rpartition("/")[2] for row in found}
        for target, others in zip(targets, _others(names, targets, seed, subject, pairs)):
            yield from ((target, other) for other in others)


def _others(names: dict[int, str], targets: list[int], seed: int, subject: str, pairs: int) -> Iterator[list[int]]:
    """For each target the pictures of its subject that are its references: by hashes, so that new ones move few.

    Of more than MANY, the next ones in one order of all: hashes of all pairs would take days.
    """

    def order(base: str, rows: Sequence[int]) -> list[int]:
        start = hashlib.sha256(base.encode("utf-8", "surrogatepass"))

        def number(row: int) -> tuple[str, str]:
            found = start.copy()
            found.update(names[row].encode("utf-8", "surrogatepass"))
            return found.hexdigest()[:13], names[row]

        return sorted(rows, key=number)

    if len(names) <= MANY:
        for target in targets:
            base = f"{seed}\0{subject}\0{names[target]}\0"
            yield order(base, [row for row in names if row != target])[:pairs]
        return
    ring = order(f"{seed}\0{subject}\0", list(names))
    place = {row: number for number, row in enumerate(ring)}
    for target in targets:
        yield [ring[(place[target] + step) % len(ring)] for step in range(1, min(pairs, len(ring) - 1) + 1)]


def _problem(reader: DataReader, index: Index, picture: int, number: int = 0) -> None:
    """Why a picture cannot be used, said of an entry, or of the picture where it belongs to none."""
    text, path = index.texts[index.problem[picture]], index.paths[picture]
    if not len(index.shards) and index.size[picture] < 0:  # it is not there
        text += f" (in {os.path.dirname(os.path.join(index.root, path))})"
    if number:
        return reader.problem(f"{index.name} entry {number}", text)
    folder, _, name = path.rpartition("/")
    where = index.picture(picture).name if len(index.shards) else f"{folder or index.root.resolve().name}/{name}"
    return reader.problem(where, text)
