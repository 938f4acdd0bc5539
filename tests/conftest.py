"""Makes the pack importable as `subject_dla`, whatever its folder is called, as the host does."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if "subject_dla" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "subject_dla", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["subject_dla"] = module
    spec.loader.exec_module(module)
