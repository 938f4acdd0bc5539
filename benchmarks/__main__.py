"""`nox -s bench -- NAME [options]`: runs one benchmark of this folder."""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))

from family import import_pack  # noqa: E402

import_pack()
names = sorted(file.stem for file in (ROOT / "benchmarks").glob("[a-z]*.py"))
if len(sys.argv) < 2 or sys.argv[1] not in names:
    sys.exit(f"Which benchmark? There are: {', '.join(names)}.")
importlib.import_module(f"subject_dla.benchmarks.{sys.argv[1]}").main(sys.argv[2:])
