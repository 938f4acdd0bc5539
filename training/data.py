"""Which pictures and prompts a run learns from: a folder of subjects, or a list as UNO's.

What cannot be used is named and left out; the rest is split by subject, so that nothing held out has been seen.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
LISTS = (".json", ".jsonl")
TARGETS = ("image_tgt_path", "target_path", "target")  # UNO's key first


class DataError(ValueError):
    """Data that nothing can be learnt from; the text says what was found."""


class ImageProblem(ValueError):
    """A picture that cannot be read."""


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
    fingerprint: str  # of the examples and their files


def read_data(
    source: Path,
    *,
    validation: float | Path = 0.1,
    seed: int = 0,
    max_references: int = 4,
    pairs_per_target: int = 4,
) -> Collection:
    """The examples of a folder of subjects or of a .json or .jsonl list.

    Folder: SUBJECT/*.{jpg,png,webp}; a picture with a caption (the .txt of its name) is a target, its references are
    other pictures of the subject, `pairs_per_target` of them in turn. Pictures right in the folder are one subject.
    List: objects with `prompt`, `image_paths` (or `image_path`), `image_tgt_path` and, if given, `subject`; paths are
    relative to the list's folder and stay in it. validation: share of subjects held out (of targets, where there is one
    subject), or a source of its own. Raises DataError where nothing is left.
    """
    reader = _Reader(seed, max_references, pairs_per_target)
    examples = reader.read(Path(source))
    if not examples:
        raise DataError(
            f"{source}: nothing to train on; {len(reader.problems)} entries could not be used"
            + "".join(f"\n- {problem}" for problem in reader.problems[:3])
        )
    if isinstance(validation, Path):
        held_out = set()
        extra = reader.read(validation)
    else:
        held_out, extra = _held_out(examples, validation, seed), []
    kept = tuple(e for e in examples if _key(e, held_out) not in held_out)
    out = tuple(e for e in examples if _key(e, held_out) in held_out) + tuple(extra)
    return Collection(kept, out, tuple(reader.problems), _fingerprint((*kept, *out), Path(source)))


def load_picture(path: Path) -> Tensor:
    """(H, W, 3) float32 in 0..1: turned as its EXIF says, transparency over white. Raises ImageProblem."""
    picture = numpy.asarray(_open(path), dtype=numpy.float32) / 255
    return torch.from_numpy(picture)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):  # 16 bit: Pillow would clip at 255
                values = numpy.asarray(picture, dtype=numpy.float64)
                picture = Image.fromarray((values / (65535 if values.max() > 255 else 255) * 255).astype("uint8"))
            if "A" in picture.getbands() or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageProblem(f"{path.name} cannot be read as a picture ({error})") from None


class _Reader:
    def __init__(self, seed: int, max_references: int, pairs_per_target: int):
        self.seed, self.max_references, self.pairs = seed, max_references, pairs_per_target
        self.problems: list[str] = []
        self._sizes: dict[Path, tuple[int, int] | None] = {}

    def read(self, source: Path) -> list[Example]:
        if source.is_dir():
            return self._folder(source)
        if source.suffix.lower() not in LISTS:
            raise DataError(f"{source}: expected a folder of subjects, or a list ending in {' or '.join(LISTS)}.")
        if not source.is_file():
            raise DataError(f"{source}: there is no such file.")
        return self._list(source)

    def size(self, path: Path, where: str) -> tuple[int, int] | None:
        """Of a picture that decodes; else None and a problem."""
        if path not in self._sizes:
            try:
                self._sizes[path] = _open(path).size
            except ImageProblem as problem:
                self._sizes[path] = None
                self.problems.append(f"{where}: {problem}")
                return None
        elif self._sizes[path] is None:
            self.problems.append(f"{where}: {path.name} cannot be read as a picture")
        return self._sizes[path]

    def _folder(self, root: Path) -> list[Example]:
        out = []
        homes = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        for home in [root, *homes]:
            files = sorted(path for path in home.iterdir() if path.suffix.lower() in PICTURES and path.is_file())
            if not files and home == root:
                continue
            name = home.name
            sizes = {path: size for path in files if (size := self.size(path, f"{name}/{path.name}"))}
            if len(sizes) < 2:
                self.problems.append(f"{name}: {len(sizes)} picture(s), expected at least two of a subject")
                continue
            captions = {path: self._caption(path) for path in sizes}
            if not any(captions.values()):
                self.problems.append(f"{name}: no picture has a caption, expected a .txt beside each target")
            for target in (path for path in sizes if captions[path]):
                others = sorted(
                    (path for path in sizes if path != target),
                    key=lambda path: _number(self.seed, name, target.name, path.name),
                )
                for reference in others[: self.pairs]:
                    out.append(
                        Example(captions[target], (reference,), target, name, sizes[target], (sizes[reference],))
                    )
        return out

    def _caption(self, path: Path) -> str:
        text = path.with_suffix(".txt")
        try:
            return text.read_text(encoding="utf-8-sig").strip() if text.is_file() else ""
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(f"{path.parent.name}/{text.name}: is no UTF-8 text ({error})")
            return ""

    def _list(self, path: Path) -> list[Example]:
        entries = self._entries(path)
        found = (self._entry(entry, f"{path.name} entry {number}", path.parent) for number, entry in entries)
        return [example for example in found if example is not None]

    def _entries(self, path: Path) -> list[tuple[int, object]]:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
        if path.suffix.lower() == ".json":
            try:
                values = json.loads(text)
            except ValueError as error:
                raise DataError(f"{path}: is not JSON ({error}). A list with an entry per line is a .jsonl.") from None
            if not isinstance(values, list):
                raise DataError(f"{path}: holds {type(values).__name__}, expected a list of objects.")
            return list(enumerate(values, 1))
        out = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    out.append((number, json.loads(line)))
                except ValueError as error:
                    self.problems.append(f"{path.name} entry {number}: is not JSON ({error})")
        return out

    def _entry(self, entry: object, where: str, root: Path) -> Example | None:
        def problem(text: str) -> None:
            self.problems.append(f"{where}: {text}")

        if not isinstance(entry, dict):
            return problem(f"is {type(entry).__name__}, expected an object")
        prompt = entry.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            return problem(f"prompt is {prompt!r}, expected text")
        names = entry.get("image_paths", entry.get("image_path"))
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
            return problem(f"image_paths is {names!r}, expected a list of one path or more")
        if len(names) > self.max_references:
            return problem(f"has {len(names)} references, expected at most {self.max_references} (max_references)")
        target = next((entry[key] for key in TARGETS if key in entry), None)
        if not isinstance(target, str) or not target:
            return problem(f"image_tgt_path is {target!r}, expected a path")
        paths = []
        for name in (target, *names):
            plain = PureWindowsPath(name)  # takes both kinds of slash
            if plain.drive or plain.root or ".." in plain.parts:
                return problem(f"{name!r} leads out of the list's folder, expected a path inside it")
            paths.append(root.joinpath(*plain.parts))
        sizes = [self.size(path, where) for path in paths]
        if not all(sizes):
            return None
        given = entry.get("subject")
        subject = given if isinstance(given, str) and given else PurePosixPath(names[0]).with_suffix("").as_posix()
        return Example(prompt.strip(), tuple(paths[1:]), paths[0], subject, sizes[0], tuple(sizes[1:]))


def _held_out(examples: list[Example], share: float, seed: int) -> set[str]:
    """Subjects (or, where there is one, targets) with the lowest hashes: adding a subject hardly moves the others."""
    subjects = {e.subject for e in examples}
    names = subjects if len(subjects) > 1 else {str(e.target) for e in examples}
    if share <= 0 or len(names) < 2:
        return set()
    count = min(max(1, round(share * len(names))), len(names) - 1)
    return set(sorted(names, key=lambda name: _number(seed, Path(name).name))[:count])


def _key(example: Example, held_out: set[str]) -> str:
    return example.subject if example.subject in held_out else str(example.target)


def _number(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def _fingerprint(examples: tuple[Example, ...], source: Path) -> str:
    root = source if source.is_dir() else source.parent
    lines = []
    for example in examples:
        for path in (example.target, *example.references):
            status = path.stat()
            name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
            lines.append(f"{example.prompt}\0{name}\0{status.st_size}\0{status.st_mtime_ns}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
