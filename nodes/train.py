"""Training inside the graph: one node, which runs, saves and goes on."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from . import files
from .schema import DLA, MLLM, NONE, advanced, schema

STAGES = ["1: MLLM tokens", "2: MLLM and VAE tokens"]
LISTS = (".json", ".jsonl")
BESIDE = "beside the DLA"  # the LoRA that was trained with the connected DLA, which has its name


def sources() -> list[str]:
    """What the data input offers: folders in the host's input folder, and lists there and in these folders."""
    root = Path(folder_paths.get_input_directory())
    folders = [path for path in root.glob("*") if path.is_dir()]
    lists = [path for place in (root, *folders) for path in place.glob("*") if path.suffix.lower() in LISTS]
    names = (path.relative_to(root).as_posix() for path in (*folders, *lists))
    return sorted((name for name in names if not name.startswith(".")), key=str.lower)


class SubjectTrainDLA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SubjectTrainDLA",
            display_name="Train DLA",
            description=(
                "Trains a Dual Layer Aggregator for this diffusion model and this MLLM and, if you like, a LoRA on the "
                "diffusion model's attention. Stopping saves; queueing again goes on from there. The DLA goes to "
                "models/dla and the LoRA to models/loras, under the run's name."
            ),
            search_aliases=["train", "training", "finetune", "dual layer aggregator", "lora"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="FLUX.1, Qwen-Image or OmniGen2, from Load Diffusion Model. It is not changed.",
                ),
                io.Vae.Input("vae", tooltip="The diffusion model's VAE. It is not changed."),
                MLLM.Input("mllm", tooltip="From Load MLLM or MLLM from CLIP. It is not changed."),
                io.Combo.Input(
                    "data",
                    options=sources(),
                    tooltip=(
                        "In ComfyUI's input folder: a folder of subjects (SUBJECT/*.jpg, a caption in the .txt of the"
                        " same name), or a list .json or .jsonl of prompt, image_paths, image_tgt_path, as UNO's."
                    ),
                ),
                io.String.Input(
                    "name",
                    default="my-dla",
                    tooltip="Of the run and of its files. The same name goes on with a run, a new one begins another.",
                ),
                io.Combo.Input(
                    "stage",
                    options=STAGES,
                    default=STAGES[0],
                    tooltip=(
                        "1: prompt and references through the MLLM alone. 2: with VAE tokens too, either left out at"
                        " times, as staged sampling needs it. Begin stage 2 from stage 1's DLA."
                    ),
                ),
                io.Int.Input(
                    "steps",
                    default=1000,
                    min=1,
                    max=10_000_000,
                    tooltip="In all, with those already done. The paper: 25,000 in stage 1, then 10,000 in stage 2.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip="Of the DLA. The LoRA has its own, lora.learning_rate in the options.",
                ),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=64,
                    max=4096,
                    step=16,
                    tooltip=(
                        "In px: pictures are scaled and cut to about the area of a square of this side, in the nearest"
                        " of some aspect ratios."
                    ),
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Examples in one pass through the diffusion model. More: faster, more memory.",
                ),
                io.Int.Input(
                    "accumulate",
                    default=4,
                    min=1,
                    max=4096,
                    tooltip="Passes that make one step. More: as a larger batch_size, in time instead of memory.",
                ),
                io.Int.Input(
                    "lora_rank",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip=(
                        "Of a LoRA on the diffusion model's attention; 0: none. FLUX.1-dev needs one to read VAE"
                        " tokens. The paper: 512."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Of everything random. A run keeps the one it began with.",
                ),
                DLA.Input(
                    "dla",
                    optional=True,
                    tooltip="Begin from this DLA. Left open: a new one, which hands on the MLLM's last layer.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip=(
                        "FLUX.1: CLIP-L and T5 from the host's loader, for the pooled vector. Left open: zeros; then"
                        " leave pooled_from of Aggregate Layers open too."
                    ),
                ),
                advanced(
                    io.Combo.Input,
                    "start_lora",
                    options=[NONE, BESIDE, *files.options("loras")],
                    default=NONE,
                    optional=True,
                    tooltip=(
                        "Begin from this LoRA, of the same rank: stage 1's, in stage 2. beside the DLA: the one of the"
                        " connected DLA's name."
                    ),
                ),
                advanced(
                    io.String.Input,
                    "options",
                    default="",
                    multiline=True,
                    optional=True,
                    placeholder="other settings, e.g.\ntraining.warmup = 50\nrun.sample_every = 200",
                    tooltip='Other settings as TOML, one a line, e.g. training.optimizer = "adamw8bit". See the help.',
                ),
            ],
            outputs=[
                DLA.Output(
                    "DLA", display_name="DLA", tooltip="The trained DLA. To Encode Subject and Aggregate Layers."
                ),
                io.Image.Output("plots", display_name="plots", tooltip="Loss curve, then held-out losses."),
                io.String.Output(
                    "report", display_name="report", tooltip="Files, losses, and what was left out of the data."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, data=None, name=None, stage=None, start_lora=NONE, options="", **widgets):
        """Before any model is loaded. Raises what is wrong: hosts show that once, but a returned text for every input.
        `widgets` takes over the host's check of bounds, which the recipe has too. A linked input is None."""
        from ..training.graph_run import check

        if start_lora not in (None, NONE, BESIDE) and (problem := files.missing("loras", start_lora)):
            raise ValueError(problem)
        source = None if data is None else find(data)
        given = {"name": name, "stage": stage, "start_lora": start_lora, "options": options}
        whole = None not in (data, *given.values(), widgets.get("lora_rank"), widgets.get("seed"))
        check(recipe(source, **given, **widgets), whole)
        return True

    @classmethod
    def fingerprint_inputs(cls, data=None, **_):
        """Changed data are looked at again."""
        place = Path(folder_paths.get_input_directory()) / (data or "linked")
        found = [path for path in (place, *sorted(place.rglob("*"))) if path.is_file()]
        return str([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found])

    @classmethod
    def execute(
        cls, model, vae, mllm, data, name, stage, steps, learning_rate, resolution, batch_size, accumulate, lora_rank,
        seed, dla=None, clip=None, start_lora=NONE, options="",
    ) -> io.NodeOutput:  # fmt: skip
        from ..training.graph_run import train_in_graph

        if start_lora == BESIDE and dla is None:
            raise ValueError(
                f"Train DLA: start_lora is {BESIDE!r}, but no DLA is connected. Connect one, or set {NONE}."
            )
        settings = recipe(
            find(data), name=name, stage=stage, steps=steps, learning_rate=learning_rate, resolution=resolution,
            batch_size=batch_size, accumulate=accumulate, lora_rank=lora_rank, seed=seed, dla=dla,
            start_lora=start_lora, options=options,
        )  # fmt: skip
        trained, plots, report, samples = train_in_graph(settings, model, vae, mllm, clip)
        shown = [ui.PreviewImage(pictures, cls=cls).as_dict() for pictures in (plots, samples) if pictures is not None]
        images = [image for preview in shown for image in preview["images"]]
        return io.NodeOutput(trained, plots, report, ui={**shown[0], "images": images})


def find(data: str | None) -> Path:
    """What `data` names in the input folder. Raises ValueError where that is nothing, or nothing to train on."""
    if data not in (found := sources()):
        there = ", ".join(found[:20]) + (" and more" if len(found) > 20 else "") if found else "nothing of the kind"
        raise ValueError(
            f"Train DLA: no data {data!r} in ComfyUI's input folder; of folders and lists there is: {there}. Put a "
            "folder of subjects or a .json list there and press R."
        )
    path = Path(folder_paths.get_input_directory()) / data
    if path.is_dir() and not any(caption for place in ("*.txt", "*/*.txt") for caption in path.glob(place)):
        raise ValueError(
            f"Train DLA: the folder {data!r} has no captions, expected SUBJECT/PICTURE.jpg and SUBJECT/PICTURE.txt in "
            "it. If it holds a .json list, choose that list instead of the folder."
        )
    return path


def recipe(source: Path | None, *, name, stage, lora_rank=None, dla=None, start_lora=NONE, options="", **widgets):
    """The node's widgets as a training.recipe.Recipe; `options` has the last word. None: linked, so not known yet."""
    from ..training.recipe import Recipe, RecipeError

    if stage not in (None, *STAGES):
        raise RecipeError(f"Train DLA: stage is {stage!r}, expected {' or '.join(STAGES)}.")
    kept = ("steps", "learning_rate", "resolution", "batch_size", "accumulate", "seed")
    values = {key: widgets.get(key) for key in kept}
    values |= {"stage": stage and STAGES.index(stage) + 1, "rank": lora_rank, "start_dla": getattr(dla, "name", None)}
    values["start_lora"] = {NONE: "", BESIDE: values["start_dla"]}.get(start_lora, start_lora)
    values = {key: value for key, value in values.items() if value is not None}
    name = "linked" if name is None else name
    return Recipe.from_widgets(source or Path("linked"), name, options or "", values)


NODES = [SubjectTrainDLA]
