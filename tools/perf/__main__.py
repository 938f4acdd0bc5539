"""`nox -s bench -- NAME [options]`: runs one benchmark of this folder."""

import importlib
import sys
from pathlib import Path

names = sorted(file.stem for file in Path(__file__).parent.glob("[a-z]*.py"))
if len(sys.argv) < 2 or sys.argv[1] not in names:
    sys.exit(f"Which benchmark? There are: {', '.join(names)}.")
importlib.import_module(f"{__package__}.{sys.argv[1]}").main(sys.argv[2:])
