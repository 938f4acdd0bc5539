"""Which pictures and prompts a run trains on, split by subject; an example is made when it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...common.files import DataError
from ...common.list_files import DataReader, digest
from .examples import Examples, find_examples
from .index import Columns, Index, Strings, load_columns, save_columns
from .sources import read_index
from .split import fingerprint, held_out, outside

EXPECTED = (
    "a folder of subjects with a .txt beside each target, a list with prompt, image_paths, image_tgt_path, or shards"
)
ROWS = ("sample", "references", "ends")  # columns of one side


@dataclass(frozen=True)
class Collection:
    """The examples of a run."""

    training: Examples
    validation: Examples
    problems: tuple[str, ...]  # a line for each picture or entry left out
    fingerprint: str  # of the examples, their order, split and files
    content: str = ""  # of the pictures themselves, see index.CONTENT


def read_data(
    source: Path,
    *,
    validation: float | Path = 0.1,
    seed: int = 0,
    max_references: int = 4,
    pairs_per_target: int = 4,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Collection:
    """The examples of a folder of subjects, of a .json or .jsonl list, or of WebDataset shards.

    Pictures are read once: decoded whole where there are not more than `index.DECODED`, else their headers, and each is
    decoded when it is first drawn (`Examples.damage`).

    Args:
        source: Folder SUBJECT/*.jpg (see `picture_files.PICTURES`), where a picture with a caption (the .txt of its
            name) is a target and other pictures of the subject are its references; pictures right in the folder are one
            subject. Or a list of objects with `prompt`, `image_paths` (or `image_path`), `image_tgt_path` and,
            optionally, `subject` (else the first reference's path); paths start from the list's folder and stay in it.
            Or shards, see `sources.find_shards`, with samples of KEY.jpg, KEY.txt and KEY.ref0.jpg, KEY.ref1.jpg ...
        validation: Share of the subjects held out, see `held_out`, or a source of its own.
        seed: Of the split and of the choice of references.
        max_references: Most references of a list's entry.
        pairs_per_target: Examples for each target without references of its own, each with another reference.
        cache: Folder where an index of the source is kept; None keeps none.
        say: Gets lines about the progress, or "", about once a second; may raise to interrupt.

    Raises:
        DataError: Nothing is left to train on or, in a validation source, to hold out.
    """
    source, by_source = Path(source), isinstance(validation, (str, Path))
    index = read_index(source, max_references, cache, say)
    other = read_index(Path(validation), max_references, cache, say) if by_source else index
    key = digest(index.fingerprint(), other.fingerprint(), validation, seed, pairs_per_target)
    options = (source.resolve(), validation, seed, max_references, pairs_per_target)
    file = cache and cache / f"split-{digest(*options)[:40]}.safetensors"
    stored = file and load_columns(file)
    if stored is None or not stored[0].startswith(key):
        say(f"{index.name}: choosing pairs and what is held out")
        stored = _split(source, index, other, validation, seed, pairs_per_target)
        stored = key + stored[0], stored[1]
        try:
            if file is not None:
                save_columns(file, *stored)
        except OSError as error:
            say(f"{index.name}: its split cannot be kept ({error}), the next start makes it again")
    columns = stored[1]
    trained, held = (
        Examples(part, *(columns[f"{side}.{name}"] for name in ROWS))
        for side, part in (("training", index), ("validation", other))
    )
    problems = Strings(columns["problems.data"], columns["problems.ends"])
    content = digest(*(part.content.tobytes().hex() for part in ((index, other) if by_source else (index,))))
    return Collection(trained, held, tuple(problems), stored[0][len(key) :], content)


def _split(
    source: Path, index: Index, other: Index, validation: float | Path, seed: int, pairs: int
) -> tuple[str, Columns]:
    """The fingerprint of both sides, and their columns. Raises DataError where one has nothing."""
    reader = DataReader()
    examples = find_examples(index, reader, seed, pairs)
    reader.require(examples, source, "train on", EXPECTED)
    if isinstance(validation, (str, Path)):
        other_reader, trained = DataReader(), examples
        found = find_examples(other, other_reader, seed, pairs)
        other_reader.require(found, Path(validation), "train on", EXPECTED)
        new = outside(found, examples)
        if not new.any():
            raise DataError(f"{validation}: nothing to hold out, every target in it is trained on. Expected others.")
        held = found.where(new)
        reader.problems += other_reader.problems
        for example in found.where(~new):
            path = example.target
            name = path.name if len(other.shards) else f"{path.parent.name}/{path.name}"
            reader.problem(name, "is a target to train on too, so it cannot be held out")
    else:
        out = held_out(examples, validation, seed)
        trained, held = examples.where(~out), examples.where(out)
    problems = Strings.of(reader.problems)
    columns = {"problems.data": problems.data, "problems.ends": problems.ends}
    for side, part in (("training", trained), ("validation", held)):
        columns |= {f"{side}.{name}": getattr(part, name) for name in ROWS}
    return fingerprint(trained, held), columns
