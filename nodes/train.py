"""Training inside the graph: one node, which trains, saves and resumes."""

from comfy_api.latest import io, ui

from ..loaders.backbones import TRAINED, titles
from ..training.inputs import BESIDE, NO_DATA, NONE, TRAINING_STAGES, fingerprint_source, list_sources
from . import files
from .schema import DLA, MLLM, Node, advanced, schema


class SubjectTrainDLA(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "train",
            node_id="SubjectTrainDLA",
            display_name="Train DLA",
            description=(
                "Trains a Dual Layer Aggregator for this diffusion model and this MLLM and, if you like, a LoRA on the "
                "diffusion model's attention. Stopping saves; queueing again resumes. The DLA goes to "
                "models/dla and the LoRA to models/loras, under the run's name."
            ),
            search_aliases=["train", "training", "finetune", "dual layer aggregator", "lora"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip=(
                    f"{titles(TRAINED)}, from Load Diffusion Model. It is not changed.")),
                io.Vae.Input("vae", tooltip="The diffusion model's VAE. It is not changed."),
                MLLM.Input("mllm", tooltip="From Load MLLM or MLLM from CLIP. It is not changed."),
                io.Combo.Input("data", options=list_sources() or [NO_DATA], tooltip=(
                    "In ComfyUI's input folder: a folder of subjects (SUBJECT/*.jpg, a caption in the .txt of the"
                    " same name), a list .json or .jsonl of prompt, image_paths, image_tgt_path, as UNO's, or"
                    " WebDataset shards (a .tar, or a folder of them).")),
                io.String.Input("name", default="my-dla", tooltip=(
                    "Of the run and of its files. The same name resumes a run, a new one begins another.")),
                io.Combo.Input("stage", options=TRAINING_STAGES, default=TRAINING_STAGES[0], tooltip=(
                    "1: prompt and references through the MLLM alone. 2: with VAE tokens too, either left out at"
                    " times, as staged sampling needs it. Start stage 2 from stage 1's DLA.")),
                io.Int.Input("steps", default=1000, min=1, max=10_000_000, tooltip=(
                    "In all, with those already done. The paper: 25,000 in stage 1, then 10,000 in stage 2.")),
                io.Float.Input("learning_rate", default=1e-4, min=0.0, max=1.0, step=1e-6, round=False, tooltip=(
                    "Of the DLA. The LoRA has its own, lora.learning_rate in the options.")),
                io.Int.Input("resolution", default=512, min=64, max=4096, step=16, tooltip=(
                    "In px: images are scaled and cropped to about the area of a square of this side, in the nearest"
                    " of some aspect ratios.")),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip=(
                    "Examples in one pass through the diffusion model. More: faster, more memory.")),
                io.Int.Input("accumulate", default=4, min=1, max=4096, tooltip=(
                    "Passes that make one step. More: as a larger batch_size, in time instead of memory.")),
                io.Int.Input("lora_rank", default=0, min=0, max=4096, tooltip=(
                    "Of a LoRA on the diffusion model's attention; 0: none. FLUX.1-dev needs one to read VAE"
                    " tokens. The paper: 512.")),
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=False, tooltip=(
                    "Of everything random. A run keeps the one it began with.")),
                DLA.Input("dla", optional=True, tooltip=(
                    "Start from this DLA. Not connected: a new one, which passes on the MLLM's last layer.")),
                io.Clip.Input("clip", optional=True, tooltip=(
                    "FLUX.1: CLIP-L and T5 from the host's loader, for the pooled vector. Not connected: zeros;"
                    " then leave pooled_from of Aggregate Layers unconnected too.")),
                advanced(io.Combo.Input, "start_lora", options=[NONE, BESIDE, *files.options("loras")], default=NONE,
                         optional=True, tooltip=(
                    "Start from this LoRA, of the same rank: stage 1's, in stage 2. beside the DLA: the one of the"
                    " connected DLA's name.")),
                advanced(io.String.Input, "options", default="", multiline=True, optional=True,
                         placeholder="other settings, e.g.\ntraining.warmup = 50\nrun.sample_every = 200", tooltip=(
                    'Other settings as TOML, one a line, e.g. training.optimizer = "adamw8bit". See the help.')),
            ],
            outputs=[
                DLA.Output("DLA", display_name="DLA", tooltip=(
                    "The trained DLA. To Encode Subject and Aggregate Layers.")),
                io.Image.Output("plots", display_name="plots", tooltip="Loss curve, then held-out losses."),
                io.String.Output("report", display_name="report", tooltip=(
                    "Files, losses, and what was left out of the data.")),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, **widgets):
        """Raises what is wrong, since hosts show that once, but a returned text for every input."""
        from ..training.graph_run import check_inputs

        check_inputs(**{"data": NO_DATA, **widgets})  # queued by the API without any; a link is there, as None
        return True

    @classmethod
    def fingerprint_inputs(cls, data=None, **_):
        return fingerprint_source(data)

    @classmethod
    def execute(cls, model, vae, mllm, **widgets) -> io.NodeOutput:
        from ..training.graph_run import train_in_graph

        trained, plots, report, samples = train_in_graph(model, vae, mllm, **widgets)
        shown = [ui.PreviewImage(images, cls=cls).as_dict() for images in (plots, samples) if images is not None]
        return io.NodeOutput(trained, plots, report, ui={**shown[0], "images": sum((s["images"] for s in shown), [])})


NODES = [SubjectTrainDLA]
