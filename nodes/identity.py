"""DINO-I, CLIP-I and CLIP-T of a whole queue's pictures, with the backbone beside every metric."""

from comfy_api.latest import io, ui

from .files import report_path, save_reports
from .queued_graph import model_files
from .schema import CAPTION_TIP, NONE, Node, advanced, output, schema

ONE_EACH = " One per line, or a list: for each picture, or for each item of a list of batches, or one for all."


class SubjectIdentityScores(Node):
    @classmethod
    def define_schema(cls):
        from ..loaders.embedders import folder_names

        return schema(
            "measure",
            node_id="SubjectIdentityScores",
            display_name="Identity Scores",
            description=(
                "How alike outputs and references are (DINO-I, CLIP-I) and how well outputs follow their prompts"
                " (CLIP-T): mean cosines with 95 % intervals over all pictures of the queue, the backbone beside each."
                " What is left open is not reported; a JSON file goes to the output folder. High scores also come from"
                " copying: see Copy-Paste Report."
            ),
            search_aliases=["dino score", "clip score", "CLIP-I", "CLIP-T", "DINO-I", "similarity", "dreambench"],
            is_input_list=True,
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            inputs=[
                io.Image.Input("images", tooltip="The outputs: a picture, a batch, or a list of either."),
                io.Image.Input(
                    "references",
                    tooltip="A picture, a batch, or a list. Each output meets every reference of its subject.",
                ),
                io.ClipVision.Input(
                    "dino",
                    optional=True,
                    tooltip="For DINO-I: a DINOv2 from Load CLIP Vision (facebook/dinov2-large or -giant).",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="For CLIP-I and the picture half of CLIP-T: a CLIP from Load CLIP Vision, as ViT-L/14.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip=(
                        "For CLIP-T: the text encoder of the same CLIP, with its text projection. FLUX's"
                        " clip_l.safetensors lacks it; openai/clip-vit-large-patch14's model.safetensors has both"
                        " halves."
                    ),
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    optional=True,
                    default="",
                    placeholder="one prompt per line",
                    tooltip="For CLIP-T: what the outputs should show." + ONE_EACH,
                ),
                io.String.Input(
                    "subjects",
                    multiline=True,
                    optional=True,
                    default="",
                    placeholder="the subject of each output",
                    tooltip="Whom the outputs show; empty: all pictures show one subject." + ONE_EACH,
                ),
                io.String.Input(
                    "reference_subjects",
                    multiline=True,
                    optional=True,
                    default="",
                    placeholder="the subject of each reference",
                    tooltip="Whom the references show, in the same words as in subjects." + ONE_EACH,
                ),
                io.String.Input(
                    "filename_prefix",
                    optional=True,
                    default="identity/scores",
                    tooltip=(
                        "Of the JSON file in the output folder, as in Save Image: it may hold folders and parts such"
                        " as %year%."
                    ),
                ),
                advanced(
                    io.Combo.Input,
                    "dino_folder",
                    options=[NONE, *folder_names("dino")],
                    default=NONE,
                    optional=True,
                    tooltip=(
                        "DINO-I by a Hugging Face folder in models/clip_vision (DINO, DINOv2), also beside dino."
                        " facebook/dino-vits16 is DreamBench's."
                    ),
                ),
                advanced(
                    io.Combo.Input,
                    "clip_folder",
                    options=[NONE, *folder_names("clip")],
                    default=NONE,
                    optional=True,
                    tooltip=(
                        "CLIP-I and CLIP-T by a Hugging Face folder in models/clip_vision, also beside clip_vision."
                        " openai/clip-vit-base-patch32 is what published tables mostly use."
                    ),
                ),
            ],
            outputs=[
                output(io.String, "report", "The table with backbones and notes."),
                output(io.String, "json", "Every metric with its pairs, backbone and preprocessing, as JSON."),
                output(io.String, "figures", CAPTION_TIP, is_list=True),
            ],
        )

    @classmethod
    def execute(
        cls, images, references, dino=None, clip_vision=None, clip=None, prompts=None, subjects=None,
        reference_subjects=None, filename_prefix=("identity/scores",), dino_folder=None, clip_folder=None,
    ) -> io.NodeOutput:  # fmt: skip
        from comfy.utils import ProgressBar

        from ..evaluation.identity_scores import identity_scores

        path = report_path(filename_prefix[0])
        sockets = {"dino": dino, "clip_vision": clip_vision, "clip": clip}
        chosen = {**sockets, "dino_folder": dino_folder, "clip_folder": clip_folder}
        models = {name: values[0] for name, values in chosen.items() if values and values[0] not in (None, NONE)}
        texts = {"prompts": prompts, "subjects": subjects, "reference_subjects": reference_subjects}
        files = {socket: model_files(cls.hidden, socket) for socket in sockets}
        found = identity_scores(images, references, models, texts, files, ProgressBar)
        save_reports(path, json=found.json)
        return io.NodeOutput(found.text, found.json, found.captions, ui=ui.PreviewText(found.text))


NODES = [SubjectIdentityScores]
