"""Messages of command-line tools."""

import sys


def say(text: str) -> None:
    """Prints a line on standard error; standard output is for results alone."""
    print(text, file=sys.stderr, flush=True)
