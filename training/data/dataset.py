"""Which pictures and prompts a run learns from: a folder of subjects, or a list as UNO's.

What cannot be used is named and left out; the rest is split by subject, so that nothing held out has been seen.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from ...common.images import ImageError
from ...common.picture_files import load_picture, shown_size, whole_pictures

__all__ = ["Collection", "DataError", "Example", "ImageError", "load_picture", "read_data"]

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
LISTS = (".json", ".jsonl")
REFERENCES = ("image_paths", "image_path")
TARGETS = ("image_tgt_path", "target_path", "target")  # UNO's key first


class DataError(ValueError):
    """Data that nothing can be learnt from; the text says what was found."""


@dataclass(frozen=True)
class Example:
    """References and a prompt that lead to a target. Sizes are (width, height) in px of the pictures as shown."""

    prompt: str
    references: tuple[Path, ...]
    target: Path
    subject: str
    target_size: tuple[int, int]
    reference_sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Collection:
    training: tuple[Example, ...]
    validation: tuple[Example, ...]
    problems: tuple[str, ...]  # a line for each picture or entry left out
    fingerprint: str  # of the examples, their order, split and files


def read_data(
    source: Path,
    *,
    validation: float | Path = 0.1,
    seed: int = 0,
    max_references: int = 4,
    pairs_per_target: int = 4,
) -> Collection:
    """The examples of a folder of subjects or of a .json or .jsonl list. Every picture is decoded once.

    Folder: SUBJECT/*.{jpg,png,webp}; a picture with a caption (the .txt of its name) is a target, its references are
    other pictures of the subject, `pairs_per_target` of them in turn. Pictures right in the folder are one subject.
    List: objects with `prompt`, `image_paths` (or `image_path`), `image_tgt_path` and, if given, `subject` (else the
    first reference's path); paths are relative to the list's folder and stay in it. validation: share of subjects held
    out, see `held_out`, or a source of its own. Raises DataError where nothing is left.
    """
    reader = _Reader(seed, max_references, pairs_per_target)
    examples, root = reader.read(Path(source)), _root(Path(source))
    if isinstance(validation, (str, Path)):
        kept, other = examples, _root(Path(validation))
        out = reader.unseen(reader.read(Path(validation)), examples)
        if not out:
            raise DataError(f"{validation}: nothing to hold out, every target in it is trained on. Expected others.")
    else:
        sides = held_out(examples, validation, seed, root)
        kept = [example for example, side in zip(examples, sides) if not side]
        out, other = [example for example, side in zip(examples, sides) if side], root
    lines = [*_lines("training", kept, root), *_lines("validation", out, other)]
    fingerprint = hashlib.sha256(_bytes("\n".join(lines))).hexdigest()
    return Collection(tuple(kept), tuple(out), tuple(reader.problems), fingerprint)


def held_out(examples: Sequence[Example], share: float, seed: int, root: Path) -> list[bool]:
    """For each example whether it is held out: each subject is, with probability `share`, by a hash of its name, so that
    a new subject does not move the others; but one at least is, and one is not (of the lowest and highest hash).

    Subjects that share a picture go together, the most that do are trained on; where that leaves one group, subjects are
    split, and where there is one subject, targets.
    """
    if share <= 0:
        return [False] * len(examples)
    subjects = [example.subject for example in examples]
    targets = [_relative(example.target, root) for example in examples]
    for names in (_linked(examples), subjects, targets):
        groups = sorted(set(names), key=lambda name: (_number(seed, name), name))
        if len(groups) > 1:
            sizes = Counter(name for name, _ in set(zip(names, subjects)))
            kept = max(reversed(groups), key=lambda name: sizes[name])
            groups.remove(kept)
            out = {name for name in groups if _number(seed, name) < share} or {groups[0]}
            return [name in out for name in names]
    return [False] * len(examples)


class _Reader:
    def __init__(self, seed: int, max_references: int, pairs_per_target: int):
        self.seed, self.max_references, self.pairs = seed, max_references, pairs_per_target
        self.problems: list[str] = []
        self._found: dict[Path, tuple[int, int] | str] = {}  # a picture's size, or what is wrong with it

    def read(self, source: Path) -> list[Example]:
        before = len(self.problems)
        if not source.exists():
            raise DataError(f"{source}: there is no such folder or file.")
        if source.is_dir():
            examples = self._folder(source)
        elif source.suffix.lower() not in LISTS:
            raise DataError(f"{source}: expected a folder of subjects, or a list ending in {' or '.join(LISTS)}.")
        else:
            examples = self._list(source)
        if not examples:
            found = self.problems[before:]
            raise DataError(
                f"{source}: nothing to train on, {len(found)} problem(s) found. Expected a folder of subjects with a .txt"
                " beside each target, or a list with prompt, image_paths and image_tgt_path."
                + "".join(f"\n- {problem}" for problem in found[:3])
            )
        return examples

    def unseen(self, held_out: list[Example], trained: list[Example]) -> list[Example]:
        """Those whose target is not trained on, under whatever name."""
        seen, out = {example.target.resolve() for example in trained}, []
        for example in held_out:
            if example.target.resolve() in seen:
                where = f"{example.target.parent.name}/{example.target.name}"
                self.problem(where, "is a target to train on too, so it cannot be held out")
            else:
                out.append(example)
        return out

    def problem(self, where: str, text: str) -> None:
        line = f"{where}: {text}"[:400]
        self.problems.append("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))

    def look(self, paths: Iterable[Path]) -> None:
        """Decodes pictures, several at a time."""
        new = [path for path in dict.fromkeys(paths) if path not in self._found]
        with whole_pictures(), ThreadPoolExecutor(8) as pool:
            self._found.update(zip(new, pool.map(_size_or_problem, new)))

    def size(self, path: Path, where: str) -> tuple[int, int] | None:
        found = self._found[path]
        return self.problem(where, found) if isinstance(found, str) else found

    def _folder(self, root: Path) -> list[Example]:
        homes = {path: self._files(path) for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != "."}
        if loose := self._files(root):
            homes = {root.resolve(): loose, **homes}
        self.look(path for files in homes.values() for path in files)
        return [example for home, files in homes.items() for example in self._subject(home.name, files)]

    def _files(self, home: Path) -> list[Path]:
        try:
            files = (path for path in home.iterdir() if path.suffix.lower() in PICTURES and path.name[0] != ".")
            return sorted(path for path in files if path.is_file())
        except OSError as error:
            self.problem(home.name, f"cannot be read ({error.strerror})")
            return []

    def _subject(self, name: str, files: list[Path]) -> Iterator[Example]:
        sizes = {path: size for path in files if (size := self.size(path, f"{name}/{path.name}"))}
        if len(sizes) < 2:
            return self.problem(name, f"{len(sizes)} picture(s), expected at least two of a subject")
        captions = {path: self._caption(path) for path in sizes}
        if not any(captions.values()):
            self.problem(name, "no picture has a caption, expected a .txt beside each target")
        for target in (path for path in sizes if captions[path]):
            others = [path for path in sizes if path != target]
            others.sort(key=lambda path: (_number(self.seed, name, target.name, path.name), path.name))
            for other in others[: self.pairs]:
                yield Example(captions[target], (other,), target, name, sizes[target], (sizes[other],))

    def _caption(self, path: Path) -> str:
        text, where = path.with_suffix(".txt"), f"{path.parent.name}/{path.stem}.txt"
        try:
            if not text.is_file():
                return ""
            caption = text.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            return self.problem(where, f"is no UTF-8 text ({error})") or ""
        return caption or self.problem(where, "is empty, expected a caption") or ""

    def _list(self, path: Path) -> list[Example]:
        found = []
        for number, entry in self._entries(path):
            where = f"{path.name} entry {number}"
            if parts := self._entry(entry, where, path.parent):
                found.append((where, *parts))
        self.look(path for _, _, _, paths in found for path in paths)
        out = []
        for where, prompt, subject, paths in found:
            sizes = [self.size(path, where) for path in paths]
            if all(sizes):
                out.append(Example(prompt, tuple(paths[1:]), paths[0], subject, sizes[0], tuple(sizes[1:])))
        return out

    def _entries(self, path: Path) -> Iterator[tuple[int, object]]:
        """(number from 1, value) of a list's entries; those of a .jsonl are its lines."""
        if path.suffix.lower() == ".json":
            try:
                values = json.loads(path.read_bytes())
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: is not JSON ({error}). A list with an entry per line is a .jsonl.") from None
            if not isinstance(values, list):
                raise DataError(f"{path}: holds {type(values).__name__}, expected a list of objects.")
            yield from enumerate(values, 1)
            return
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    self.problem(f"{path.name} entry {number}", f"is not JSON ({error})")

    def _entry(self, entry: object, where: str, root: Path) -> tuple[str, str, list[Path]] | None:
        """Prompt, subject, and paths of target and references."""

        def problem(text: str) -> None:
            self.problem(where, text)

        if not isinstance(entry, dict):
            return problem(f"is {type(entry).__name__}, expected an object")
        prompt = entry.get("prompt")
        if not _is_text(prompt):
            return problem(f"prompt is {prompt!r:.60}, expected text")
        names = next((entry[key] for key in REFERENCES if entry.get(key) is not None), None)
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not names or not all(_is_text(name) for name in names):
            return problem(f"image_paths is {names!r:.60}, expected a list of one path or more")
        if len(names) > self.max_references:
            return problem(f"has {len(names)} references, expected at most {self.max_references} (max_references)")
        target = next((entry[key] for key in TARGETS if entry.get(key) is not None), None)
        if not _is_text(target):
            return problem(f"image_tgt_path is {target!r:.60}, expected a path")
        subject = entry.get("subject")
        if subject is not None and not _is_text(subject):
            return problem(f"subject is {subject!r:.60}, expected text, or none")
        paths = []
        for name in (target, *names):
            plain = PureWindowsPath(name)  # takes both kinds of slash
            path = root.joinpath(*plain.parts)
            if plain.drive or plain.root or ".." in plain.parts or not plain.name or _leads_out(path, root):
                return problem(f"{name!r:.60} leads out of the list's folder, expected a picture inside it")
            paths.append(path)
        return prompt.strip(), subject or _relative(paths[1].with_suffix(""), root), paths


def _size_or_problem(path: Path) -> tuple[int, int] | str:
    try:
        return shown_size(path)
    except ImageError as problem:
        return str(problem)


def _leads_out(path: Path, root: Path) -> bool:
    """By symbolic links."""
    try:
        return not path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a null: nothing that can be read
        return False


def _is_text(value: object) -> bool:
    """Something to read that UTF-8 can write (JSON may hold halves of surrogate pairs)."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def _linked(examples: Sequence[Example]) -> list[str]:
    """For each example one name for all subjects that its own shares pictures with, in one step or in several."""
    leader: dict[object, object] = {}

    def find(thing: object) -> object:
        while leader.setdefault(thing, thing) != thing:
            leader[thing] = leader[leader[thing]]
            thing = leader[thing]
        return thing

    for example in examples:
        for path in (example.target, *example.references):
            leader[find(path)] = find(example.subject)
    first: dict[object, str] = {}
    for example in examples:
        group = find(example.subject)
        first[group] = min(first.get(group, example.subject), example.subject)
    return [first[find(example.subject)] for example in examples]


def _number(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    return int(hashlib.sha256(_bytes("\0".join(map(str, parts)))).hexdigest()[:13], 16) / 16**13


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # file names need not be UTF-8


def _root(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _lines(side: str, examples: Sequence[Example], root: Path) -> Iterator[str]:
    """What the fingerprint is of."""
    for example in examples:
        yield f"{side}\0{example.subject}\0{example.prompt}"
        for path in (example.target, *example.references):
            status = path.stat()
            yield f"{_relative(path, root)}\0{status.st_size}\0{status.st_mtime_ns}"
