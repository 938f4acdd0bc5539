"""What a benchmark asks for: subjects, their pictures and prompts, from the layouts in which they are published.

    dreambench   dataset/SUBJECT/*.jpg beside prompts_and_classes.txt, as google/dreambooth publishes it
    list         .json or .jsonl of objects with prompt and image_paths (UNO), or prompt and modulation (XVerseBench)
    folder       SUBJECT/*.jpg of one's own, and a prompt list

What cannot be used is named and left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from ...common.images import ImageError
from ...common.picture_files import shown_size, whole_pictures

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
LISTS = (".json", ".jsonl")
DREAMBENCH = "prompts_and_classes.txt"
LIVE = ("cat", "dog")  # DreamBench's classes with prompts of their own
SEED_BITS = 48  # so that the editor, which counts in doubles, shows the same number


class SetError(ValueError):
    """A benchmark that nothing can be drawn from; the text says what was found."""


@dataclass(frozen=True)
class Item:
    """One prompt with the references that it goes with. source: where it stands, for messages."""

    subject: str
    prompt: str
    references: tuple[Path, ...]
    source: str


@dataclass(frozen=True)
class BenchmarkSet:
    layout: str  # "dreambench" | "list" | "folder"
    root: Path  # folder that all references lie in
    items: tuple[Item, ...]
    problems: tuple[str, ...]  # a line for each thing left out


@dataclass(frozen=True)
class Case:
    """One picture to be made. name: of its file, without suffix; a function of what the picture is to show."""

    name: str
    item: Item
    take: int  # which of the prompt's seeds, from 0
    seed: int


def read_set(
    source: Path, *, prompts: Path | None = None, images: Path | None = None, references: int = 1
) -> BenchmarkSet:
    """The items of a folder or list; the layout is told by what there is. Every reference is decoded once.

    prompts: for a folder of one's own: .txt with a prompt a line (# begins a comment), or .json with a list of them;
    `{subject}` stands for the subject's class. images: folder that a list's paths are relative to, else the list's own.
    references: pictures of a subject that each prompt goes with, the first by name (folders; lists name their own).
    Raises SetError where nothing is left.
    """
    source = Path(source)
    if not source.exists():
        raise SetError(f"{source}: there is no such folder or file.")
    reader = _Reader(references)
    if source.is_dir():
        home = next((home for home in (source, source / "dataset") if (home / DREAMBENCH).is_file()), None)
        if home and not prompts:
            layout, root, items = "dreambench", home, reader.dreambench(home)
        elif prompts:
            layout, root, items = "folder", source, reader.folder(source, read_prompts(Path(prompts)))
        else:
            raise SetError(f"{source}: has no {DREAMBENCH} and no prompts were given: name a prompt list (--prompts).")
    elif source.suffix.lower() in LISTS:
        layout, root = "list", Path(images) if images else source.parent
        items = reader.list(source, root)
    else:
        raise SetError(f"{source}: expected a folder of subjects, or a list ending in {' or '.join(LISTS)}.")
    items = list(reader.without_repeats(items))
    if not items:
        found = "".join(f"\n- {problem}" for problem in reader.problems[:3])
        raise SetError(f"{source}: nothing to draw, {len(reader.problems)} problem(s) found.{found}")
    return BenchmarkSet(layout, root, tuple(items), tuple(reader.problems))


def cases(items: Sequence[Item], *, seeds: int = 1, seed: int = 0, limit: int = 0) -> list[Case]:
    """The pictures of the first `limit` items (0: all), `seeds` of each.

    A picture's seed depends on `seed`, subject, prompt and number alone: the same on every system and selection. Its
    name depends on these and on the references' bytes.
    """
    digests: dict[Path, str] = {}
    for path in (path for item in items for path in item.references):
        digests[path] = digests.get(path) or hashlib.sha256(path.read_bytes()).hexdigest()
    found = []
    for item in items[: limit or None]:
        for take in range(seeds):
            number = int(_digest(seed, item.subject, item.prompt, take), 16) % 2**SEED_BITS
            mark = _digest(number, item.subject, item.prompt, *(digests[path] for path in item.references))[:10]
            found.append(Case(f"{_slug(item.subject)}-{_slug(item.prompt)}-{mark}-{take}", item, take, number))
    return found


def read_prompts(path: Path) -> list[str]:
    """A prompt a line, or a .json list. Raises SetError where there is none."""
    text = _text(path)
    if path.suffix.lower() == ".json":
        found = _json(text, path)
        bad = [repr(entry)[:60] for entry in found if not _is_text(entry)]
        if bad:
            raise SetError(f"{path}: holds {bad[0]}, expected a list of texts.")
    else:
        found = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found = [line.strip() for line in found if line.strip()]
    if not found:
        raise SetError(f"{path}: holds no prompt, expected one a line.")
    return found


class _Reader:
    def __init__(self, references: int):
        self.references, self.problems = references, []
        self._found: dict[Path, str] = {}  # what is wrong with a picture, or nothing

    def problem(self, where: str, text: str) -> None:
        line = f"{where}: {text}"[:400]
        self.problems.append("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))

    def good(self, path: Path, where: str) -> bool:
        if path not in self._found:
            try:
                with whole_pictures():
                    shown_size(path)
                self._found[path] = ""
            except ImageError as problem:
                self._found[path] = str(problem)
        if self._found[path]:
            self.problem(where, self._found[path])
        return not self._found[path]

    def pictures(self, home: Path) -> tuple[Path, ...]:
        """The subject's references: its first readable pictures by name."""
        try:
            files = sorted(path for path in home.iterdir() if path.suffix.lower() in PICTURES and path.is_file())
        except OSError as error:
            self.problem(home.name, f"cannot be read ({error.strerror}), expected a folder of its pictures")
            return ()
        found = tuple(path for path in files if self.good(path, f"{home.name}/{path.name}"))[: self.references]
        if len(found) < self.references:
            self.problem(home.name, f"{len(found)} readable picture(s), expected {self.references}")
            return ()
        return found

    def dreambench(self, home: Path) -> Iterator[Item]:
        classes, prompts = self._published(home / DREAMBENCH)
        for name in sorted(path.name for path in home.iterdir() if path.is_dir() and path.name[0] != "."):
            if name not in classes:
                self.problem(name, f"is not among the classes of {DREAMBENCH}")
        for subject, kind in classes.items():
            live, found = kind in LIVE, self.pictures(home / subject)
            for number, prompt in enumerate(prompts[live] if found else ()):
                text = prompt.replace("{0} ", "").replace("{1}", kind)  # no rare token: the references say who it is
                yield Item(subject, text, found, f"{subject} prompt {number + 1}")

    def _published(self, path: Path) -> tuple[dict[str, str], tuple[list[str], list[str]]]:
        """Class by subject, and the prompts for objects and for live subjects, of DreamBench's text file."""
        classes: dict[str, str] = {}
        prompts: tuple[list[str], list[str]] = ([], [])
        part = None  # the list that lines belong to
        for number, line in enumerate(_text(path).splitlines(), 1):
            where, line = f"{path.name} line {number}", line.strip().rstrip(",")
            if line.lower().endswith("prompts"):
                part = prompts["live" in line.lower()]
            elif line == "subject_name,class" or line == "Classes":
                part = classes
            elif not line or line in ("]", "prompt_list = ["):
                continue
            elif part is classes:
                subject, comma, kind = (piece.strip() for piece in line.partition(","))
                if not comma or not subject or not kind or PureWindowsPath(subject).name != subject:
                    self.problem(where, f"is {line!r:.60}, expected SUBJECT,CLASS")
                else:
                    classes[subject] = kind
            else:
                quoted = re.fullmatch(r"(['\"])(.*)\1\.format\(unique_token, class_token\)", line)
                if part is None or not quoted or "{1}" not in quoted[2]:
                    self.problem(
                        where, f"is {line!r:.60}, expected 'a {{0}} {{1}} ...'.format(unique_token, class_token)"
                    )
                else:
                    part.append(quoted[2])
        for name, found in (("classes", classes), ("object prompts", prompts[0])):
            if not found:
                raise SetError(f"{path}: holds no {name}, expected the file as google/dreambooth publishes it.")
        if not prompts[1] and any(kind in LIVE for kind in classes.values()):
            self.problem(path.name, f"holds no live subject prompts, expected some for {' and '.join(LIVE)}")
        return classes, prompts

    def folder(self, root: Path, prompts: list[str]) -> Iterator[Item]:
        homes = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
        if any(path.suffix.lower() in PICTURES for path in root.iterdir()):
            homes.insert(0, root)  # pictures right in the folder are one subject
        for home in homes:
            name, found = home.resolve().name, self.pictures(home)
            kind = self._class(home) or name.replace("_", " ").replace("-", " ").strip()
            for number, prompt in enumerate(prompts if found else (), 1):
                yield Item(name, prompt.replace("{subject}", kind), found, f"{name} prompt {number}")

    def _class(self, home: Path) -> str:
        """What the subject is, if class.txt says so."""
        try:
            return _text(home / "class.txt").strip() if (home / "class.txt").is_file() else ""
        except SetError as problem:
            return self.problem(home.name, str(problem)) or ""

    def list(self, path: Path, root: Path) -> Iterator[Item]:
        for number, entry in self._entries(path):
            where = f"{path.name} entry {number}"
            if (item := self._entry(entry, where, root)) and all(self.good(p, where) for p in item.references):
                yield item

    def _entries(self, path: Path) -> Iterator[tuple[int, object]]:
        if path.suffix.lower() == ".json":
            yield from enumerate(_json(_text(path), path), 1)
            return
        for number, line in enumerate(_text(path).split("\n"), 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    self.problem(f"{path.name} entry {number}", f"is not JSON ({error})")

    def _entry(self, entry: object, where: str, root: Path) -> Item | None:
        def problem(text: str) -> None:
            self.problem(where, text)

        if not isinstance(entry, dict):
            return problem(f"is {type(entry).__name__}, expected an object")
        prompt, subject = entry.get("prompt"), entry.get("subject")
        if not _is_text(prompt):
            return problem(f"prompt is {prompt!r:.60}, expected text")
        names = (
            _xverse(entry["modulation"]) if "modulation" in entry else entry.get("image_paths", entry.get("image_path"))
        )
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not names or not all(_is_text(name) for name in names):
            return problem(f"image_paths is {names!r:.60}, expected a list of one path or more")
        if subject is not None and not _is_text(subject):
            return problem(f"subject is {subject!r:.60}, expected text, or none")
        paths = []
        for name in names:
            plain = PureWindowsPath(name)  # takes both kinds of slash
            path = root.joinpath(*plain.parts)
            if plain.drive or plain.root or not plain.name or not path.resolve().is_relative_to(root.resolve()):
                return problem(
                    f"{name!r:.60} leads out of {root}, expected a picture inside it (--images names another)"
                )
            if not path.is_file():
                return problem(f"{name!r:.60} is no file in {root} (--images names the folder that paths start from)")
            paths.append(path)
        return Item(
            subject or Path(*PureWindowsPath(names[0]).parts).with_suffix("").as_posix(),
            _line(prompt),
            tuple(paths),
            where,
        )

    def without_repeats(self, items: Iterator[Item]) -> Iterator[Item]:
        first: dict[tuple, str] = {}
        for item in items:
            key = (item.subject, item.prompt, item.references)
            if key in first:
                self.problem(item.source, f"repeats {first[key]} (more pictures of a prompt: --seeds)")
            else:
                first[key] = item.source
                yield item


def _xverse(modulation: object) -> object:
    """Paths in an XVerseBench entry, or what stands in their place."""
    try:
        return [source["image_path"] for part in modulation for source in part["src_inputs"]]
    except (TypeError, KeyError):
        return modulation


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SetError(f"{path}: cannot be read as UTF-8 text ({error}).") from None


def _json(text: str, path: Path) -> list:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SetError(f"{path}: is not JSON ({error}). A list with an entry per line is a .jsonl.") from None
    if not isinstance(found, list):
        raise SetError(f"{path}: holds {type(found).__name__}, expected a list.")
    return found


def _is_text(value: object) -> bool:
    """Something to read that UTF-8 can write."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def _line(prompt: str) -> str:
    return " ".join(prompt.split())


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "_", text).strip("_")[-40:] or "subject"
