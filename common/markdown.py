"""Markdown tables."""

from collections.abc import Sequence


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A markdown table, columns aligned, of a line of headings and lines of cells."""
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(lines[0]))]
    head, *body = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["-" * width for width in widths], *body))
