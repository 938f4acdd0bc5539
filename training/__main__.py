"""Trains a DLA from a recipe, as the node does, without the editor; Ctrl-C saves, the same command goes on.

    python training --template > recipe.toml            every setting, its default and its meaning
    python training recipe.toml --comfyui FOLDER         in ComfyUI's Python
    accelerate launch --num_processes 2 training recipe.toml --comfyui FOLDER

Anything after -- goes to ComfyUI (-- --lowvram). The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from pathlib import Path

if not __package__:  # started by its path, as `python training`
    import runpy

    runpy.run_path(str(Path(__file__).parents[1] / "common" / "bootstrap.py"))["run"]("training")


from ..common import bootstrap


def arguments(given: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python training", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE.toml", help="the settings; see --template")
    parser.add_argument("--template", action="store_true", help="print a recipe with every setting, and end")
    parser.add_argument(
        "--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), metavar="FOLDER", help="the ComfyUI to run in"
    )
    parser.add_argument(
        "--models",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="a models folder laid out like ComfyUI's",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="in place of ComfyUI's output folder")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="overrides a setting, as TOML"
    )
    cut = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:cut])
    if not options.template:
        if options.recipe is None or not options.recipe.is_file():
            parser.error(f"{options.recipe}: there is no such recipe; --template prints one")
        if options.comfyui is None or not (options.comfyui / "comfy").is_dir():
            parser.error(f"--comfyui is {options.comfyui}, expected a ComfyUI folder (main.py, comfy/)")
    return options, given[cut + 1 :]


def main() -> int:
    options, host_options = arguments(sys.argv[1:])
    if options.template:
        from .recipe import template

        print(template(), end="")
        return 0
    accelerator = accelerate()
    start_host(options, host_options)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for number in (signal.SIGTERM, *([signal.SIGHUP] if os.name == "posix" else [])):
        signal.signal(number, signal.default_int_handler)  # a plain kill saves too
    from .parts import homes, load_parts
    from .recipe import Recipe, RecipeError, read_toml
    from .run import train

    try:
        values = read_toml(options.recipe.read_text(encoding="utf-8"), str(options.recipe))
        for change in options.set:
            merge(values, read_toml(change, f"--set {change}"))
        data = values.get("data")
        for name in ("source", "validation_source"):  # relative to the recipe
            if isinstance(data, dict) and isinstance(data.get(name), str) and data[name]:
                data[name] = str(options.recipe.parent / data[name])
        recipe = Recipe.from_dict(values)
        runs, cache, places = homes(options.output)
        result = train(
            recipe, load_parts(recipe), runs / recipe.run.name, places, Terminal(accelerator), accelerator, cache
        )
    except (RecipeError, ValueError, FileNotFoundError) as problem:
        print(f"\n{problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; what was trained is saved. The same command goes on from there.", file=sys.stderr)
        return 130
    if accelerator is None or accelerator.is_main_process:
        print(result.text(), file=sys.stderr)
        lines = {"dla": str(result.dla), "lora": result.lora and str(result.lora), "steps": result.step}
        print(json.dumps({**lines, "loss": result.losses[-1] if result.losses else None}), flush=True)
    return 0


def accelerate():
    """Hugging Face's Accelerator where it launched several processes, else None. It sets this process's device, so it
    comes before the host."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import Accelerator

    return Accelerator()


def start_host(options: argparse.Namespace, host_options: list[str]) -> None:
    """The host's model management and loaders in this process, with its own options and folders."""
    import torch

    accelerators = (torch.cuda, torch.backends.mps, getattr(torch, "xpu", torch.cuda))
    bootstrap.start_host(options.comfyui, host_options, cpu=not any(a.is_available() for a in accelerators))
    import folder_paths
    from comfy.cli_args import args
    from utils.extra_config import load_extra_path_config

    own = options.comfyui / "extra_model_paths.yaml"
    given = [path for paths in args.extra_model_paths_config or [] for path in paths]
    for path in [*([str(own)] if own.is_file() else []), *given]:
        load_extra_path_config(path)
    from ..loaders import folders

    folders.register()
    for models in options.models:
        for kind in list(folder_paths.folder_names_and_paths):
            if (models / kind).is_dir():
                folder_paths.add_model_folder_path(kind, str((models / kind).resolve()), is_default=True)


def merge(values: dict, change: dict) -> None:
    for section, entries in change.items():
        if isinstance(entries, dict):
            values.setdefault(section, {}).update(entries)
        else:
            values[section] = entries


class Terminal:
    """One line for a step now and then, and every message."""

    def __init__(self, accelerator):
        self.quiet = accelerator is not None and not accelerator.is_main_process

    def __call__(self, progress) -> None:
        if self.quiet or (progress.loss is not None and progress.step % max(1, progress.steps // 100)):
            return
        loss = f" loss {progress.loss:.4f}" if progress.loss is not None else ""
        if loss or progress.text:
            print(f"step {progress.step}/{progress.steps}{loss} {progress.text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
