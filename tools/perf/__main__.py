"""`nox -s bench -- NAME [options]`: runs one benchmark of this folder; without a name those of `_table.py`."""

import importlib
import sys
from pathlib import Path

from ._table import run_all

names = sorted(file.stem for file in Path(__file__).parent.glob("[a-z]*.py"))
if sys.argv[1:2] in (["-h"], ["--help"]):
    print(f"{__doc__}\n\nNames: {', '.join(names)}. Options of one: nox -s bench -- NAME --help")
    sys.exit()
if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
    sys.exit(run_all(sys.argv[1:]))
if sys.argv[1] not in names:
    sys.exit(f"Which benchmark? There are: {', '.join(names)}.")
importlib.import_module(f"{__package__}.{sys.argv[1]}").main(sys.argv[2:])
