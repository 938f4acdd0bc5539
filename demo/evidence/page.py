"""The evidence's page as a markdown document: tables of metrics with 95 % intervals, verdicts on claims, pictures."""

from pathlib import Path

from PIL import Image

from ...common.drawing.sheet import contact_sheet
from ..family.data import read_entries
from .results import ResultStore
from .rows import ROWS, Row
from .score import HEADS, Scores, format_comparison, format_interval, verdict

Table = dict[str, Scores | None]


class Page:
    """Markdown lines, and the same metrics as numbers.

    Args:
        store: The results.
        data: Folder of the cases (demo/family/data.py).
        folder: Where the page and its pictures go.
    """

    def __init__(self, store: ResultStore, data: Path, folder: Path):
        self.store, self.data, self.folder = store, data, folder
        self.entries = read_entries(data, "test")
        self.lines: list[str] = []
        self.metrics: dict[str, dict] = {}

    def write(self, text: str) -> None:
        """Adds lines."""
        self.lines += text.split("\n")

    def scores(self, part: str, name: str, arm: str = "demo") -> Scores | None:
        """Of a row; None where it was not drawn."""
        row = _row(part, name, arm)
        result = self.store.read(row)
        return Scores.from_result(result, self.cases(row.cases)) if result else None

    def cases(self, name: str) -> list[dict]:
        """The entries of a set of cases."""
        return [entry for entry in self.entries if entry["set"] == name]

    def table(self, head: str, rows: Table, columns: tuple[str, ...] = tuple(HEADS)) -> Table:
        """Adds a table, and returns its rows.

        Args:
            head: Heading of the first column.
            rows: By the first column's cell; None = not drawn.
            columns: Keys of score.HEADS.
        """
        self.write(f"\n| {head} | {' | '.join(HEADS[c] for c in columns)} |\n| --- |{' --- |' * len(columns)}")
        for name, row in rows.items():
            cells = [format_interval(row.metrics[c], c) if row else "–" for c in columns]
            self.write(f"| {name} | {' | '.join(cells)} |")
            if row:
                self.metrics[f"{head}: {name}"] = {c: [round(v, 4) for v in row.metrics[c]] for c in columns}
        self.write("")
        return rows

    def verdict(self, claim: str, column: str, higher: str, lower: str, rows: Table) -> None:
        """Adds whether row `higher` is above row `lower` in this column, as the paper claims."""
        found = verdict(rows[higher], rows[lower], column)
        measured = format_comparison({name: rows[name] for name in (higher, lower)}, column)
        self.write(f"\n> The paper: {claim}  \n> Measured: {measured}  \n> The claim **{found}**.\n")
        self.metrics.setdefault("verdicts", {})[claim] = found

    def picture(self, part: str, names: tuple[str, ...]) -> None:
        """Adds the first cases' pictures under each schedule, below their references."""
        rows = [_row(part, name, "demo") for name in names]
        strips = [(row.name, Image.open(self.store.path(row).with_suffix(".png"))) for row in rows]
        side = strips[0][1].height
        lefts = range(0, strips[0][1].width, side)
        cases = self.cases(rows[0].cases)[: len(lefts)]
        references = [Image.open(self.data / entry["image_paths"][0]) for entry in cases]
        lines = [("references", references, [entry["prompt"] for entry in cases])]
        lines += [(name, [strip.crop((left, 0, left + side, side)) for left in lefts]) for name, strip in strips]
        (self.folder / "evidence").mkdir(exist_ok=True)
        contact_sheet(lines, side=168).save(self.folder / "evidence" / f"{part}.jpg", quality=88)
        self.write(f"\n![{part}](evidence/{part}.jpg)\n")


def _row(part: str, name: str, arm: str) -> Row:
    return next(row for row in ROWS if (row.part, row.name, row.arm) == (part, name, arm))
