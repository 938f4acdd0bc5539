"""The benchmark's former address, `python -m evaluation`: it is `python tools/benchmark` now, with the same options."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[1] / "common" / "bootstrap.py"))["run"]("tools.benchmark")
