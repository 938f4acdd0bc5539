"""Prompts with pictures, as training and benchmarks read them: folders of subjects, and lists.

A list is a .json (a list of objects) or a .jsonl (an object on each line), in UTF-8 or UTF-16. Its entries are UNO's
(prompt, image_paths or image_path, image_tgt_path) or XVerseBench's (prompt, modulation).
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple, TypeGuard

from .files import DataError, file_problem, read_bytes
from .images import ImageError
from .picture_files import PICTURES, PictureFile, left_out, shown_size, whole_pictures

LISTS = (".json", ".jsonl")
REFERENCES = ("image_paths", "image_path")
TARGETS = ("image_tgt_path", "target_path", "target")  # UNO's key first
Size = tuple[int, int]  # (width, height) in px of a picture as shown
# Names that need no look at the disk to know where they lead, but for symbolic links.
PLAIN = re.compile(r"(?!\.\.?(?:/|$))[^/\\:\0]+(?:/(?!\.\.?(?:/|$))[^/\\:\0]+)*")
DECODE = json.JSONDecoder().raw_decode
NESTED = "is a folder inside a subject's, expected its pictures right in it: move them there"
SPACE = re.compile(r"[ \t\n\r]*")
CHUNK = 2**20  # characters of a .json that are read at a time
BLOCK = 64  # pictures that a thread decodes at a time
MOST_LEFT_OUT = 100_000  # entries of a list that cannot be used, where they are two of three
LONGEST_TEXT = 2**20  # bytes of a caption, or a list of prompts
LONGEST_ENTRY = 16 * CHUNK  # characters of an entry of a list
LONGEST_LIST = 256 * 2**20  # bytes of a .json that is read whole; entry by entry there is no limit


@dataclass(frozen=True)
class Example:
    """A prompt with its references and, for training, the target that they lead to."""

    subject: str
    prompt: str
    references: tuple[PictureFile, ...]
    target: PictureFile | None = None
    target_size: Size | None = None
    reference_sizes: tuple[Size, ...] = ()
    source: str = ""  # where it was read, for messages


class Entry(NamedTuple):
    """An entry of a list, its pictures' paths from the root, with slashes."""

    number: int  # from 1; of a .jsonl, the line's
    subject: str
    prompt: str
    pictures: tuple[str, ...]  # the target first, if there is to be one


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
        if not line.isprintable():
            line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
        self.problems.append(line)

    def subjects(self, root: Path, names: Iterable[str] | None = None) -> Iterator[tuple[Path, dict[Path, Size]]]:
        """Each subject's folder in `root` with its readable pictures, of the subjects of these names (None: of all).

        Pictures right in `root` are one subject, the first. A folder that cannot be read is a problem and left out.
        """
        if names is None:
            names = ["", *(path.name for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != ".")]
        listed = ((name, self._pictures(root / name, root)) for name in names)
        found = {root / name: files for name, files in listed if files or (name and files is not None)}
        self._decode(path for pictures in found.values() for path in pictures)
        for folder, pictures in found.items():
            name = folder.name or folder.resolve().name
            yield folder, {path: size for path in pictures if (size := self._size(path, f"{name}/{path.name}"))}

    def entries(self, path: Path, root: Path, *, target: bool = False, max_references: int = 0) -> Iterator[Example]:
        """The usable examples of a list, each picture decoded once; see `parsed`."""
        found, sizes_of = list(self.parsed(path, root, target=target, max_references=max_references)), Confined(root)
        of = {name: root / name for entry in found for name in entry.pictures}
        self._sizes.update(zip(of.values(), _in_blocks(sizes_of, list(of))))
        for number, subject, prompt, pictures in found:
            source, paths = f"{path.name} entry {number}", [of[name] for name in pictures]
            sizes = [size for picture in paths if (size := self._size(picture, source))]
            if len(sizes) == len(paths):
                goal, goal_size = (paths[0], sizes[0]) if target else (None, None)
                yield Example(subject, prompt, tuple(paths[target:]), goal, goal_size, tuple(sizes[target:]), source)

    def parsed(self, path: Path, root: Path, *, target: bool = False, max_references: int = 0) -> Iterator[Entry]:
        """The entries of a list, read one by one, without a look at their pictures.

        Args:
            path: The list.
            root: Where its paths start; they stay in it, also by symbolic links (those of plain names: `Confined`).
            target: An entry needs one.
            max_references: 0 = any number.

        Raises:
            DataError: The file is no list, or most of it cannot be used.
        """
        left_out = 0
        for read, (number, value) in enumerate(self._values(path)):
            try:
                yield Entry(number, *self._parse(value, root, target, max_references))
            except DataError as error:
                self.problem(f"{path.name} entry {number}", str(error))
                left_out += 1
                if left_out > max(MOST_LEFT_OUT, read * 2 / 3):
                    raise DataError(
                        f"{path}: {left_out:,} of its first {read + 1:,} entries cannot be used, such as entry "
                        f"{number}, which {error}."
                    ) from None

    def require(self, found: Collection, source: Path, purpose: str, expected: str) -> None:
        """Raises DataError with the first problems where nothing was found."""
        if not found:
            count, first = len(self.problems), "".join(f"\n- {problem}" for problem in self.problems[:3])
            raise DataError(f"{source}: nothing to {purpose}, {count} problem(s) found. Expected {expected}.{first}")

    def _values(self, path: Path) -> Iterator[tuple[int, object]]:
        """(number from 1, value or why there is none) of each entry; those of a .jsonl are its lines."""
        if path.suffix.lower() == ".json":
            yield from enumerate(_json_values(path), 1)
            return
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                try:
                    yield number, json.loads(line.encode("utf-8", "surrogateescape"))
                except (ValueError, RecursionError) as error:
                    yield number, DataError(f"is not JSON ({error})")

    def _parse(self, value: object, root: Path, target: bool, most: int) -> tuple[str, str, tuple[str, ...]]:
        """Subject, prompt, and the paths of the target, if asked for, and of the references."""
        if isinstance(value, DataError):
            raise value
        if not isinstance(value, dict):
            raise DataError(f"is {type(value).__name__}, expected an object")
        prompt, subject = value.get("prompt"), value.get("subject")
        if not is_text(prompt):
            raise DataError(f"prompt is {prompt!r:.60}, expected text")
        names = next((value[key] for key in REFERENCES if value.get(key) is not None), None)
        names = _xverse(value.get("modulation")) if names is None else names
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
        paths = tuple(self._inside(name, root) for name in (*goal, *names))
        return subject or _without_suffix(names[0], paths[target]), prompt.strip(), paths

    def _inside(self, name: str, root: Path) -> str:
        """The path from `root` of a picture, which a list may write with either slash, through `..`, or absolute."""
        if PLAIN.fullmatch(name):
            return name
        plain, absolute = PureWindowsPath(name), Path(name).is_absolute()
        path = Path(name) if absolute else root.joinpath(*plain.parts)
        try:
            found, base = path.resolve(), root.resolve()
            inside = found != base and found.is_relative_to(base)
        except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a null: nothing that can be read
            found, inside = None, not absolute
        if not inside or (plain.anchor and not absolute):
            raise DataError(f"{name!r:.60} leads out of {root}, expected a picture inside it{self.hint}")
        if found is not None and (absolute or ".." in plain.parts):
            return found.relative_to(base).as_posix()
        return path.relative_to(root).as_posix()

    def _pictures(self, folder: Path, root: Path) -> list[Path] | None:
        try:
            named = sorted(path for path in folder.iterdir() if path.name[0] != ".")
            for path in named:
                problem = left_out(path.name)
                if folder != root and path.is_dir():
                    problem = NESTED
                if not problem and path.suffix.lower() in PICTURES and not path.is_dir():
                    problem = file_problem(path)
                if problem:
                    self.problem(f"{folder.name}/{path.name}", problem)
            return [path for path in named if path.suffix.lower() in PICTURES and path.is_file()]
        except OSError as error:
            self.problem(folder.name, f"cannot be read ({error.strerror}), expected a folder of pictures")
            return None

    def _decode(self, paths: Iterable[Path]) -> None:
        new = [path for path in dict.fromkeys(paths) if path not in self._sizes]
        self._sizes.update(zip(new, _in_blocks(size_or_problem, new)))

    def _size(self, path: Path, source: str) -> Size | None:
        found = self._sizes[path]
        if not isinstance(found, str):
            return found
        self.problem(source, found if os.path.exists(path) else f"{found} (in {path.parent}){self.hint}")
        return None


class Confined:
    """The sizes of pictures below a folder that none of them may leave, also not by a symbolic link."""

    def __init__(self, root: Path):
        self.root, self._base = root, os.path.realpath(root)
        self._folders: dict[str, bool] = {}  # whether a folder is inside

    def __call__(self, name: str, whole: bool = True) -> Size | str:
        """The size of a picture by its path from the folder, or why it cannot be used; see `shown_size`."""
        path = f"{self._base}{os.sep}{name}"
        try:
            folder = os.path.dirname(path)
            if folder not in self._folders:
                self._folders[folder] = self._is_inside(os.path.realpath(folder))
            inside = self._folders[folder]
            if inside and stat.S_ISLNK(os.lstat(path).st_mode):
                inside = self._is_inside(os.path.realpath(path))
            if not inside:
                return f"{name!r:.60} leads out of {self.root}, expected a picture inside it"
        except FileNotFoundError:
            return f"{os.path.basename(path)} does not exist"
        except (OSError, ValueError):  # too long, a loop of links, a null: nothing that can be read
            pass
        return size_or_problem(self.root / name, whole)

    def _is_inside(self, path: str) -> bool:
        return path == self._base or path.startswith(self._base.rstrip(os.sep) + os.sep)


def _in_blocks(size_of: Callable[[Any], Size | str], pictures: Sequence[Any]) -> Iterator[Size | str]:
    """What `size_of` gives for each picture, in threads that take many at a time."""
    blocks = [pictures[start : start + BLOCK] for start in range(0, len(pictures), BLOCK)]
    with whole_pictures(), ThreadPoolExecutor(8) as pool:
        for sizes in pool.map(lambda block: list(map(size_of, block)), blocks):
            yield from sizes


def is_list(source: Path) -> bool:
    """Whether a source is a list, not a folder. Raises DataError where it is neither."""
    if not source.exists():
        raise DataError(f"{source}: there is no such folder or file.")
    if not source.is_dir() and source.suffix.lower() not in LISTS:
        raise DataError(f"{source}: expected a folder of subjects, or a list ending in {' or '.join(LISTS)}.")
    if problem := not source.is_dir() and file_problem(source, "a file, or a folder of subjects"):
        raise DataError(f"{source} {problem}")
    return not source.is_dir()


def read_text(path: Path, longest: int = LONGEST_TEXT) -> str:
    """A text file in UTF-8 or UTF-16 of at most `longest` bytes. Raises DataError."""
    data = read_bytes(path, longest)
    try:
        text = data.decode(json.detect_encoding(data))
        if "\0" in text or text.startswith("version https://git-lfs"):
            raise DataError(f"{path} is {'no text: it has null bytes' if chr(0) in text else 'a Git LFS pointer'}.")
        return text
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read ({error}), expected text in UTF-8 or UTF-16.") from None


def read_json_list(path: Path) -> list:
    """The list in a .json file. Raises DataError."""
    try:
        found = json.loads(read_bytes(path, LONGEST_LIST))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error}). A list with an entry on each line is a .jsonl.") from None
    if not isinstance(found, list):
        raise DataError(f"{path}: holds {type(found).__name__}, expected a list.")
    return found


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file in UTF-8 or UTF-16, one by one; bytes that are neither are escaped. Raises DataError."""
    try:
        with open(path, encoding=_encoding(path), errors="surrogateescape", newline="\n") as file:
            while line := file.readline(LONGEST_ENTRY + 1):
                if len(line) > LONGEST_ENTRY:
                    raise DataError(f"{path}: a line has over {LONGEST_ENTRY:,} characters, expected an entry on each.")
                yield line.removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}), expected text in UTF-8 or UTF-16.") from None


def _json_values(path: Path) -> Iterator[object]:
    """The values in the list of a .json file, a part of which is in memory at a time. Raises DataError."""
    count, opener, text, at = 0, "[", "", 0
    try:
        with open(path, encoding=_encoding(path), errors="surrogatepass", newline="") as file:
            while (more := file.read(CHUNK)) and len(text) - at < LONGEST_ENTRY:
                text, at = text[at:] + more, 0
                while (found := _value(text, at, opener)) is not None:
                    value, at = found
                    yield value
                    count, opener = count + 1, ","
        whole = re.fullmatch(r"[ \t\n\r]*\][ \t\n\r]*", text[at:]) if count else None
    except (OSError, UnicodeDecodeError):
        whole = None
    if not whole or more:
        yield from read_json_list(path)[count:]  # or its error


def _value(text: str, at: int, opener: str) -> tuple[object, int] | None:
    """The value behind an opening sign, and where the sign after it is; None where these are not all in the text."""
    at = _skip_space(text, at)
    if not text.startswith(opener, at):
        return None
    try:
        value, end = DECODE(text, _skip_space(text, at + 1))
    except (ValueError, RecursionError):
        return None
    end = _skip_space(text, end)
    return (value, end) if text.startswith((",", "]"), end) else None


def _skip_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found else at


def _encoding(path: Path) -> str:
    with open(path, "rb") as file:
        return json.detect_encoding(file.read(4))


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text that is not blank and that UTF-8 can write (JSON may hold halves of surrogate pairs)."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def digest(*parts: object) -> str:
    """SHA-256 of the parts' texts, in hexadecimal digits; file names among them need not be UTF-8."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()


def _without_suffix(name: str, path: str) -> str:
    """A subject's name: its first reference as the list writes it, from the root where it is absolute."""
    if PLAIN.fullmatch(name):
        folder, slash, last = name.rpartition("/")
        dot = last.rfind(".")  # as pathlib finds a suffix
        return folder + slash + (last[:dot] if 0 < dot < len(last) - 1 else last)
    first = PureWindowsPath(name)
    return (Path(path) if first.anchor else Path(*first.parts)).with_suffix("").as_posix()


def _xverse(modulation: Any) -> object:
    """The paths in an XVerseBench entry, or what is there instead."""
    try:
        return [source["image_path"] for part in modulation for source in part["src_inputs"]]
    except (TypeError, KeyError):
        return modulation


def size_or_problem(path: PictureFile, whole: bool = True) -> Size | str:
    """The size of a picture as shown, or why it cannot be used; see `shown_size`."""
    try:
        if isinstance(path, Path):
            os.lstat(path)
    except FileNotFoundError:
        return f"{path.name} does not exist"
    except (OSError, ValueError):  # too long, a null: see below
        pass
    try:
        return shown_size(path, whole)
    except ImageError as error:
        return str(error)
