"""Prompts with pictures, as training and benchmarks read them: folders of subjects, and lists.

A list is a .json (a list of objects) or a .jsonl (an object on each line), in UTF-8 or UTF-16. Its entries are UNO's
(prompt, image_paths or image_path, image_tgt_path) or XVerseBench's (prompt, modulation).
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, TypeGuard

from .images import ImageError
from .picture_files import shown_size, whole_pictures

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
LISTS = (".json", ".jsonl")
REFERENCES = ("image_paths", "image_path")
TARGETS = ("image_tgt_path", "target_path", "target")  # UNO's key first
Size = tuple[int, int]  # (width, height) in px of a picture as shown


class DataError(ValueError):
    """A folder, file or entry that cannot be used; the text says what was found and what was expected."""


@dataclass(frozen=True)
class Example:
    """A prompt with its references and, for training, the target that they lead to."""

    subject: str
    prompt: str
    references: tuple[Path, ...]
    target: Path | None = None
    target_size: Size | None = None
    reference_sizes: tuple[Size, ...] = ()
    source: str = ""  # where it was read, for messages


class DataReader:
    """Reads folders and lists; `problems` holds a line for each thing that cannot be used and was left out.

    `hint` is added to problems with a list's paths: how to say where they start.
    """

    def __init__(self, hint: str = ""):
        self.hint = hint
        self.problems: list[str] = []
        self._sizes: dict[Path, Size | str] = {}  # of each picture; a text says why it cannot be used

    def problem(self, source: str, text: str) -> None:
        """Records a problem as one printable line."""
        line = f"{source}: {text}"[:400]
        self.problems.append("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))

    def subjects(self, root: Path, names: Iterable[str] | None = None) -> Iterator[tuple[Path, dict[Path, Size]]]:
        """Each subject's folder in `root` with its readable pictures, of the subjects of these names (None: of all).

        Pictures right in `root` are one subject, the first. A folder that cannot be read is a problem and left out.
        """
        if names is None:
            names = ["", *(path.name for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != ".")]
        listed = ((name, self._pictures(root / name)) for name in names)
        found = {root / name: files for name, files in listed if files or (name and files is not None)}
        self._decode(path for pictures in found.values() for path in pictures)
        for folder, pictures in found.items():
            name = folder.name or folder.resolve().name
            yield folder, {path: size for path in pictures if (size := self._size(path, f"{name}/{path.name}"))}

    def entries(self, path: Path, root: Path, *, target: bool = False, max_references: int = 0) -> Iterator[Example]:
        """The usable entries of a list, each picture decoded once. Raises DataError where the file is no list.

        Its paths start from `root` and stay in it, also by symbolic links. With `target`, an entry needs one;
        `max_references` 0: any number.
        """
        found = []
        for number, value in self._values(path):
            source = f"{path.name} entry {number}"
            try:
                found.append((source, *self._parse(value, root, target, max_references)))
            except DataError as error:
                self.problem(source, str(error))
        self._decode(path for *_, paths in found for path in paths)
        for source, subject, prompt, paths in found:
            sizes = [size for path in paths if (size := self._size(path, source))]
            if len(sizes) == len(paths):
                goal, goal_size = (paths[0], sizes[0]) if target else (None, None)
                yield Example(subject, prompt, tuple(paths[target:]), goal, goal_size, tuple(sizes[target:]), source)

    def require(self, found: Collection, source: Path, purpose: str, expected: str) -> None:
        """Raises DataError with the first problems where nothing was found."""
        if not found:
            count, first = len(self.problems), "".join(f"\n- {problem}" for problem in self.problems[:3])
            raise DataError(f"{source}: nothing to {purpose}, {count} problem(s) found. Expected {expected}.{first}")

    def _values(self, path: Path) -> Iterator[tuple[int, object]]:
        """(number from 1, value) of each entry; those of a .jsonl are its lines."""
        if path.suffix.lower() == ".json":
            yield from enumerate(read_json_list(path), 1)
            return
        for number, line in enumerate(read_text(path, "surrogateescape").split("\n"), 1):
            if line.strip():
                try:
                    yield number, json.loads(line.encode("utf-8", "surrogateescape"))
                except (ValueError, RecursionError) as error:
                    self.problem(f"{path.name} entry {number}", f"is not JSON ({error})")

    def _parse(self, value: object, root: Path, target: bool, most: int) -> tuple[str, str, list[Path]]:
        """Subject, prompt, and the paths of the target, if asked for, and of the references."""
        if not isinstance(value, dict):
            raise DataError(f"is {type(value).__name__}, expected an object")
        prompt, subject = value.get("prompt"), value.get("subject")
        if not is_text(prompt):
            raise DataError(f"prompt is {prompt!r:.60}, expected text")
        names = next((value[key] for key in REFERENCES if value.get(key) is not None), _xverse(value.get("modulation")))
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not names or not all(map(is_text, names)):
            raise DataError(f"image_paths is {names!r:.60}, expected a list of one path or more")
        if most and len(names) > most:
            raise DataError(f"has {len(names)} references, expected at most {most} (max_references)")
        goal = [next((value[key] for key in TARGETS if value.get(key) is not None), None)] * target
        if not all(map(is_text, goal)):
            raise DataError(f"image_tgt_path is {goal[0]!r:.60}, expected a path")
        if subject is not None and not is_text(subject):
            raise DataError(f"subject is {subject!r:.60}, expected text, or none")
        paths, first = [self._inside(name, root) for name in (*goal, *names)], PureWindowsPath(names[0])
        named = paths[target].relative_to(root) if first.anchor else Path(*first.parts)
        return subject or named.with_suffix("").as_posix(), prompt.strip(), paths

    def _inside(self, name: str, root: Path) -> Path:
        """The path of a picture in `root`, which a list may write with either slash, through `..`, or absolute."""
        plain, absolute = PureWindowsPath(name), Path(name).is_absolute()
        path = Path(name) if absolute else root.joinpath(*plain.parts)
        try:
            found, base = path.resolve(), root.resolve()
            inside = found != base and found.is_relative_to(base)
        except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a null: nothing that can be read
            found, inside = None, not absolute
        if not inside or (plain.anchor and not absolute):
            raise DataError(f"{name!r:.60} leads out of {root}, expected a picture inside it{self.hint}")
        return root / found.relative_to(base) if found and (absolute or ".." in plain.parts) else path

    def _pictures(self, folder: Path) -> list[Path] | None:
        try:
            files = (path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.name[0] != ".")
            return sorted(path for path in files if path.is_file())
        except OSError as error:
            self.problem(folder.name, f"cannot be read ({error.strerror}), expected a folder of pictures")
            return None

    def _decode(self, paths: Iterable[Path]) -> None:
        new = [path for path in dict.fromkeys(paths) if path not in self._sizes]
        with whole_pictures(), ThreadPoolExecutor(8) as pool:
            self._sizes.update(zip(new, pool.map(_size_or_problem, new)))

    def _size(self, path: Path, source: str) -> Size | None:
        found = self._sizes[path]
        if not isinstance(found, str):
            return found
        self.problem(source, found if os.path.exists(path) else f"{found} (in {path.parent}){self.hint}")
        return None


def is_list(source: Path) -> bool:
    """Whether a source is a list, not a folder. Raises DataError where it is neither."""
    if not source.exists():
        raise DataError(f"{source}: there is no such folder or file.")
    if not source.is_dir() and source.suffix.lower() not in LISTS:
        raise DataError(f"{source}: expected a folder of subjects, or a list ending in {' or '.join(LISTS)}.")
    return not source.is_dir()


def read_text(path: Path, errors: str = "strict") -> str:
    """A text file in UTF-8 or UTF-16. Raises DataError."""
    try:
        data = path.read_bytes()
        return data.decode(json.detect_encoding(data), errors)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}), expected text in UTF-8 or UTF-16.") from None


def read_json_list(path: Path) -> list:
    """The list in a .json file. Raises DataError."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error}). A list with an entry on each line is a .jsonl.") from None
    if not isinstance(found, list):
        raise DataError(f"{path}: holds {type(found).__name__}, expected a list.")
    return found


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text that is not blank and that UTF-8 can write (JSON may hold halves of surrogate pairs)."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def digest(*parts: object) -> str:
    """SHA-256 of the parts' texts, in hexadecimal digits; file names among them need not be UTF-8."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()


def _xverse(modulation: Any) -> object:
    """The paths in an XVerseBench entry, or what is there instead."""
    try:
        return [source["image_path"] for part in modulation for source in part["src_inputs"]]
    except (TypeError, KeyError):
        return modulation


def _size_or_problem(path: Path) -> Size | str:
    try:
        return shown_size(path)
    except ImageError as error:
        return str(error)
