"""Where examples come from: a folder of subjects, a list, or WebDataset shards, each read into an index."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from pathlib import Path
from posixpath import normpath
from typing import NamedTuple

from ...common.files import DataError, file_problem, folded
from ...common.list_files import (
    NESTED,
    Confined,
    DataReader,
    digest,
    is_list,
    is_text,
    read_text,
    size_or_problem,
)
from ...common.picture_files import OTHER_PICTURES, PICTURES, left_out
from ...common.tar_files import TarMember, tar_members
from .index import Columns, Draft, Index, Say, load_columns

MOST_SHARDS = 1_000_000  # of one pattern
TEXTS = 2**20  # most bytes of a caption
EXTENSIONS = "|".join(suffix[1:] for suffix in PICTURES)
REFERENCE = re.compile(rf"(?:ref|reference)s?[._-]?(\d*)\.(?:{EXTENSIONS})")  # extension of a sample's reference
OTHER_CAPTIONS = (".caption", ".cap")  # by other trainers' programs
TARGET = re.compile(rf"(?:target\.)?(?:{EXTENSIONS})")
OTHERS = re.compile(rf"(?:(?:ref|reference)s?[._-]?\d*\.|target\.)?(?:{'|'.join(s[1:] for s in OTHER_PICTURES)})")
BRACES = re.compile(r"\{([^{}]*)\}")


class Source(NamedTuple):
    """Something that can be read into an index."""

    root: Path  # where its pictures' paths start
    key: str  # changes with whatever the samples are read from, pictures' contents left aside
    fill: Callable[[Draft, DataReader], None]
    confined: bool = False  # whether links must not lead out of the root


def find(source: Path, max_references: int) -> Source:
    """What a path names. Raises DataError."""
    shards = find_shards(source)
    if shards:
        return _shards(*shards, max_references)
    if is_list(source):
        return _list(source, max_references)
    return _folder(source)


def read_index(source: Path, max_references: int, cache: Path | None, say: Say) -> Index:
    """The index of a source: from `cache` if there is one, brought up to date, and written there.

    Raises DataError where the source cannot be read.
    """
    found = find(source, max_references)
    file = cache and cache / f"{digest(source.resolve(), max_references)[:40]}.safetensors"
    stored = file and load_columns(file, ("paths.data", "prompts.data", "subjects.data"))
    index = stored and _kept(found.root, source.name, *stored)
    if index is None or index.key != found.key:
        draft, reader, old = Draft(), DataReader(), index
        say(f"{source.name}: reading what is in it")
        found.fill(draft, reader)
        index = Index(found.root, source.name, found.key, draft.columns(reader.problems))
        if old is not None:
            index.adopt(old)

    def save() -> None:
        try:
            if file is not None:
                index.save(file)
        except OSError as error:
            say(f"{source.name}: its index cannot be kept ({error}), the next start reads it again")

    look = Confined(found.root) if found.confined else size_or_problem
    if not index.check(look, found.confined, say, save) and index.key != (stored or [None])[0]:
        save()
    return index


def _kept(root: Path, name: str, key: str, columns: Columns) -> Index | None:
    try:
        return Index(root, name, key, columns)
    except KeyError:  # columns are missing
        return None


# a list --------------------------------------------------------------------------------------------------------------


def _list(path: Path, max_references: int) -> Source:
    def fill(draft: Draft, reader: DataReader) -> None:
        for number, subject, prompt, names in reader.parsed(
            path, path.parent, target=True, max_references=max_references
        ):
            target, *references = map(draft.picture, names)
            draft.sample(subject, prompt, target, references, number)

    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            found.update(part)
    return Source(path.parent, found.hexdigest(), fill, confined=True)


# a folder of subjects ------------------------------------------------------------------------------------------------


class _Subject(NamedTuple):
    """A subject's folder."""

    folder: str  # its name, "" for the root
    name: str
    pictures: list[str]
    captions: dict[str, os.DirEntry]  # by the picture's name with .txt
    left_out: dict[str, str]  # by name, why
    problem: str = ""


def _folder(root: Path) -> Source:
    def fill(draft: Draft, reader: DataReader) -> None:
        for name in _tars(root):
            reader.problem(name, "is beside folders of pictures, expected shards in a folder of their own")
        for subject in _subjects(root):
            if subject.problem:
                reader.problem(subject.folder, subject.problem)
            for name, problem in sorted(subject.left_out.items()):
                reader.problem(f"{subject.name}/{name}", problem)
            if not subject.pictures and not subject.problem:
                reader.problem(subject.name, "0 picture(s), expected at least two of a subject")
            for name in subject.pictures:
                picture = draft.picture(f"{subject.folder}/{name}" if subject.folder else name)
                draft.sample(subject.name, _caption(reader, subject, name), picture)

    found = hashlib.sha256()
    for subject in _subjects(root):
        found.update(repr(subject._replace(captions={})).encode())
        for name, entry in sorted(subject.captions.items()):
            status = entry.stat()
            found.update(f"{name!r} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}".encode())
    return Source(root, found.hexdigest(), fill)


def _subjects(root: Path) -> Iterator[_Subject]:
    """The subjects in a folder: the pictures right in it, if any, then those of each folder in it by name."""
    try:
        pictures, captions, others, folders = _scan(root)
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error.strerror}), expected a folder of subjects.") from None
    if pictures or others:
        yield _Subject("", root.resolve().name, pictures, captions, others)
    for folder in folders:
        try:
            pictures, captions, others, inner = _scan(root / folder)
            others |= dict.fromkeys(inner, NESTED)
            yield _Subject(folder, folder, pictures, captions, others)
        except OSError as error:
            yield _Subject(
                folder, folder, [], {}, {}, f"cannot be read ({error.strerror}), expected a folder of pictures"
            )


def _scan(folder: Path) -> tuple[list[str], dict[str, os.DirEntry], dict[str, str], list[str]]:
    """Pictures, captions, what is left out and why, and folders in a folder, sorted by name."""
    pictures, captions, others, folders = [], {}, {}, []
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if entry.name[0] == "." and suffix != ".txt":
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif suffix.lower() in (".txt", *PICTURES) and not entry.is_file():
                others[entry.name] = file_problem(entry.path)
            elif suffix.lower() == ".txt":
                first = captions.setdefault(f"{stem}.txt", entry)
                if first is not entry:  # .txt and .TXT
                    captions[f"{stem}.txt"], other = sorted((first, entry), key=lambda one: one.name, reverse=True)
                    others[other.name] = f"is beside {captions[f'{stem}.txt'].name}, expected one caption of a picture"
            elif suffix.lower() in PICTURES:
                pictures.append(entry.name)
            elif problem := left_out(entry.name):
                others[entry.name] = problem
            elif suffix.lower() in OTHER_CAPTIONS:
                others[entry.name] = f"is {suffix.lower()}, expected .txt: rename it"
    _match(pictures, captions, others)
    return sorted(pictures), captions, others, sorted(folders)


def _match(pictures: list[str], captions: dict[str, os.DirEntry], others: dict[str, str]) -> None:
    """Gives pictures the captions whose names differ in case or in how accents are written; names those of none."""
    stems = {os.path.splitext(name)[0] for name in pictures}
    alone = {name for name in captions if name[:-4] not in stems}
    near: dict[str, list[str]] = {}
    for name in sorted(alone):
        near.setdefault(folded(name[:-4]), []).append(name)
    for stem in sorted(stems):
        if f"{stem}.txt" not in captions and (found := near.get(folded(stem))):
            captions[f"{stem}.txt"] = captions[found[0]]
            alone -= {*found[:1]}
    for name in alone:
        entry = captions.pop(name)
        if entry.name[0] != ".":
            others[entry.name] = "has no picture of its name"


def _caption(reader: DataReader, subject: _Subject, picture: str) -> str:
    name = os.path.splitext(picture)[0] + ".txt"
    if name not in subject.captions:
        return ""
    try:
        text = read_text(Path(subject.captions[name].path), TEXTS).strip()
    except DataError as error:
        text, problem = "", str(error)
    else:
        problem = "" if text else "is empty, expected a caption"
    if problem:
        reader.problem(f"{subject.name}/{name}", problem)
    return text


# WebDataset shards ---------------------------------------------------------------------------------------------------


def find_shards(source: Path) -> tuple[Path, list[str]] | None:
    """The folder that a source's shards are in, and their paths from it; None where it is no source of shards.

    A source of shards is a .tar, a folder of them, or a pattern such as shard-{000000..000099}.tar. Raises DataError.
    """
    if source.is_dir():
        names = _tars(source)
        if not names or any(len(one.pictures) > 1 and one.captions for one in _subjects(source)):
            return None  # a folder of subjects, as before there were shards
        return source, names
    if source.suffix.lower() != ".tar":
        return None
    if source.is_file():
        return source.parent, [source.name]
    braces = next((i for i, part in enumerate(source.parts) if "{" in part), len(source.parts) - 1)
    root = Path(*source.parts[:braces])
    names = list(islice(_expanded("/".join(source.parts[braces:])), MOST_SHARDS + 1))
    if len(names) > MOST_SHARDS:
        raise DataError(f"{source}: stands for more than {MOST_SHARDS:,} shards, expected fewer.")
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise DataError(
            f"{source}: {len(missing):,} of {len(names):,} shards are not there, the first is {missing[0]}. Expected a "
            ".tar, a folder of them, or a pattern such as shard-{000000..000099}.tar of files that are all there."
        )
    return root, names


def _tars(folder: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.name.lower().endswith(".tar") and e.is_file())


def _expanded(pattern: str) -> Iterator[str]:
    """The names that a pattern with {first..last} or {one,other} stands for, as a shell expands it."""
    braces = BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if abs(last - first) > MOST_SHARDS:
            raise DataError(f"{pattern}: stands for {abs(last - first):,} shards, expected at most {MOST_SHARDS:,}.")
        width = max(map(len, numbers.groups())) if "0" in (numbers[1][0], numbers[2][0]) else 0
        order = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        parts: list[str] = [f"{number:0{width}}" for number in order]
    else:
        parts = braces[1].split(",")
    for part in parts:
        yield from _expanded(pattern[: braces.start()] + part + pattern[braces.end() :])


def _shards(root: Path, names: list[str], max_references: int) -> Source:
    def fill(draft: Draft, reader: DataReader) -> None:
        for name in dict.fromkeys(names):
            draft.shards.append(name)
            keys: set[str] = set()
            named = (member for member in tar_members(root / name) if _key(member.member)[0])
            for key, members in groupby(named, lambda member: _key(member.member)[0]):
                if key in keys:  # a .tar to which files were appended
                    reader.problem(f"{name} {key}", "is there twice, expected all files of a key one behind the other")
                else:
                    _sample(draft, reader, name, key, list(members), max_references)
                keys.add(key)

    statuses = [(root / name).stat() for name in names]
    versions = [(status.st_size, status.st_mtime_ns, status.st_ctime_ns) for status in statuses]
    return Source(root, digest(list(zip(names, versions))), fill)


def _key(member: str) -> tuple[str, str]:
    """A member's key and extension, as WebDataset splits its name: at the first dot of its last part."""
    folder, slash, last = normpath(member).rpartition("/")  # tar writes ./NAME for what is in a folder
    stem, dot, extension = last.partition(".")
    meta = last.startswith("__")  # WebDataset's own members
    return (folder + slash + stem, extension.lower()) if stem and dot and not meta else ("", "")


def _sample(
    draft: Draft, reader: DataReader, shard: str, key: str, members: list[TarMember], max_references: int
) -> None:
    """Adds one sample of a shard, or a problem."""
    by_extension = {_key(member.member)[1]: member for member in members}
    targets = [member for extension, member in by_extension.items() if TARGET.fullmatch(extension)]
    references = sorted(
        (int(found[1] or 0), extension) for extension in by_extension if (found := REFERENCE.fullmatch(extension))
    )
    problem, prompt, subject = "", "", ""
    try:
        prompt, subject = _texts(by_extension)
        if len(by_extension) < len(members):
            problem = "has an extension twice, expected each once"
        elif others := [member for extension, member in by_extension.items() if OTHERS.fullmatch(extension)]:
            problem = f"has .{_key(others[0].member)[1]}, which {left_out(others[0].member)}"
        elif len(targets) != 1 and (prompt or targets or references):
            problem = f"has {len(targets)} pictures, expected one (.jpg, .png or .webp) with its .txt right behind it"
        elif len(references) > max_references:
            problem = f"has {len(references)} references, expected at most {max_references} (max_references)"
        elif references and not prompt:
            problem = "has references but no caption, expected a .txt, or a .json with prompt"
        elif targets and not references and not subject and "/" not in key:
            problem = (
                "has no references, expected some (.ref0.jpg, .ref1.jpg), or a subject to pair it by: in a .json, or "
                "as a folder in its name"
            )
    except RecursionError:
        problem = "has a .json that is nested too deeply"
    except ValueError as error:
        problem = str(error)
    if problem:
        reader.problem(f"{shard} {key}", problem)
    elif targets:
        numbers = [draft.member(shard, member) for member in (*targets, *(by_extension[e] for _, e in references))]
        draft.sample(subject or key.rpartition("/")[0] or key, prompt, numbers[0], numbers[1:])


def _texts(members: dict[str, TarMember]) -> tuple[str, str]:
    """Caption and subject of a sample. Raises ValueError."""
    for extension in ("txt", "json"):
        if extension in members and members[extension].size > TEXTS:
            raise DataError(f"has a .{extension} of {members[extension].size:,} bytes, expected at most {TEXTS:,}")
    values = json.loads(members["json"].read_bytes()) if "json" in members else {}
    if not isinstance(values, dict):
        raise DataError(f"has a .json with {type(values).__name__}, expected an object")
    prompt = next((values[name] for name in ("prompt", "caption") if values.get(name) is not None), "")
    if "txt" in members:
        prompt = members["txt"].read_bytes().decode("utf-8-sig").strip()
    for name, value in (("prompt", prompt), ("subject", values.get("subject"))):
        if value is not None and value != "" and not is_text(value):
            raise DataError(f"has a {name} {value!r:.60}, expected text")
    return prompt.strip(), values.get("subject") or ""
