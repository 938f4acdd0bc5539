"""Which pictures and prompts a run trains on: a folder of subjects, or a list as UNO's, split by subject."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...common.list_files import DataError, DataReader, Example, digest, is_list, read_text


@dataclass(frozen=True)
class Collection:
    """The examples of a run."""

    training: tuple[Example, ...]
    validation: tuple[Example, ...]
    problems: tuple[str, ...]  # a line for each picture or entry left out
    fingerprint: str  # of the examples, their order, split and files


def read_data(
    source: Path, *, validation: float | Path = 0.1, seed: int = 0, max_references: int = 4, pairs_per_target: int = 4
) -> Collection:
    """The examples of a folder of subjects or of a .json or .jsonl list. Every picture is decoded once.

    Args:
        source: Folder SUBJECT/*.{jpg,png,webp}, where a picture with a caption (the .txt of its name) is a target and
            other pictures of the subject are its references; pictures right in the folder are one subject. Or a list of
            objects with `prompt`, `image_paths` (or `image_path`), `image_tgt_path` and, optionally, `subject` (else
            the first reference's path); paths start from the list's folder and stay in it.
        validation: Share of the subjects held out, see `held_out`, or a source of its own.
        seed: Of the split and of the choice of references.
        max_references: Most references of a list's entry.
        pairs_per_target: Examples for each target of a folder, each with another reference.

    Raises:
        DataError: Nothing is left to train on or, in a validation source, to hold out.
    """
    options = (seed, max_references, pairs_per_target)
    examples, root, reader = _read(Path(source), *options)
    if isinstance(validation, (str, Path)):
        trained, targets = examples, {example.target.resolve() for example in examples}
        found, other, other_reader = _read(Path(validation), *options)
        held = [example for example in found if example.target.resolve() not in targets]
        if not held:
            raise DataError(f"{validation}: nothing to hold out, every target in it is trained on. Expected others.")
        reader.problems += other_reader.problems
        for path in (example.target for example in found if example.target.resolve() in targets):
            reader.problem(f"{path.parent.name}/{path.name}", "is a target to train on too, so it cannot be held out")
    else:
        other, out = root, held_out(examples, validation, seed, root)
        trained = [example for example, is_out in zip(examples, out) if not is_out]
        held = [example for example, is_out in zip(examples, out) if is_out]
    lines = [*_lines("training", trained, root), *_lines("validation", held, other)]
    return Collection(tuple(trained), tuple(held), tuple(reader.problems), digest("\n".join(lines)))


def held_out(examples: Sequence[Example], share: float, seed: int, root: Path) -> list[bool]:
    """For each example whether it is held out.

    Each subject is, with probability `share`, by a hash of its name, so that a new subject does not move the others;
    but one at least is, and one is not (of the lowest and highest hash). Subjects that share a picture go together, the
    largest such group is trained on; where there is but one group, subjects are split, and with one subject, targets.
    """
    subjects = [example.subject for example in examples]
    targets = [example.target.relative_to(root).as_posix() for example in examples]
    for names in (_linked(examples), subjects, targets) if share > 0 else ():
        groups = sorted(set(names), key=lambda name: (_number(seed, name), name))
        if len(groups) > 1:
            sizes = Counter(name for name, _ in set(zip(names, subjects)))
            groups.remove(max(reversed(groups), key=lambda name: sizes[name]))
            out = {name for name in groups if _number(seed, name) < share} or {groups[0]}
            return [name in out for name in names]
    return [False] * len(examples)


def _read(source: Path, seed: int, max_references: int, pairs: int) -> tuple[list[Example], Path, DataReader]:
    reader, root = DataReader(), source.parent if is_list(source) else source
    if root == source:
        found = list(_folder(reader, root, seed, pairs))
    else:
        found = list(reader.entries(source, root, target=True, max_references=max_references))
    expected = "a folder of subjects with a .txt beside each target, or a list with prompt, image_paths, image_tgt_path"
    reader.require(found, source, "train on", expected)
    return found, root, reader


def _folder(reader: DataReader, root: Path, seed: int, pairs: int) -> Iterator[Example]:
    for folder, sizes in reader.subjects(root):
        name = (folder.resolve() if folder == root else folder).name
        if len(sizes) < 2:
            reader.problem(name, f"{len(sizes)} picture(s), expected at least two of a subject")
            continue
        captions = {path: _caption(reader, path) for path in sizes}
        if not any(captions.values()):
            reader.problem(name, "no picture has a caption, expected a .txt beside each target")
        for target in (path for path in sizes if captions[path]):
            others = [path for path in sizes if path != target]
            others.sort(key=lambda path: (_number(seed, name, target.name, path.name), path.name))
            for other in others[:pairs]:
                yield Example(name, captions[target], (other,), target, sizes[target], (sizes[other],))


def _caption(reader: DataReader, picture: Path) -> str:
    path, where = picture.with_suffix(".txt"), f"{picture.parent.name}/{picture.stem}.txt"
    try:
        if not path.is_file():
            return ""
        return read_text(path).strip() or reader.problem(where, "is empty, expected a caption") or ""
    except (OSError, DataError) as error:
        return reader.problem(where, str(error)) or ""


def _linked(examples: Sequence[Example]) -> list[str]:
    """For each example one name for all subjects that its own shares pictures with, directly or through others."""
    leader: dict[str | Path, str | Path] = {}

    def find(thing: str | Path) -> str | Path:
        while leader.setdefault(thing, thing) != thing:
            leader[thing] = thing = leader[leader[thing]]
        return thing

    for example in examples:
        for path in (example.target, *example.references):
            leader[find(path)] = find(example.subject)
    first = {find(subject): subject for subject in sorted({example.subject for example in examples}, reverse=True)}
    return [first[find(example.subject)] for example in examples]


def _number(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    return int(digest(*parts)[:13], 16) / 16**13


def _lines(side: str, examples: Sequence[Example], root: Path) -> Iterator[str]:
    """What the fingerprint is made of."""
    for example in examples:
        yield f"{side}\0{example.subject}\0{example.prompt}"
        for path in (example.target, *example.references):
            status = path.stat()
            yield f"{path.relative_to(root).as_posix()}\0{status.st_size}\0{status.st_mtime_ns}"
