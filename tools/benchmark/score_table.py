"""The paper's table from score files, a row for each system. What was not measured stays empty.

Score files are the JSON and CSV of Copy-Paste Report, the JSON of Identity Scores, and .csv or .jsonl of one's own with
a row for each picture and any of the columns azimuth_difference, polar_difference, counted, DINO-I, CLIP-I, CLIP-T,
backbone. Cosines of two backbones do not compare, so a metric is never pooled over them: a file with two backbones
gives a row for each, and files of one name that were measured by different ones are refused.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite, isnan
from pathlib import Path

from ...common.files import DataError, read_bytes
from ...common.intervals import mean_interval
from ...common.markdown import markdown
from ...common.untrusted_json import parse_json
from ...evaluation.copy_paste.metrics import copy_paste_from_differences

SUFFIXES = (".csv", ".json", ".jsonl")
POSE, IDENTITY = ("azimuth", "polar", "average_recall"), ("DINO-I", "CLIP-I", "CLIP-T")
METRICS = (*POSE, *IDENTITY)
LONGEST = 256 * 2**20  # bytes of a score file; a million pictures have 100 MB
OTHERS = ("ledger.jsonl", "run.json")  # of a run's folder
# The paper's own table, of which we have a transcription by a third party.
PAPER = {
    "OmniGen2": (22.6, 7.0, 0.486, 0.7323, 0.8268, 0.3185),
    "DreamO": (22.1, 9.6, 0.372, 0.7537, 0.8356, 0.3086),
    "USO": (20.8, 9.6, 0.401, 0.7478, 0.8263, 0.3213),
    "Qwen-Image": (17.6, 7.8, 0.460, 0.7317, 0.8261, 0.3158),
    "UNO": (None, None, None, 0.7484, 0.8354, 0.3040),
    "the paper": (25.7, 10.4, 0.349, 0.7482, 0.8443, 0.3010),
}
Metric = tuple[float, float, float]  # mean and 95 % interval; NaN where it is unknown


class ScoreError(ValueError):
    """A score file that cannot be read; the text says what was found."""


@dataclass
class System:
    """The values of one row's pictures."""

    name: str
    pose: list[tuple[float, float, bool]] = field(default_factory=list)  # azimuth, polar difference; whether it counts
    identity: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in IDENTITY})
    measured_by: dict[str, dict[str, str]] = field(default_factory=dict)  # what measured each metric, as recorded
    first: dict[str, str] = field(default_factory=dict)  # the file that records it
    beside: dict[str, System] = field(default_factory=dict)  # rows of further backbones in the same files

    def measured(self, metric: str, what: dict[str, str], where: str) -> None:
        """Records what measured a metric. Raises ScoreError where its values so far come from something else."""
        known, there = self.measured_by.setdefault(metric, what), self.first.setdefault(metric, where)
        parts = [key for key in {**known, **what} if known.get(key) != what.get(key)]
        if parts:
            found, expected = (
                ", ".join(f"{key} {of.get(key) or 'not recorded'}" for key in parts) for of in (what, known)
            )
            raise ScoreError(
                f"{where}: {metric} of {self.name} was measured by another model or in another way: {found}; expected "
                f"{expected}, as in {there}. Such values do not compare: give these files a name of their own "
                "(NAME=PATH)."
            )

    def add(self, metric: str, values: Sequence[float], what: dict[str, str], where: str, seen: dict) -> None:
        """Adds an identity metric's cosines, one for each picture, measured by the backbone `what` (see `_backbone`).

        Those by another backbone than the file's first, which `seen` records by metric, get a row of their own.
        """
        row = self
        if seen.setdefault(metric, what) != what:
            row = self.beside.setdefault(_label(what), System(f"{self.name}, by {_label(what)}"))
        row.measured(metric, what, where)
        row.identity[metric] += values

    def metrics(self) -> dict[str, Metric]:
        """Those that were measured."""
        found = {name: mean_interval(values) for name, values in self.identity.items() if values}
        if self.pose:
            report = copy_paste_from_differences(*zip(*self.pose))
            if report.count:
                found |= {name: (getattr(report, name), *report.intervals[name]) for name in POSE}
        return found


def read_systems(sources: Sequence[str]) -> list[System]:
    """A system for each name, followed by one for each further backbone in its files.

    A source is NAME=PATH, or PATH, which then gives the name; PATH is a score file or a run's folder. Raises ScoreError
    where a file is damaged, or files of one name hold a metric that was measured in different ways.
    """
    systems: dict[str, System] = {}
    for source in sources:
        name, equals, path = source.partition("=")
        path = Path(path if equals and not Path(source).exists() else source)
        name = name if equals and path != Path(source) else path.resolve().stem
        files = _files(path)
        if not files:
            raise ScoreError(f"{path}: holds no score file, expected {', '.join(SUFFIXES)} of the score nodes.")
        system = systems.setdefault(name, System(name))
        for file in files:
            _read_file(file, system)
    return [row for system in systems.values() for row in (system, *system.beside.values())]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ScoreError(f"{path}: there is no such file or folder.")
    found = sorted(f for folder in (path, path / "scores") if folder.is_dir() for f in folder.iterdir())
    found = [f for f in found if f.suffix.lower() in SUFFIXES and f.name not in OTHERS and f.name[0] != "."]
    return [f for f in found if f.suffix != ".csv" or f.with_suffix(".json") not in found]  # the same report twice


def _read_file(path: Path, system: System) -> None:
    """Adds a score file's values to a system."""
    try:
        text = read_bytes(path, LONGEST).decode("utf-8-sig")
        if path.suffix.lower() == ".json":
            _read_report(parse_json(text, None, LONGEST), str(path), system)
            return
        if path.suffix.lower() == ".jsonl":
            rows = [parse_json(line, None, LONGEST) for line in text.split("\n") if line.strip()]
        else:
            rows = _csv_rows(text)
    except (DataError, UnicodeDecodeError, csv.Error) as error:
        raise ScoreError(f"{path}: cannot be read as scores ({error}), expected a number for each value.") from None
    seen = {}
    if not sum(_read_row(row, f"{path} line {number}", system, seen) for number, row in enumerate(rows, 1)):
        raise ScoreError(
            f"{path}: has no column of {', '.join(['azimuth_difference', 'polar_difference', *IDENTITY])}."
        )


def _csv_rows(text: str) -> list[dict]:
    """The rows of a table with names in its first line. Raises DataError."""
    reader = csv.DictReader(text.splitlines(), restkey="")
    names = [_plain(name) for name in reader.fieldnames or ()]
    if twice := [(name, count) for name, count in Counter(names).items() if name and count > 1]:
        raise DataError(f"it has {twice[0][1]} columns of the name {twice[0][0]!r:.60}, expected one")
    rows = list(reader)
    for number, row in enumerate(rows, 2):
        if "" in row and row[""] and "" not in names:
            raise DataError(f"line {number} has {len(names) + len(row[''])} values, expected {len(names)}")
    return rows


def _read_report(report: object, where: str, system: System) -> None:
    """Adds a JSON report of Copy-Paste Report or Identity Scores."""
    if isinstance(report, dict) and isinstance(report.get("pairs"), list):
        what = {"orientation model": report.get("orientation_model"), "threshold": report.get("threshold")}
        for number, row in enumerate(report["pairs"], 1):
            _read_row(row, f"{where} pair {number}", system, {}, _recorded(what))
    elif isinstance(report, dict) and isinstance(report.get("figures"), list):
        seen = {}
        for row in report["figures"]:
            name = row.get("figure") if isinstance(row, dict) else None
            if name in IDENTITY:
                what = _backbone(row.get("backbone"), row.get("preprocessing"))
                found = row.get("per_output")
                if not isinstance(found, list):
                    raise ScoreError(f"{where}: per_output of {name} is {found!r:.60}, expected a list of numbers.")
                values = [_cosine(value, f"{where} {name}", name) for value in found]
                system.add(name, values, what, where, seen)
    else:
        raise ScoreError(f"{where}: holds no metrics, expected the JSON of Copy-Paste Report or of Identity Scores.")


def _read_row(row: object, where: str, system: System, seen: dict, pose_by: dict[str, str] | None = None) -> bool:
    """Adds one picture's values; whether there were any. pose_by: what measured the angles, where it is recorded."""
    if not isinstance(row, dict):
        raise ScoreError(f"{where}: is {type(row).__name__}, expected columns with names.")
    given = {key: value for key, value in row.items() if value not in (None, "")}
    row = {_plain(key): value for key, value in given.items()}
    if len(row) < len(given):
        raise ScoreError(f"{where}: has two values of one name among {', '.join(map(str, given))[:200]}, expected one.")
    if row.get("set", "outputs") != "outputs":
        return True  # the floor of Copy-Paste Report
    found = False
    if "azimuthdifference" in row and "polardifference" in row:
        pose = [_number(row[key], where) for key in ("azimuthdifference", "polardifference")]
        if not (0 <= pose[0] <= 180 and 0 <= pose[1] <= 180):
            raise ScoreError(f"{where}: differences are {pose}, expected degrees from 0 to 180.")
        for metric in POSE:
            system.measured(metric, pose_by or {}, where)
        system.pose.append((*pose, _number(row.get("counted", 1), where) > 0))
        found = True
    for name in IDENTITY:
        if _plain(name) in row:
            value = _cosine(row[_plain(name)], where, name)
            system.add(name, [value], _backbone(row.get("backbone"), row.get("preprocessing")), where, seen)
            found = True
    return found


def score_table(systems: Sequence[System], paper: bool = False) -> str:
    """Markdown: a row for each system, cells "mean (low to high)", empty where nothing was measured."""
    lines = [["", "azimuth", "polar", "average recall", *IDENTITY, "pictures"]]
    for system in systems:
        metrics = system.metrics()
        counts = {sum(counted for _, _, counted in system.pose), *(len(values) for values in system.identity.values())}
        counts = sorted(counts - {0}) or [0]
        cells = [_cell(name, metrics.get(name)) for name in METRICS]
        lines.append([system.name, *cells, " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))])
    if paper:
        for name, values in PAPER.items():
            cells = ["" if value is None else f"{value:.{_digits(key)}f}" for key, value in zip(METRICS, values)]
            lines.append([f"{name}, as published", *cells, ""])
    text = [markdown(lines), ""]
    text.append("Azimuth and polar difference in degrees, higher: more varied; recall, lower: less copied.")
    text.append("95 % intervals in brackets; they take the pictures to be independent. Empty: not measured.")
    for system in systems:
        labels: dict[str, list[str]] = {}
        for metric, what in system.measured_by.items():
            if what:
                labels.setdefault(_label(what), []).append(metric.replace("_", " "))
        by = [f"{', '.join(metrics)} by {label}" for label, metrics in labels.items()]
        if system.pose:
            counted = sum(row[2] for row in system.pose)
            by.append(f"{counted} of {len(system.pose)} pairs count for azimuth, polar and recall")
        text += [f"{system.name}: {'; '.join(by)}."] if by else []
    if paper:
        text.append("As published: arXiv 2605.26111 (identity metrics: DreamBench), in a third party's transcription.")
    return "\n".join(text)


def as_json(systems: Sequence[System]) -> dict:
    """{system: {metric: {mean, low, high}}}; an unknown bound is null."""
    return {
        system.name: {
            name: {key: None if isnan(v) else v for key, v in zip(("mean", "low", "high"), metric)}
            for name, metric in system.metrics().items()
        }
        for system in systems
    }


def _backbone(backbone: object, preprocessing: object = None) -> dict[str, str]:
    """What identifies a backbone: the record of loaders/embedders.py, with keys "text ..." for its text tower."""
    record = dict(backbone) if isinstance(backbone, dict) else {"name": backbone}
    text = record.pop("text", None)
    parts = record | {f"text {key}": value for key, value in (text if isinstance(text, dict) else {"": text}).items()}
    return _recorded(parts | {"preprocessing": preprocessing})


def _recorded(parts: dict) -> dict[str, str]:
    """Without what is not recorded."""
    return {key.strip(): str(value) for key, value in parts.items() if value not in (None, "")}


def _label(what: dict[str, str]) -> str:
    """For people: models, files and threshold; all that there is where none of them is recorded."""
    names = [what[key] for key in ("name", "file", "orientation model") if key in what]
    text = [what[key] for key in ("text name", "text file", "text") if key in what]
    names += [f"text by {', '.join(text)}"] if text else []
    names += [f"threshold {what['threshold']}"] if "threshold" in what else []
    return ", ".join(names or what.values()) or "a backbone that is not recorded"


def _cell(name: str, metric: Metric | None) -> str:
    if metric is None:
        return ""
    mean, low, high = (f"{value:.{_digits(name)}f}" for value in metric)
    return mean if isnan(metric[1]) else f"{mean} ({low} to {high})"


def _digits(name: str) -> int:
    return {"azimuth": 1, "polar": 1, "average_recall": 3}.get(name, 4)


def _plain(name: object) -> str:
    return "".join(c for c in str(name).lower() if c.isalnum())


def _cosine(value: object, where: str, name: str) -> float:
    number = _number(value, where)
    if not -1.001 <= number <= 1.001:  # rounding may lead out of it
        raise ScoreError(f"{where}: {name} is {number:g}, expected a cosine (100 times as much in some tables).")
    return number


def _number(value: object, where: str) -> float:
    try:
        number = float("nan" if isinstance(value, bool) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not isfinite(number):
        raise ScoreError(f"{where}: holds {value!r:.40}, expected a number. Leave pictures without a value out.")
    return number
