"""Where a run keeps its files."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..common.locks import holder, lock
from .recipe import Recipe, RecipeError


@dataclass(frozen=True)
class RunPaths:
    """Output directory, cache directory and target files of a run."""

    output_dir: Path  # of checkpoints, losses, plots and samples
    cache_dir: Path  # of latents and features; runs share it
    dla: Path  # the finished DLA, where Load DLA finds it
    lora: Path | None  # the finished LoRA, where the host's own loader finds it

    @property
    def samples(self) -> Path:
        """Directory of the sample images."""
        return self.output_dir / "samples"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other process trains this run. Raises RecipeError where another one does."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        file = self.output_dir / "run.lock"
        try:
            with lock(file) as held:
                if not held:
                    raise RecipeError(
                        f"Run '{self.output_dir.name}' is being trained by {holder(file)}. Stop it or wait until it "
                        "ends; to train another run beside it, choose another run.name."
                    )
                yield
        finally:
            with suppress(OSError):  # of a run that has written nothing
                self.output_dir.rmdir()


def run_paths(recipe: Recipe, output: Path | None = None) -> RunPaths:
    """Returns the paths of a recipe's run, with `output` in place of the host's output folder.

    DLA and LoRA go to the first folder that the host has for each.
    """
    import folder_paths

    base = Path(output or folder_paths.get_output_directory()) / "subject_dla"
    name = f"{recipe.run.name}.safetensors"
    dla, lora = (Path(folder_paths.get_folder_paths(kind)[0]) / name for kind in ("dla", "loras"))
    return RunPaths(base / "runs" / recipe.run.name, base / "cache", dla, lora if recipe.lora.rank else None)
