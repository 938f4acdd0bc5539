"""Markdown tables, and pages that programs write a part of."""

from collections.abc import Sequence
from pathlib import Path


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A markdown table, columns aligned, of a line of headings and lines of cells."""
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(lines[0]))]
    head, *body = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["-" * width for width in widths], *body))


def replace_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Puts `text` between two marks of a page, each on a line of its own, in place of what is there."""
    start, end = marks
    before, rest = page.read_text("utf-8").split(start)
    page.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}", "utf-8")
