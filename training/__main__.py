"""Trains a DLA from a recipe, as the node does, without the editor; Ctrl-C saves, the same command resumes.

    python training --template > recipe.toml            every setting, its default and its meaning
    python training recipe.toml --comfyui FOLDER         in ComfyUI's Python
    accelerate launch --num_processes 2 training recipe.toml --comfyui FOLDER                       on two GPUs
    python -m torch.distributed.run --nproc_per_node 2 training recipe.toml --comfyui FOLDER       without one

Anything after -- goes to ComfyUI (-- --lowvram). The last line of standard output is one JSON object.
"""

import argparse
import json
import logging
import os
import signal
import sys
from pathlib import Path

if "." not in (__package__ or ""):  # started as `python training` or `python -m training`
    import runpy

    runpy.run_path(str(Path(__file__).parents[1] / "common" / "bootstrap.py"))["run"]("training")

from ..common import bootstrap


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The script's options, and the host's."""
    parser = argparse.ArgumentParser(
        prog="python training",
        description=__doc__.split("\n")[0],
        epilog="Anything after -- goes to ComfyUI (-- --lowvram).",
    )
    add, folder, many = parser.add_argument, {"type": Path, "metavar": "FOLDER"}, {"action": "append", "default": []}
    add("recipe", type=Path, nargs="?", metavar="RECIPE.toml", help="the settings; see --template")
    add("--template", action="store_true", help="print a recipe with every setting, and end")
    add("--comfyui", **folder, default=os.environ.get("COMFYUI_PATH"), help="the ComfyUI to run in")
    add("--models", **folder, **many, help="a models folder like ComfyUI's, before it; gets the finished files")
    add("--output", **folder, help="in place of ComfyUI's output folder")
    add("--set", **many, metavar="SECTION.NAME=VALUE", help="overrides a setting, as TOML")
    cut = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:cut])
    if not options.template:
        if options.recipe is None or not options.recipe.is_file():
            parser.error(f"{options.recipe}: there is no such recipe; --template prints one")
        if options.comfyui is None or not (options.comfyui / "comfy").is_dir():
            parser.error(f"--comfyui is {options.comfyui}, expected a ComfyUI folder (main.py, comfy/)")
    return options, argv[cut + 1 :]


def main() -> int:
    """Runs the script; returns its exit status."""
    options, host_options = _arguments(sys.argv[1:])
    if options.template:
        from .recipe import template

        print(template(), end="")
        return 0
    accelerator = _accelerate()
    _start_host(options, host_options)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for number in (signal.SIGTERM, *([signal.SIGHUP] if os.name == "posix" else [])):
        signal.signal(number, signal.default_int_handler)  # a plain kill saves too
    from .models import load_models
    from .paths import run_paths
    from .recipe import Recipe
    from .run import train

    main_process = accelerator is None or accelerator.is_main_process
    try:
        recipe = Recipe.from_dict(_read(options.recipe, options.set))
        callback = _print_line if main_process else lambda _: None
        result = train(recipe, load_models(recipe), run_paths(recipe, options.output), callback, accelerator)
    except (ValueError, FileNotFoundError) as problem:
        print(f"\n{problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; what was trained is saved. The same command resumes from there.", file=sys.stderr)
        return 130
    if main_process:
        print(result.text(), file=sys.stderr)
        files, losses = {"dla": str(result.dla), "lora": result.lora and str(result.lora)}, result.history.losses
        print(json.dumps({**files, "steps": len(losses), "loss": losses[-1] if losses else None}), flush=True)
    if accelerator is not None:
        accelerator.wait_for_everyone()  # none takes the connections down while another still works
        accelerator.end_training()
    return 0


def _read(path: Path, changes: list[str]) -> dict:
    """A recipe's sections with the changes of --set; the data's paths are relative to the recipe."""
    from ..common.list_files import read_text
    from .recipe import read_toml

    values = read_toml(read_text(path), str(path))
    for change in changes:
        for section, entries in read_toml(change, f"--set {change}").items():
            if isinstance(entries, dict):
                values.setdefault(section, {}).update(entries)
            else:
                values[section] = entries
    data = values.get("data")
    for name in ("source", "validation_source"):
        if isinstance(data, dict) and isinstance(data.get(name), str) and data[name]:
            data[name] = str(path.parent / data[name])
    return values


def _accelerate():
    """Hugging Face's Accelerator where it launched several processes; sets this process's device, before the host."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from datetime import timedelta

    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    # gradients in the buffers that are sent, not beside them; and the others wait while one validates and samples
    settings = (
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        InitProcessGroupKwargs(timeout=timedelta(hours=2)),
    )
    # on processors each process would believe itself alone, unless it is told
    return Accelerator(cpu=not _has_accelerator(), kwargs_handlers=[*settings])


def _has_accelerator() -> bool:
    """Whether this machine has a device that the host runs on beside the processor."""
    import torch

    return any(a.is_available() for a in (torch.cuda, torch.backends.mps, getattr(torch, "xpu", torch.cuda)))


def _start_host(options: argparse.Namespace, host_options: list[str]) -> None:
    """Starts the host's model management and loaders in this process, with its own options and folders."""
    bootstrap.start_host(options.comfyui, host_options, cpu=not _has_accelerator())
    import folder_paths
    from comfy.cli_args import args
    from utils.extra_config import load_extra_path_config

    own = options.comfyui / "extra_model_paths.yaml"
    more = [path for paths in args.extra_model_paths_config or [] for path in paths]
    for path in [*([str(own)] if own.is_file() else []), *more]:
        load_extra_path_config(path)
    from ..loaders import folders

    folders.register()
    for models in options.models:
        for kind in list(folder_paths.folder_names_and_paths):
            if (models / kind).is_dir():
                folder_paths.add_model_folder_path(kind, str((models / kind).resolve()), is_default=True)


def _print_line(progress) -> None:
    """Prints each hundredth of the steps, and every message."""
    if progress.text or progress.seconds is not None and progress.step % max(1, progress.steps // 100) == 0:
        print(progress.line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
