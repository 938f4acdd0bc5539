"""Training inside the graph: one node, which runs, saves and goes on."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from . import files
from .schema import DLA, MLLM, NONE, advanced, schema

STAGES = ["1: MLLM tokens", "2: MLLM and VAE tokens"]
LISTS = (".json", ".jsonl")


def sources() -> list[str]:
    """Folders and lists in the host's input folder, one level down too, as the data input offers them."""
    root = Path(folder_paths.get_input_directory())
    found = [path for path in (*root.glob("*"), *root.glob("*/*")) if path.is_dir() or path.suffix.lower() in LISTS]
    return sorted(path.relative_to(root).as_posix() for path in found if not path.name.startswith("."))


class SubjectTrainDLA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SubjectTrainDLA",
            display_name="Train DLA",
            description=(
                "Trains a Dual Layer Aggregator for this diffusion model and this MLLM, and a LoRA on the diffusion "
                "model's attention if asked for. Stopping saves; queueing again goes on from there, bit for bit. "
                "The DLA goes to models/dla and the LoRA to models/loras, under the run's name."
            ),
            search_aliases=["train", "training", "finetune", "dual layer aggregator", "lora"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="FLUX.1, Qwen-Image or OmniGen2 from Load Diffusion Model. It stays frozen."
                ),
                io.Vae.Input("vae", tooltip="The diffusion model's VAE. Its latents are kept on disk."),
                MLLM.Input("mllm", tooltip="From Load MLLM or MLLM from CLIP. It stays frozen."),
                io.Combo.Input(
                    "data",
                    options=sources(),
                    tooltip=(
                        "In ComfyUI's input folder: a folder of subjects (SUBJECT/*.jpg, with a caption in the .txt of "
                        "the same name), or a .json or .jsonl list of prompt, image_paths and image_tgt_path, as UNO's."
                    ),
                ),
                io.String.Input(
                    "name", default="my-dla", tooltip="Of the run and its files. Another name begins a new run."
                ),
                io.Combo.Input(
                    "stage",
                    options=STAGES,
                    default=STAGES[0],
                    tooltip=(
                        "1: the prompt and the references through the MLLM alone. 2: with the references' VAE latents "
                        "as well, each left out at times, as staged sampling needs it; start from stage 1's DLA."
                    ),
                ),
                io.Int.Input(
                    "steps",
                    default=1000,
                    min=1,
                    max=10_000_000,
                    tooltip="In all, those of earlier queueings counted. The paper: 25,000 for stage 1, 10,000 for stage 2.",
                ),
                io.Float.Input(
                    "learning_rate", default=1e-4, min=0.0, max=1.0, step=1e-6, round=False, tooltip="The DLA's."
                ),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=64,
                    max=4096,
                    step=16,
                    tooltip="Pictures are cut to the nearest of some shapes with the area of a square of this side, in px.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Examples in one pass through the diffusion model. Memory grows with it.",
                ),
                io.Int.Input(
                    "accumulate",
                    default=4,
                    min=1,
                    max=4096,
                    tooltip="Passes whose gradients make one step. Time grows with it, memory does not.",
                ),
                io.Int.Input(
                    "lora_rank",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="A LoRA on the diffusion model's attention; 0 = none. FLUX.1-dev needs one to read references as VAE latents: the paper has 512.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Of all that is random.",
                ),
                DLA.Input(
                    "dla",
                    optional=True,
                    tooltip="Go on from this DLA. Nothing connected: a new one, which is exactly the MLLM's last layer.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="FLUX.1: CLIP-L (Load CLIP for FLUX), for the pooled vector. Nothing connected: zeros, which then belong to sampling too.",
                ),
                advanced(
                    io.Combo.Input,
                    "start_lora",
                    options=[NONE, *files.options("loras")],
                    default=NONE,
                    optional=True,
                    tooltip="Go on from this LoRA, of the same rank: stage 1's in stage 2.",
                ),
                advanced(
                    io.String.Input,
                    "options",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip='Any other setting as TOML, e.g. training.optimizer = "adamw8bit" or run.sample_every = 200; see the help page.',
                ),
            ],
            outputs=[
                DLA.Output(
                    "DLA", display_name="DLA", tooltip="The trained DLA, to Encode Subject and Aggregate Layers."
                ),
                io.Image.Output("plots", display_name="plots", tooltip="Loss curve, then held-out loss."),
                io.String.Output(
                    "report", display_name="report", tooltip="What was trained, the held-out table, what was left out."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, data, name, options="", start_lora=NONE):
        from ..training.recipe import RecipeError

        if data is not None and data not in sources():
            return f"The input folder has no {data!r}; it holds: {', '.join(sources()) or 'no folder'}. Put the data there and press R."
        if start_lora not in (None, NONE) and (problem := files.missing("loras", start_lora)):
            return problem
        try:
            cls._recipe(data or "", name or "run", options or "")
        except RecipeError as problem:
            return str(problem)
        return True

    @classmethod
    def fingerprint_inputs(cls, data, **_):
        """Changed data are trained on again."""
        place = Path(folder_paths.get_input_directory()) / (data or "")
        found = sorted(place.rglob("*")) if place.is_dir() else [place]
        return str([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found if path.is_file()])

    @classmethod
    def execute(
        cls, model, vae, mllm, data, name, stage, steps, learning_rate, resolution, batch_size, accumulate, lora_rank,
        seed, dla=None, clip=None, start_lora=NONE, options="",
    ) -> io.NodeOutput:  # fmt: skip
        from ..training.node import train_in_graph

        recipe = cls._recipe(
            data, name, options, stage=STAGES.index(stage) + 1, steps=steps, learning_rate=learning_rate,
            batch_size=batch_size, accumulate=accumulate, seed=seed, resolution=resolution, rank=lora_rank,
            start_dla=dla.name if dla is not None else "", start_lora="" if start_lora == NONE else start_lora,
        )  # fmt: skip
        trained, plots, report = train_in_graph(recipe, model, vae, mllm, clip)
        return io.NodeOutput(trained, plots, report, ui=ui.PreviewImage(plots, cls=cls))

    @staticmethod
    def _recipe(data: str, name: str, options: str, **values):
        """The node's widgets as a recipe; `options`, TOML with dotted names, has the last word."""
        from ..training.recipe import Recipe

        return Recipe.from_widgets(Path(folder_paths.get_input_directory()) / data, name, options, values)


NODES = [SubjectTrainDLA]
