"""The prompts and references of a benchmark, from the layouts in which they are published.

dreambench   dataset/SUBJECT/*.jpg beside prompts_and_classes.txt, as google/dreambooth publishes it
list         .json or .jsonl of objects with prompt and image_paths (UNO), or prompt and modulation (XVerseBench)
folder       SUBJECT/*.jpg of one's own, and a prompt list
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

from ...common.list_files import DataError, DataReader, Example, digest, is_list, is_text, read_json_list, read_text

DREAMBENCH = "prompts_and_classes.txt"
LIVE = ("cat", "dog")  # DreamBench's classes with prompts of their own
SEED_BITS = 48  # so that the editor, which counts in doubles, shows the same number


@dataclass(frozen=True)
class BenchmarkSet:
    """The items of a benchmark."""

    layout: str  # "dreambench" | "list" | "folder"
    root: Path  # folder of all references
    items: tuple[Example, ...]
    problems: tuple[str, ...]  # a line for each thing left out


@dataclass(frozen=True)
class Case:
    """One picture to be generated."""

    name: str  # of its file, without suffix; a function of what the picture is to show
    item: Example
    take: int  # which of the prompt's seeds, from 0
    seed: int


def read_set(
    source: Path, *, prompts: Path | None = None, images: Path | None = None, references: int = 1
) -> BenchmarkSet:
    """The items of a folder or list, its layout detected. Every reference is decoded once.

    Args:
        source: In one of this module's layouts; for "dreambench" also the folder above.
        prompts: For a folder of one's own: .txt with a prompt on each line (# begins a comment), or a .json list of
            them; `{subject}` is replaced by the subject's class (class.txt in its folder, else the folder's name).
        images: Folder that a list's paths start from; None: the list's own.
        references: Pictures of a subject with each prompt, the first by name (folders; lists name their own).

    Raises:
        DataError: Nothing is left.
    """
    source, reader = Path(source), DataReader(hint=" (--images names the folder that paths start from)")
    if is_list(source):
        layout, root = "list", Path(images) if images else source.parent
        items = (replace(e, prompt=" ".join(e.prompt.split())) for e in reader.entries(source, root))
    elif prompts:
        layout, root, items = "folder", source, _own_folder(reader, source, read_prompts(Path(prompts)), references)
    else:
        root = next((folder for folder in (source, source / "dataset") if (folder / DREAMBENCH).is_file()), None)
        if root is None:
            raise DataError(f"{source}: has no {DREAMBENCH} and no prompts were given: name a prompt list (--prompts).")
        layout, items = "dreambench", _dreambench(reader, root, references)
    first: dict[tuple, Example] = {}
    for item in items:
        known = first.setdefault((item.subject, item.prompt, item.references), item)
        if known is not item:
            reader.problem(item.source, f"repeats {known.source} (more pictures of a prompt: --seeds)")
    reader.require(first, source, "draw", "subjects with readable pictures, or a list with prompt and image_paths")
    return BenchmarkSet(layout, root, tuple(first.values()), tuple(reader.problems))


def cases(items: Sequence[Example], *, seeds: int = 1, seed: int = 0, limit: int = 0) -> list[Case]:
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
            number = int(digest(seed, item.subject, item.prompt, take), 16) % 2**SEED_BITS
            mark = digest(number, item.subject, item.prompt, *(digests[path] for path in item.references))[:10]
            found.append(Case(f"{_slug(item.subject)}-{_slug(item.prompt)}-{mark}-{take}", item, take, number))
    return found


def read_prompts(path: Path) -> list[str]:
    """A prompt on each line, or a .json list. Raises DataError where there is none."""
    if path.suffix.lower() == ".json":
        found = read_json_list(path)
    else:
        found = [line for line in read_text(path).splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise DataError(f"{path}: holds no prompt, expected one on each line.")
    for entry in found:
        if not is_text(entry):
            raise DataError(f"{path}: holds {entry!r:.60}, expected a list of texts.")
    return [entry.strip() for entry in found]


def _items(reader: DataReader, subject: str, prompts: list[str], pictures: list[Path], count: int) -> Iterator[Example]:
    """Each prompt with the subject's first readable pictures."""
    if len(pictures) < count:
        return reader.problem(subject, f"{len(pictures)} readable picture(s), expected {count}")
    for number, prompt in enumerate(prompts, 1):
        yield Example(subject, prompt, tuple(pictures[:count]), source=f"{subject} prompt {number}")


def _dreambench(reader: DataReader, root: Path, count: int) -> Iterator[Example]:
    classes, prompts = _published(reader, root / DREAMBENCH)
    for name in sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."):
        if name not in classes:
            reader.problem(name, f"is not among the classes of {DREAMBENCH}")
    for folder, sizes in reader.subjects(root, classes):
        kind = classes[folder.name]  # and no rare token: the references show who it is
        texts = [prompt.replace("{0} ", "").replace("{1}", kind) for prompt in prompts[kind in LIVE]]
        yield from _items(reader, folder.name, texts, list(sizes), count)


def _published(reader: DataReader, path: Path) -> tuple[dict[str, str], tuple[list[str], list[str]]]:
    """Class by subject, and the prompts for objects and for live subjects, of DreamBench's text file."""
    classes: dict[str, str] = {}
    prompts: tuple[list[str], list[str]] = ([], [])
    part: dict | list | None = None  # what the lines belong to
    for number, line in enumerate(read_text(path).splitlines(), 1):
        where, line = f"{path.name} line {number}", line.strip().rstrip(",")
        if line.lower().endswith("prompts"):
            part = prompts["live" in line.lower()]
        elif line in ("subject_name,class", "Classes"):
            part = classes
        elif not line or line in ("]", "prompt_list = ["):
            continue
        elif part is classes:
            subject, _, kind = (piece.strip() for piece in line.partition(","))
            if not subject or not kind or PureWindowsPath(subject).name != subject:
                reader.problem(where, f"is {line!r:.60}, expected SUBJECT,CLASS")
            else:
                classes[subject] = kind
        else:
            quoted = re.fullmatch(r"(['\"])(.*)\1\.format\(unique_token, class_token\)", line)
            if part is None or not quoted or "{1}" not in quoted[2]:
                expected = "'a {0} {1} ...'.format(unique_token, class_token)"
                reader.problem(where, f"is {line!r:.60}, expected {expected}")
            else:
                part.append(quoted[2])
    for name, found in (("classes", classes), ("object prompts", prompts[0])):
        if not found:
            raise DataError(f"{path}: holds no {name}, expected the file as google/dreambooth publishes it.")
    if not prompts[1] and any(kind in LIVE for kind in classes.values()):
        reader.problem(path.name, f"holds no live subject prompts, expected some for {' and '.join(LIVE)}")
    return classes, prompts


def _own_folder(reader: DataReader, root: Path, prompts: list[str], count: int) -> Iterator[Example]:
    for folder, sizes in reader.subjects(root):
        name, path, kind = folder.resolve().name, folder / "class.txt", ""
        try:
            kind = read_text(path).strip() if path.is_file() else ""
        except DataError as error:
            reader.problem(name, str(error))
        kind = kind or name.replace("_", " ").replace("-", " ").strip()
        texts = [prompt.replace("{subject}", kind) for prompt in prompts]
        yield from _items(reader, name, texts, list(sizes), count)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "_", text).strip("_")[-40:] or "subject"
