"""The page of the evidence: figures with 95 % intervals, beside what the paper claims, and whether that holds here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from subject_dla.demo import pictures
from subject_dla.demo.evidence_rows import AGAIN, GRID, HEADLINE, LAYERS, ROWS, SCHEDULES, SEEDS, Row
from subject_dla.demo.oracle import COARSE, FINE, Reading
from subject_dla.demo.world import VIEWS, Toy
from subject_dla.evaluation.copy_paste import azimuth_difference, copy_paste_report
from subject_dla.evaluation.intervals import mean_interval, share_interval

Figure = tuple[float, float, float]  # mean, low, high
FOLLOWS = 22.5  # degrees of azimuth: half of what a view's word covers
COLUMNS = ("azimuth", "polar", "recall", "view error", "follows", "coarse", "fine")
UNNAMED = ("azimuth", "polar", "recall", "coarse", "fine")  # where the prompt names no view
HEADS = {
    "azimuth": "azimuth vs reference °", "polar": "polar vs reference °", "recall": "average recall vs reference",
    "view error": "error vs prompted view °", "follows": "follows the prompted view", "coarse": "coarse identity",
    "fine": "fine identity",
}  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """Per case: what the intervals are over."""

    angles: Tensor
    reference: Tensor
    off: Tensor  # degrees from the middle of the prompted view
    coarse: Tensor
    fine: Tensor

    def figures(self) -> dict[str, Figure]:
        report = copy_paste_report(self.reference, self.angles)
        named = {"azimuth": report.azimuth, "polar": report.polar, "recall": report.average_recall}
        keys = {"azimuth": "azimuth", "polar": "polar", "recall": "average_recall"}
        out = {name: (value, *report.intervals[keys[name]]) for name, value in named.items()}
        out["view error"] = mean_interval(self.off)
        out["follows"] = share_interval((self.off < FOLLOWS).double())
        return out | {"coarse": share_interval(self.coarse), "fine": share_interval(self.fine)}


def score(work: Path, rows: list[Row], entries: list[dict]) -> Scored:
    """Of rows that differ in the seed alone, one after another."""
    parts = []
    for row in rows:
        result = json.loads((work / f"{row.key}.json").read_text(encoding="utf-8"))
        chosen = [entry for entry in entries if entry["set"] == row.cases][: len(result["angles"])]
        angles = torch.tensor(result["angles"])
        toys = [entry["pictures"][0].toys[0] for entry in chosen]
        views = [entry["pictures"][0].view for entry in chosen]
        first = [entry["pictures"][1].view for entry in chosen]
        reading = Reading(angles, {name: torch.tensor(values) for name, values in result["traits"].items()}, {})
        middles = torch.tensor([45.0 * VIEWS.index(view.name) for view in views])
        parts.append((
            angles, torch.tensor([[view.azimuth, view.polar] for view in first]), azimuth_difference(angles[:, 0], middles),
            reading.right(COARSE, toys), reading.right(FINE, toys),
        ))  # fmt: skip
    return Scored(*(torch.cat(column).double() for column in zip(*parts)))


class Page:
    def __init__(self, work: Path, models: Path):
        self.work, self.models = work, models
        self.entries = pictures.entries(work / "data", "test")
        self.lines: list[str] = []
        self.figures: dict[str, dict] = {}

    def rows(self, part: str, **wanted) -> list[Row]:
        """Those that were drawn."""
        fits = [row for row in ROWS if row.part == part and all(getattr(row, k) == v for k, v in wanted.items())]
        return [row for row in fits if (self.work / f"{row.key}.json").exists()]

    def count(self, part: str) -> int:
        """Cases of its first row."""
        rows = self.rows(part)
        return len(json.loads((self.work / f"{rows[0].key}.json").read_text(encoding="utf-8"))["angles"]) if rows else 0

    def score(self, part: str, **wanted) -> dict[str, Figure] | None:
        rows = self.rows(part, **wanted)
        return score(self.work, rows, self.entries).figures() if rows else None

    def compare(self, arms: dict[str, tuple[str, str]], schedules: tuple[str, ...], join: str) -> dict:
        """Figures by "ARM join SCHEDULE". arms: by name, the part of the page that draws it and its weights."""
        return {
            f"{name}{join}{how}": self.score(part, name=how, arm=arm)
            for name, (part, arm) in arms.items()
            for how in schedules
        }

    def table(self, head: str, rows: dict[str, dict[str, Figure] | None], columns=COLUMNS) -> None:
        self.lines += [
            "",
            f"| {head} | " + " | ".join(HEADS[c] for c in columns) + " |",
            "| --- |" + " --- |" * len(columns),
        ]
        for name, figures in rows.items():
            cells = [shown(figures[c], c) if figures else "–" for c in columns]
            self.lines.append(f"| {name} | " + " | ".join(cells) + " |")
            if figures:
                self.figures[f"{head}: {name}"] = {c: [round(v, 4) for v in figures[c]] for c in columns}
        self.lines.append("")

    def say(self, *lines: str) -> None:
        self.lines += lines

    def verdict(self, claim: str, found: str, measured: str) -> None:
        self.lines += [
            "",
            f"> The paper: {claim}  ",
            f"> Measured: {measured}  ",
            f"> The claim **{found}**.",
            "",
        ]
        self.figures.setdefault("verdicts", {})[claim] = found


def shown(figure: Figure, column: str) -> str:
    mean, low, high = figure
    digits = 1 if column in ("azimuth", "polar", "view error") else 3
    return f"{mean:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def write_page(page_file: Path, work: Path, models: Path, seconds: float) -> dict:
    page = Page(work, models)
    floor = json.loads((models.parent / "oracle.json").read_text(encoding="utf-8"))["floor"]
    all_seeds = {name: page.score("headline", name=name) for name in SCHEDULES}
    seeds = sum(bool(page.rows("headline", arm=arm)) for arm in SEEDS)
    page.say(
        "# Evidence",
        "",
        "Written by `nox -s evidence` from pictures of held-out toys; nothing on this page is typed by hand. The world, its models and how they",
        "were trained: [the demo family](demo-family.md). Every figure is read by the oracle from a picture of "
        "112 px and given with its 95 % interval; identity is the share of a toy's traits that the oracle finds",
        "(coarse: kind and three colours; fine: decal, its colour, the body's pattern). The oracle's own errors are the floor:",
    )
    page.say(
        "",
        "| oracle on | azimuth ° | polar ° | average recall | coarse | fine |",
        "| --- | --- | --- | --- | --- | --- |",
    )
    for name, values in floor.items():
        page.say(
            "| "
            + " | ".join(
                [name, *(str(values[key]) for key in ("azimuth", "polar", "average recall", "coarse", "fine"))]
            )
            + " |"
        )
    toys = [entry["pictures"][0].toys[0] for entry in page.entries]
    coarse, fine = (wrong_toy(toys, names) for names in (COARSE, FINE))
    page.say(
        "", f"Another toy of the test split has {coarse:.2f} of the coarse traits and {fine:.2f} of the fine ones."
    )

    page.say(
        "",
        "## 1. Copy-paste, view and identity",
        "",
        f"Prompts that name a view at least 90° from the reference's; {seeds} seed(s) of training and sampling together, "
        f"{page.count('headline')} of the set's 200 cases for each.",
    )
    page.table("schedule", all_seeds)
    page.say(picture(page, "headline", list(SCHEDULES), page_file))
    both, only, staged = (all_seeds[name] for name in ("both throughout", "MLLM only", HEADLINE))
    if both and only and staged:
        page.verdict(
            "staged denoising copies the pose less than both conditions throughout", better(both, staged, "recall"),
            f"average recall {shown(staged['recall'], 'recall')} staged, {shown(both['recall'], 'recall')} throughout",
        )  # fmt: skip
        page.verdict(
            "MLLM tokens alone lose fine identity, which the VAE's tokens bring back", better(staged, only, "fine"),
            f"fine identity {shown(staged['fine'], 'fine')} staged, {shown(only['fine'], 'fine')} MLLM only",
        )  # fmt: skip
    page.say("### Thresholds", "", "The paper's belong to 4096 image tokens, these pictures have 49. One seed.")
    grid = {name: page.score("headline", name=name, arm="demo") for name in ("staged 0.95 / 0.85", HEADLINE)}
    grid |= {name: page.score("grid", name=name) for name in GRID}
    page.table("thresholds", grid)
    page.say(picture(page, "grid", list(GRID), page_file))
    page.say("### No view named", "", "Nothing but the reference tells a view: turning away is variety, not obedience.")
    page.table(
        "no view named",
        {name: page.score("free", name=name) for name in SCHEDULES},
        UNNAMED,
    )

    page.say(
        "### No view named, asked again",
        "",
        "What people mostly ask: a subject in another place, with nothing said of its pose. Two sentences were written down when the table above had been seen, and "
        "before any of these fresh cases was drawn; they are about the paper's thresholds on raw flow time.",
    )
    again = {name: page.score("again", name=name) for name in AGAIN}
    page.table("no view named, fresh cases", again, UNNAMED)
    both, only, staged = (again[name] for name in ("both throughout", "MLLM only", "staged 0.95 / 0.85"))
    page.verdict(
        "where no view is named, staged denoising copies the pose less than both conditions throughout", better(both, staged, "recall"),
        told({"staged": staged, "both throughout": both}, "recall"),
    )  # fmt: skip
    page.verdict(
        "where no view is named, staged denoising keeps fine identity better than MLLM tokens alone", better(staged, only, "fine"),
        told({"staged": staged, "MLLM only": only}, "fine"),
    )  # fmt: skip

    page.say("## 2. Last layer, one pooling, two poolings", "", "Each pair trained in the same two stages.")
    arms = {"last layer": ("pooling", "demo-last"), "single LAP": ("pooling", "demo-lap"), "DLA": ("headline", "demo")}
    table = page.compare(arms, ("MLLM only", HEADLINE), ", ")
    page.table("connection", table)
    last, dla, lap = (table[f"{name}, {HEADLINE}"] for name in ("last layer", "DLA", "single LAP"))
    page.verdict(
        "the last layer alone loses identity against pooling all layers", better(dla, last, "fine"),
        told({"last layer": last, "DLA": dla}, "fine"),
    )  # fmt: skip
    page.verdict(
        "two poolings follow the prompt better than one",
        better(dla, lap, "follows"),
        told({"single LAP": lap, "DLA": dla}, "follows"),
    )

    page.say(
        "## 3. Two-stage and single-stage training",
        "",
        "As many steps; *single-stage* with the same shares of conditions, and with both throughout, as one would train without staged denoising in mind.",
    )
    arms = {
        "two-stage": ("headline", "demo"),
        "single-stage": ("training", "demo-single"),
        "single-stage, both throughout": ("training", "demo-single-both"),
    }
    table = page.compare(arms, ("both throughout", HEADLINE), "; ")
    page.table("training; sampling", table)
    two, one = table[f"two-stage; {HEADLINE}"], table[f"single-stage, both throughout; {HEADLINE}"]
    page.verdict(
        "staged denoising needs weights that have seen each condition alone", better(two, one, "fine"),
        told({"two-stage": two, "single-stage": one}, "fine"),
    )  # fmt: skip

    page.say(
        "## 4. Layer roles",
        "",
        "MLLM only, with groups of the MLLM's nine layers (0 = embeddings) zeroed in one modality. A new DLA reads the last layer alone: what so short a training",
        "has not taught it to read of the others can't be missed.",
    )
    table = {"all layers": page.score("headline", name="MLLM only", arm="demo")}
    for modality in ("text", "image"):
        for action in ("without", "only"):
            for group in LAYERS:
                name = f"{modality} {action} {group}"
                table[name] = page.score("roles", name=name)
    page.table("layers", table, ("view error", "follows", "coarse", "fine"))
    for modality, column, claim in (
        ("image", "coarse", "of the image tokens the early layers carry identity"),
        ("text", "follows", "of the text tokens the late layers carry the prompt"),
    ):
        early, late = (table[f"{modality} without {group}"] for group in (min(LAYERS), max(LAYERS)))
        matters, other = (late, early) if modality == "image" else (early, late)  # what matters is missed
        names = {f"{modality} without {min(LAYERS)}": early, f"{modality} without {max(LAYERS)}": late}
        page.verdict(claim, better(matters, other, column), told(names, column))

    page.say(
        "## 5. Reasoning prompts",
        "",
        "*Seen from the other side*, *turned a quarter*, *in the colour of its wheels*. Text only: the MLLM reads the prompt without the references, trained so.",
    )
    table = {
        f"MLLM, {name}": page.score("reasoning", name=name, arm="demo")
        for name in ("MLLM only", HEADLINE, "both throughout")
    }
    table |= {
        f"text only, {name}": page.score("reasoning", name=name, arm="demo-text")
        for name in (HEADLINE, "both throughout")
    }
    page.table("conditioning", table)
    joint, text = table[f"MLLM, {HEADLINE}"], table[f"text only, {HEADLINE}"]
    page.verdict(
        "reading prompt and references together follows reasoning prompts better",
        better(joint, text, "follows"),
        told({"MLLM": joint, "text only": text}, "follows"),
    )
    page_file.write_text("\n".join(page.lines) + "\n", encoding="utf-8")
    return {"page": str(page_file), "seconds": round(seconds), **page.figures}


def wrong_toy(toys: list[Toy], names: tuple[str, ...]) -> float:
    """Share of these traits that a toy has in common with the next one."""
    same = [getattr(a, name) == getattr(b, name) for a, b in zip(toys, toys[1:]) for name in names]
    return sum(same) / len(same)


def better(a: dict | None, b: dict | None, column: str) -> str:
    """Whether `a` lies above `b` there, as far as 95 % intervals tell."""
    if a is None or b is None:
        return "is not measured yet"
    (_, low, high), (_, other_low, other_high) = a[column], b[column]
    if low > other_high:
        return "holds here"
    return "is contradicted here" if high < other_low else "is undecided here: the intervals overlap"


def told(rows: dict[str, dict | None], column: str) -> str:
    return f"{HEADS[column]}: " + ", ".join(
        f"{name} {shown(f[column], column) if f else 'not drawn'}" for name, f in rows.items()
    )


def picture(page: Page, part: str, names: list[str], page_file: Path) -> str:
    """The first cases under each schedule, beneath their references."""
    from subject_dla.evaluation.sheet import contact_sheet

    rows = [row for name in names for row in page.rows(part, name=name, arm="demo")]
    if not rows:
        return ""
    strips = [(row.name, Image.open(page.work / f"{row.key}.png")) for row in rows]
    side = strips[0][1].height
    count = strips[0][1].width // side
    cases = [entry for entry in page.entries if entry["set"] == rows[0].cases][:count]
    data = page.work / "data"
    lines = [
        (
            "references",
            [Image.open(data / entry["image_paths"][0]) for entry in cases],
            [entry["prompt"] for entry in cases],
        )
    ]
    lines += [(name, [strip.crop((i * side, 0, (i + 1) * side, side)) for i in range(count)]) for name, strip in strips]
    folder = page_file.parent / "evidence"
    folder.mkdir(exist_ok=True)
    contact_sheet(lines, side=168).save(folder / f"{part}.jpg", quality=88)
    return f"\n![{part}](evidence/{part}.jpg)\n"
