"""Imports the pack under the name `subject_dla`, and starts the host in this process.

    python common/bootstrap.py MODULE [options]     runs a module of the pack as a program, e.g. demo.run

The pack's root must not be on `sys.path` beside the host: the folder `nodes` would cover the host's `nodes.py`. So the
pack is imported by its location, as the host does with a custom node.
"""

import os
import runpy
import sys
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

PACK = "subject_dla"
ROOT = Path(__file__).resolve().parent.parent


def import_pack() -> None:
    """Makes the pack importable as `subject_dla`, whatever its folder is called."""
    if PACK not in sys.modules:
        spec = spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
        assert spec and spec.loader
        module = module_from_spec(spec)
        sys.modules[PACK] = module
        spec.loader.exec_module(module)


def start_host(comfyui: str | Path, options: Sequence[str] = (), *, cpu: bool = True) -> None:
    """Puts a ComfyUI checkout on `sys.path`, before anything imports its model management.

    `options` is the host's command line; with `cpu` it computes on the CPU, whatever else there is.
    """
    os.environ["COMFYUI_PATH"] = str(comfyui)
    sys.path.insert(0, str(Path(comfyui).resolve()))
    if options:  # else the host does not read the command line, which it does when its options are imported
        import comfy.options

        comfy.options.enable_args_parsing()
    sys.argv = [*sys.argv[:1], *options]
    from comfy.cli_args import args

    args.cpu = args.cpu or cpu


def run(module: str) -> None:
    """Runs a module of the pack as a program with the rest of this process's command line; ends the process."""
    if Path(sys.path[0]).is_relative_to(ROOT):
        del sys.path[0]  # the folder of the script that was started: its modules would cover others
    import_pack()
    runpy.run_module(f"{PACK}.{module}", run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    run(sys.argv.pop(1))
