"""The folder of a run, whose files are complete, or known not to be, however the run ends.

It holds pictures that name their case, `ledger.jsonl` with a line for each case, and `run.json` about the workflow.
"""

import io
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...common.files import DataError, file_problem, read_bytes, save_text
from ...common.locks import lock
from ...common.picture_files import open_picture
from ...common.untrusted_json import parse_json, read_json
from .sets import Case

MARK = "subject_benchmark"  # key of the case among a PNG's texts
MOST_DAMAGED = 100_000  # lines that cannot be read: it is no ledger
LONGEST, LONGEST_LINE = 2**30, 2**20  # bytes of a ledger, and of one of its lines
LEDGER, RUN = "ledger.jsonl", "run.json"


class RunError(ValueError):
    """A run that cannot begin; the text says what to do."""


class Ledger:
    """A line for each case of a run's folder, appended at once and whole; the last line of a name counts."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / LEDGER
        self.lines: dict[str, dict] = {}
        self.damaged = 0  # lines that cannot be read
        if os.path.lexists(self.path) and (problem := file_problem(self.path)):
            raise RunError(f"{self.path} {problem} Remove it, or use another --out.")
        for line in read_bytes(self.path, LONGEST).split(b"\n") if self.path.is_file() else ():
            try:
                entry = parse_json(line, longest=LONGEST_LINE) if line.strip() else None
                if entry is not None:
                    if not isinstance(entry["name"], str):
                        raise TypeError
                    self.lines[entry["name"]] = entry
            except (ValueError, TypeError, KeyError):  # cut off by a full disk or a kill
                self.damaged += 1
                if self.damaged > MOST_DAMAGED:
                    raise RunError(
                        f"{self.path} has over {MOST_DAMAGED:,} lines that name no case, expected a run's. Remove it, "
                        "or use another --out."
                    ) from None

    def add(self, entry: dict) -> None:
        """Appends a line. Raises OSError where it was not written whole."""
        self.lines[entry["name"]] = entry
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(file, line) != len(line):
                raise OSError(f"{self.path}: the line was not written whole, is the disk full?")
            os.fsync(file)
        finally:
            os.close(file)

    def keep_done(self, wanted: Sequence[Case]) -> None:
        """Leaves one line for each picture that is there, so that failures and lost pictures are tried again.

        A picture of a wanted case without a line, since its run was killed in between, gets its line.
        """
        done = {name: entry for name, entry in self.lines.items() if self._has_picture(entry)}
        for case in wanted:
            path = self.folder / f"{case.name}.png"
            if case.name not in done and (found := read_mark(path)):
                done[case.name] = found | {"status": "done", "picture": path.name}
        self.lines = done
        self.sort(wanted)

    def sort(self, wanted: Sequence[Case]) -> None:
        """Puts the lines into the order of the cases, whatever server was the faster; others come first."""
        place = {case.name: number for number, case in enumerate(wanted)}
        self.lines = dict(sorted(self.lines.items(), key=lambda line: place.get(line[0], -1)))
        save_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines.values()))

    def _has_picture(self, entry: dict) -> bool:
        name = entry.get("picture")
        return (
            entry.get("status") == "done" and isinstance(name, str) and not file_problem(self.folder / Path(name).name)
        )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Refuses a second run in the same folder."""
        with lock(self.folder / ".lock") as held:
            if not held:
                raise RunError(f"{self.folder}: another run writes to it; wait for it, or use another --out.")
            yield


def check_run(out: Path, facts: dict) -> None:
    """Writes run.json, since one folder holds the pictures of one workflow. Raises RunError for another one's."""
    path = out / RUN
    try:
        found = read_json(path) if os.path.lexists(path) else facts
        if found["workflow_digest"] != facts["workflow_digest"]:
            raise RunError(
                f"{out}: holds the pictures of another workflow or of other settings ({found.get('workflow')!s:.200})."
                f" Use another --out, or remove {path.name} if they may be mixed."
            )
    except (DataError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise RunError(
            f"{path}: is damaged ({reason}). Remove it if the folder's pictures are this workflow's."
        ) from None
    save_text(path, json.dumps(facts, indent=1, ensure_ascii=False))


def with_texts(data: bytes, texts: dict[str, str]) -> bytes:
    """The PNG with these texts where it has none of that name. Raises ValueError where it is no whole PNG."""
    try:
        with open_picture(io.BytesIO(data)) as picture:
            picture.load()
            kind, found = picture.format, getattr(picture, "text", {})
    except Exception as error:  # Pillow's readers raise nearly everything on damaged files
        raise ValueError(f"is no picture: {error}") from error
    if kind != "PNG":
        raise ValueError(f"is {kind}, expected PNG")
    chunks = b""
    for name, text in texts.items():
        if name not in found:
            chunk = b"iTXt" + name.encode("latin-1") + b"\0\0\0\0\0" + text.encode("utf-8", "backslashreplace")
            chunks += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    end = data.rindex(b"IEND") - 4
    return data[:end] + chunks + data[end:]


def read_mark(path: Path) -> dict | None:
    """The case that a picture names; None where there is none."""
    try:
        if file_problem(path):
            return None
        with open_picture(path) as picture:
            picture.load()
            found = parse_json(picture.text[MARK])
    except Exception:  # missing, truncated, or somebody else's: it is generated again
        return None
    return found if isinstance(found, dict) and found.get("name") == path.stem else None
