"""What a source of data holds, in columns: a million pictures are some arrays, and kept on disk they are there at once.

Pictures and captions are not in memory: an example is made when it is drawn, its texts from a mapped file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ...common.files import save_tensors
from ...common.list_files import Size
from ...common.picture_files import PictureFile, whole_pictures
from ...common.safetensors_header import SafetensorsError, read_header
from ...common.tar_files import TarMember

log = logging.getLogger(__name__)
FORMAT = "1"  # of the files; others are made anew
UNREAD, HEADER, WHOLE, BAD = range(4)  # what is known of a picture: nothing, its header, that it decodes, a problem
DECODED = 10_000  # pictures that are decoded before the run; of more than that, headers are read
THREADS, BLOCK = 16, 256  # of reading headers, and how many each takes at a time
SAY, SAVE = 5, 120  # seconds between lines about the progress, and between saves while headers are read
PICTURES = ("size", "mtime", "width", "height", "state", "problem")  # columns with a row for each picture
# Further ones, which 0.1.0's files have not: when a file was last changed in any way, which nobody sets (POSIX), and a
# checksum of one that was decoded whole; of others that time again.
CONTENT = ("ctime", "content")
Columns = dict[str, NDArray]
Say = Callable[[str], None]


class Strings(Sequence[str]):
    """Texts in one array of bytes."""

    def __init__(self, data: NDArray, ends: NDArray):
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> Strings:
        """Packs texts; also such as UTF-8 has no form for, as file names may be."""
        data, ends = bytearray(), array("q")
        for text in texts:
            data += text.encode("utf-8", "surrogatepass")
            ends.append(len(data))
        return cls(numpy.frombuffer(data, numpy.uint8), numpy.frombuffer(ends, numpy.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index):
        return str(self.raw(index), "utf-8", "surrogatepass")

    def raw(self, index: int) -> bytes:
        """The bytes of one."""
        return self.data[self.ends[index - 1] if index else 0 : self.ends[index]].tobytes()


class Draft:
    """What a source is read into: samples that name pictures, each picture once."""

    def __init__(self) -> None:
        self.pictures: dict[str, int] = {}
        self.subjects: dict[str, int] = {}
        self.prompts, self.prompt_ends = bytearray(), array("q")
        self.subject, self.target, self.number = array("i"), array("i"), array("i")
        self.references, self.reference_ends = array("i"), array("q")
        self.shards: list[str] = []
        self.shard, self.offset, self.bytes = array("i"), array("q"), array("q")  # of pictures in shards

    def picture(self, name: str) -> int:
        """The number of a picture, by its path from the root."""
        return self.pictures.setdefault(name, len(self.pictures))

    def member(self, shard: str, member: TarMember) -> int:
        """The number of a picture in a shard, which is met once."""
        self.shard.append(len(self.shards) - 1)
        self.offset.append(member.offset)
        self.bytes.append(member.size)
        return self.picture(f"{shard}/{member.member}")

    def sample(self, subject: str, prompt: str, target: int, references: Iterable[int] = (), number: int = 0) -> None:
        """Adds a sample; without references it is paired with others of its subject, without a prompt it is one."""
        self.subject.append(self.subjects.setdefault(subject, len(self.subjects)))
        self.prompts += prompt.encode("utf-8", "surrogatepass")
        self.prompt_ends.append(len(self.prompts))
        self.target.append(target)
        self.number.append(number)
        self.references.extend(references)
        self.reference_ends.append(len(self.references))

    def columns(self, problems: Sequence[str]) -> Columns:
        """Everything in arrays."""
        found: Columns = {"prompts.data": numpy.frombuffer(self.prompts, numpy.uint8)}
        found["prompts.ends"] = numpy.frombuffer(self.prompt_ends, numpy.int64)
        for name in ("subject", "target", "number", "references", "shard"):
            found[name] = numpy.frombuffer(getattr(self, name), numpy.int32)
        for name in ("reference_ends", "offset", "bytes"):
            found[name] = numpy.frombuffer(getattr(self, name), numpy.int64)
        texts = {"paths": self.pictures, "subjects": self.subjects, "shards": self.shards, "problems": problems}
        for name, values in texts.items():
            strings = Strings.of(values)
            found |= {f"{name}.data": strings.data, f"{name}.ends": strings.ends}
        count = len(self.pictures)
        kinds = (numpy.int64, numpy.int64, numpy.int32, numpy.int32, numpy.uint8, numpy.int32)
        return found | {name: numpy.zeros(count, kind) for name, kind in zip(PICTURES, kinds)}  # CONTENT: see Index


class Index:
    """The pictures and samples of one source.

    Args:
        root: Where the paths of its pictures start.
        name: Of the source, for messages.
        key: Changes with whatever the samples were read from.
        columns: See `Draft.columns`.
    """

    def __init__(self, root: Path, name: str, key: str, columns: Columns):
        self.root, self.name, self.key, self.columns = root, name, key, columns
        self.paths, self.subjects, self.prompts, self.shards, self.problems = (
            Strings(columns[f"{part}.data"], columns[f"{part}.ends"])
            for part in ("paths", "subjects", "prompts", "shards", "problems")
        )
        self.size, self.mtime, self.width, self.height, self.state, self.problem = (columns[p] for p in PICTURES)
        for part in CONTENT:
            columns.setdefault(part, numpy.zeros(len(self.size), numpy.int64))
        self.ctime, self.content = (columns[part] for part in CONTENT)
        texts = columns.pop("texts.data", None), columns.pop("texts.ends", None)
        self.texts = [] if texts[0] is None else list(Strings(*texts))  # problems of pictures
        self.subject, self.target, self.number = (columns[part] for part in ("subject", "target", "number"))
        self.references, self.reference_ends = columns["references"], columns["reference_ends"]

    def picture(self, row: int) -> PictureFile:
        """A picture's file."""
        if not len(self.shards):
            return self.root / self.paths[row]
        shard = self.shards[self.columns["shard"][row]]
        member, columns = self.paths[row][len(shard) + 1 :], self.columns
        return TarMember(self.root / shard, member, int(columns["offset"][row]), int(columns["bytes"][row]))

    def is_usable(self, rows: NDArray) -> NDArray:
        """Whether each picture can be used, as far as is known."""
        return (self.state[rows] == HEADER) | (self.state[rows] == WHOLE)

    def fail(self, row: int, problem: str) -> None:
        """Notes why a picture cannot be used."""
        self.state[row], self.problem[row] = BAD, len(self.texts)
        self.texts.append(problem)

    def adopt(self, old: Index) -> None:
        """Takes over what an older index of the source knows of the same pictures."""
        hashes = [numpy.array([hash(index.paths.raw(row)) for row in range(len(index.paths))]) for index in (old, self)]
        _, before, now = numpy.intersect1d(*hashes, return_indices=True)
        if len(self.shards):
            same = old.columns["offset"][before] == self.columns["offset"][now] if len(old.shards) else before < 0
            before, now = before[same], now[same]
        for name in ("size", "mtime", "width", "height", "state", *CONTENT):
            self.columns[name][now] = old.columns[name][before]
        self.state[self.state == BAD] = UNREAD

    def check(
        self, look: Callable[[str | PictureFile, bool], Size | str], by_name: bool, say: Say, save: Callable[[], None]
    ) -> bool:
        """Reads new and changed pictures, whole where all are at most DECODED, else headers; whether there were any.

        Args:
            look: From a picture's file to its size, or to why it cannot be used; see `size_or_problem`.
            by_name: `look` takes the path from the root instead.
            say: Gets a line of progress now and then, else "" about once a second, and may raise to interrupt.
            save: Called now and then, and on an interrupt, to keep what has been read.
        """
        whole = len(self.paths) <= DECODED
        found = self._stat(say)
        known = (self.state == WHOLE) | (self.state == HEADER) & (not whole)
        changed = found[2] != self.ctime  # of many pictures they alone are no reason to read all headers again
        rows = numpy.flatnonzero(~known | (found[0] != self.size) | (found[1] != self.mtime) | changed & whole)
        self.ctime[:] = found[2]
        if not whole:
            self.content[:] = found[2]
        if not len(rows):
            if changed.any():
                save()
            return bool(changed.any())
        self.state[rows], self.texts = UNREAD, []  # those with problems are among the rows
        self.size[:], self.mtime[:] = found[:2]

        def read(block: NDArray) -> list[Size | str]:
            sizes = [look(self.paths[row] if by_name else self.picture(row), whole) for row in block]
            for row, size in zip(block, sizes):
                if whole and not isinstance(size, str):
                    self.content[row] = zlib.crc32(self.picture(row).read_bytes()) + 1
            return sizes

        blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
        started = saved = said = time.monotonic()
        try:
            with whole_pictures():
                for number, (block, sizes) in enumerate(zip(blocks, _in_threads(read, blocks))):
                    for row, size in zip(block, sizes):
                        if isinstance(size, str):
                            self.fail(row, size)
                        else:
                            self.state[row] = WHOLE if whole else HEADER
                            self.width[row], self.height[row] = size
                    done, now = number * BLOCK + len(block), time.monotonic()
                    if now - said > SAY:
                        rate, said = done / (now - started), now
                        say(
                            f"{self.name}: {done:,} of {len(rows):,} {'pictures' if whole else 'picture headers'} "
                            f"read, {rate:,.0f} a second, {(len(rows) - done) / rate / 60:.1f} min left"
                        )
                    else:
                        say("")
                    if now - saved > SAVE:
                        save()
                        saved = now
        finally:
            save()
        return True

    def _stat(self, say: Say) -> NDArray:
        """(3, n): bytes, time of change of its content and of any of every picture; -1 where it is not there."""
        if len(self.shards):
            statuses = [(self.root / shard).stat() for shard in self.shards]
            times = numpy.array([(status.st_mtime_ns, status.st_ctime_ns) for status in statuses])
            return numpy.stack([self.columns["bytes"], *times[self.columns["shard"]].T])
        found, root = numpy.full((3, len(self.paths)), -1), f"{self.root}{os.sep}"

        def read(start: int) -> None:
            for row in range(start, min(start + 16 * BLOCK, len(self.paths))):
                try:
                    status = os.stat(root + self.paths[row])
                    found[:, row] = status.st_size, status.st_mtime_ns, status.st_ctime_ns
                except (OSError, ValueError):
                    pass

        for _ in _in_threads(read, range(0, len(self.paths), 16 * BLOCK)):
            say("")
        return found

    def fingerprint(self) -> str:
        """SHA-256 of all that is known."""
        found = hashlib.sha256("\0".join([self.key, *self.texts]).encode("utf-8", "surrogatepass"))
        for name in PICTURES:
            found.update(numpy.ascontiguousarray(self.columns[name]).data)
        return found.hexdigest()

    def save(self, file: Path) -> None:
        """Writes it. Raises OSError."""
        texts = Strings.of(self.texts)
        save_columns(file, self.key, {**self.columns, "texts.data": texts.data, "texts.ends": texts.ends})


def save_columns(file: Path, key: str, columns: Columns) -> None:
    """Writes columns to a file, which `load_columns` returns with the key. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.from_numpy(numpy.require(values, requirements="W")) for name, values in columns.items()}
    save_tensors(file, tensors, {"key": key, "format": FORMAT, "check": _check(key, columns)})


def _check(key: str, columns: Columns) -> str:
    """A checksum of all."""
    found = hashlib.sha256(key.encode())
    for name in sorted(columns):
        found.update(f"{name} {columns[name].dtype} {columns[name].shape}".encode())
        found.update(numpy.ascontiguousarray(columns[name]).data)
    return found.hexdigest()


def load_columns(file: Path, mapped: Sequence[str] = ()) -> tuple[str, Columns] | None:
    """The key and columns of a file, the `mapped` ones left on disk; None where there is none, or a damaged one."""
    try:
        facts = read_header(file).metadata
        if facts.get("format") != FORMAT:
            return None
        with safe_open(file, framework="pt") as opened:
            columns = {name: opened.get_tensor(name).numpy() for name in opened.keys()}
        key = facts["key"]
        if "check" not in facts:  # 0.1.0's: nothing shows whether it is whole
            return None
        if facts["check"] != _check(key, columns):
            log.warning("Subject DLA: %s was changed or damaged: its checksum is another one. It is made again.", file)
            return None
    except (SafetensorError, SafetensorsError, OSError, KeyError, TypeError, ValueError):
        return None
    mapped = () if os.name == "nt" else mapped  # where a file in use cannot be replaced
    return key, {name: values if name in mapped else values.copy() for name, values in columns.items()}


def _in_threads(function: Callable, parts: Sequence) -> Iterator:
    """The results in order; when the caller ends early, what has not begun is not begun."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield from pool.map(function, parts)
    finally:
        pool.shutdown(cancel_futures=True)
