"""The copy-paste metrics as text, CSV and JSON: outputs and floor, with and without gating."""

import csv
import io
import json
from collections.abc import Iterator
from math import isnan

from ...common.intervals import share_interval
from ...common.markdown import markdown
from .metrics import RECALL, CopyPasteMetrics, Pairs

SEEN, DIFFERENCES = ("azimuth", "polar", "confidence"), ("azimuth_difference", "polar_difference")
# set: "outputs" = references and outputs, "floor" = references and their own mirrored, re-cropped selves;
# counted: 1 where every confidence reaches the threshold
COLUMNS = ("set", "pair", *(f"reference_{name}" for name in SEEN), *SEEN, *DIFFERENCES, "counted")


def rows(outputs: Pairs, floor: Pairs) -> list[tuple[str, CopyPasteMetrics]]:
    """The four lines of the table, by name."""
    both = ("outputs", outputs.report), ("floor", floor.report)
    return [row for name, report in both for row in ((name, report), (f"{name}, ungated", report.ungated))]


def report_text(outputs: Pairs, floor: Pairs, model: str) -> str:
    """Coverage, the table in markdown, and what a reader must know to read it."""
    lines = [["", "azimuth", "polar", "average recall", *(f"recall@{k}" for k in RECALL), "pairs"]]
    for name, metrics in rows(outputs, floor):
        lines.append([name, *(cell(metrics, key) for key in metrics.intervals), str(metrics.count)])
    head, notes = f"Orientation by {model}. {coverage(outputs)}.", _notes(outputs, floor, outputs.report.threshold)
    return "\n".join([head, "", markdown(lines), "", *notes])


def coverage(outputs: Pairs) -> str:
    """Which share of the pairs counts, in words."""
    report = outputs.report
    _, low, high = share_interval(report.counted.double())
    return (
        f"Coverage {report.coverage:.3f} ({low:.3f} to {high:.3f}), {report.count} of "
        f"{report.ungated.count} pairs with confidence at least {report.threshold:g} in both pictures"
    )


def cell(metrics: CopyPasteMetrics, key: str) -> str:
    """A metric by its name in `intervals`, with its interval, as text."""
    mean, (low, high) = _value(metrics, key), metrics.intervals[key]
    if isnan(mean):
        return "NaN"
    digits = 3 if "recall" in key else 1
    return f"{mean:.{digits}f}" + ("" if isnan(low) else f" ({low:.{digits}f} to {high:.{digits}f})")


def _notes(outputs: Pairs, floor: Pairs, threshold: float) -> list[str]:
    """Sentences under the table, those that apply first."""
    report, base, found = outputs.report, floor.report, []
    empty = int(((outputs.reference[:, 2] == 0) | (outputs.generated[:, 2] == 0)).sum())
    if empty:
        found.append(f"{empty} pairs have a picture of confidence 0: its mask shows no subject. They do not count.")
    if not report.count:
        found.append(
            f"No pair has confidence {threshold:g} or more in both pictures, so that azimuth, polar and recall are "
            "undefined (NaN): the orientation model sees no front in these subjects. Lower the threshold, give masks "
            "of the subject, or use subjects that have a front. Ungated angles are noise that looks like variety."
        )
    elif report.coverage < 0.5:
        found.append(
            f"Only {report.count} of {report.ungated.count} pairs count: the metrics hold for these alone, and the "
            "ungated ones contain angles of subjects without a visible front, noise that looks like variety."
        )
    if report.count and not base.count:
        found.append("The floor has no pair of sufficient confidence: the error of the orientation model is unknown.")
    (low, _), (_, high) = report.intervals["azimuth"], base.intervals["azimuth"]
    if 1 in (report.count, base.count):
        found.append("A single pair has no interval: whether the outputs differ from the floor cannot be said.")
    elif report.count and base.count and low <= high:
        found.append(
            "The outputs' azimuth difference cannot be told from the floor, which is the orientation model's own error."
        )
    return [
        *found,
        "Differences in degrees, higher: more varied. Recall, lower: less copied. 95 % intervals in brackets; they take"
        " the pairs to be independent. Floor: the references against their own mirrored and re-cropped selves.",
    ]


def _records(outputs: Pairs, floor: Pairs) -> Iterator[dict]:
    """A dict by COLUMNS for each pair of outputs and floor."""
    for name, pairs in (("outputs", outputs), ("floor", floor)):
        report = pairs.report
        columns = pairs.reference, pairs.generated, report.azimuth_difference, report.polar_difference, report.counted
        lines = zip(*(column.tolist() for column in columns))
        for number, (reference, generated, azimuth, polar, counted) in enumerate(lines, 1):
            yield dict(zip(COLUMNS, (name, number, *reference, *generated, azimuth, polar, int(counted))))


def captions(outputs: Pairs) -> list[str]:
    """What to write below each output: its differences, and whether its angles can be trusted."""
    report = outputs.report
    columns = zip(report.azimuth_difference.tolist(), report.polar_difference.tolist(), report.counted.tolist())
    return [f"azimuth {a:.0f}, polar {p:.0f}" + ("" if counted else " (no clear front)") for a, p, counted in columns]


def report_csv(outputs: Pairs, floor: Pairs) -> str:
    """A line per pair, see COLUMNS."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_records(outputs, floor))
    return text.getvalue()


def report_json(outputs: Pairs, floor: Pairs, model: str) -> str:
    """Metrics with intervals, settings, and every pair, as JSON; what is undefined is null."""
    report = outputs.report
    content = {
        "orientation_model": model,
        "threshold": report.threshold,
        "coverage": _with_interval(*share_interval(report.counted.double())),
        "figures": {
            name: {"pairs": m.count} | {key: _with_interval(_value(m, key), *m.intervals[key]) for key in m.intervals}
            for name, m in rows(outputs, floor)
        },
        "pairs": list(_records(outputs, floor)),
    }
    return json.dumps(content, indent=1, allow_nan=False)


def _value(metrics: CopyPasteMetrics, key: str) -> float:
    """A metric by its name in `intervals`."""
    return metrics.recall[int(key.split("@")[1])] if "@" in key else getattr(metrics, key)


def _with_interval(*values: float) -> dict[str, float | None]:
    return {key: None if isnan(v) else v for key, v in zip(("mean", "low", "high"), values)}
