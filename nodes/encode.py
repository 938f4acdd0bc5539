"""Nodes from prompt and images to CONDITIONING: MLLM features, their aggregation, and reference latents."""

import logging
from typing import Any

from comfy_api.latest import io

from ..common.files import path_problem
from .files import file_names
from .hints import image_count, image_hints, show_hints
from .marks import Marks
from .queued_graph import model_files, queued
from .schema import DLA, MLLM, Features, Node, Stages, advanced, schema, with_title

log = logging.getLogger(__name__)

SOCKETS = 5  # image inputs of a node; each may carry a batch


def prompt_input(first: str = "image 1") -> io.String.Input:
    """The words that an MLLM reads together with the images, which they call as `first` says."""
    return io.String.Input(
        "prompt",
        multiline=True,
        dynamic_prompts=True,
        default="",
        placeholder=f"what the picture shows, e.g. the backpack of {first} on a mossy rock",
        tooltip="What the new picture shows. The MLLM reads it together with the images. May be empty.",
    )


def image_inputs(name: str = "image {}") -> list[io.Image.Input]:
    """The sockets image_1, image_2 and so on, and what the prompt calls them."""
    return [
        io.Image.Input(
            f"image_{index}",
            optional=True,
            tooltip=f'"{name.format(index)}" in the prompt. A batch is several references; ten in all at most.',
        )
        for index in range(1, SOCKETS + 1)
    ]


def in_order(name: str, sockets: dict) -> list:
    """What the sockets name_1, name_2, … bring, None where nothing is connected: error texts give the number."""
    return [sockets.get(f"{name}_{number}") for number in range(1, SOCKETS + 1)]


def reference_inputs(make) -> list:
    """How references go in; make(type, id, …) makes each input."""
    from ..loaders.backbones import BACKBONES

    releases = [release.title for backbone in BACKBONES.values() for release in backbone.releases]
    return [
        make(
            io.Float.Input,
            "strength",
            default=1.0,
            min=0.0,
            max=2.0,
            step=0.01,
            tooltip=(
                "Strength of this reference, multiplied by the schedule's VAE strength. 1: the model's own"
                " behaviour; 0: the reference is left out; else attention to it is weighted by this factor."
            ),
        ),
        make(
            io.Int.Input,
            "size",
            default=0,
            min=0,
            max=4096,
            step=16,
            tooltip=(
                "Longest side of the reference in pixels before encoding; the aspect ratio is kept. 0: the"
                " family's default (UNO placement 512, else about one megapixel)."
            ),
        ),
        make(
            io.Combo.Input,
            "placement",
            options=["auto", *releases, "uxo", "offset", "index", "index_timestep_zero"],
            default="auto",
            tooltip=(
                "Positions of the reference's tokens beside the picture's. auto: the family's own; on FLUX.1 that"
                " of UNO, USO and the paper, also for a Kontext file: choose Kontext then. Choose by the model's name"
                " where it is listed; the last four are ComfyUI's names: uxo (UNO, USO), offset (Kontext), index"
                " (also for Kontext; Qwen-Image-Edit), index_timestep_zero (Qwen-Image-Edit 2511)."
            ),
        ),
    ]


def show_placement(node, model, conditioning, hints=()) -> None:
    """Shows placement and hints on the node, and warns where the names of the model's files want another placement."""
    from ..loaders.reference_latents import report_placement

    for hint in hints:
        log.warning("%s", with_title(node, hint))
    files = model_files(node.hidden, "model", chain=True)
    report_placement(model, conditioning, files, node.hidden.unique_id if node.hidden else None, hints)


def region_input(name: str, reference: str):
    """Where in the new picture a reference is read."""
    return io.Mask.Input(
        name,
        optional=True,
        tooltip=(
            f"White: the part of the new picture that reads {reference}, so that subjects do not mix; soft edges are"
            " kept. Is scaled to the picture. Read by Apply Stages, Staged Sampler and Staged Guider; samplers on a"
            " model without stages ignore it."
        ),
    )


MOST_PROMPTS = 10_000  # of a list, whose names are made while the host validates: half a second
NO_LINE = "prompts has no line with text, expected at least one. Write one prompt per line."


class SubjectPromptList(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "condition",
            node_id="SubjectPromptList",
            display_name="Prompt List",
            description=("One prompt per line: the nodes behind it run once for each prompt, in one queued job."),
            search_aliases=["batch prompts", "prompts from lines", "multiple prompts", "string list"],
            inputs=[
                io.String.Input(
                    "prompts",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    placeholder="one prompt per line",
                    tooltip="One prompt per line. Empty lines and lines that begin with # are skipped.",
                ),
                io.String.Input(
                    "prefix",
                    default="subject/",
                    optional=True,
                    tooltip="What the file names begin with; up to a slash, a folder in ComfyUI's output folder.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "prompt",
                    display_name="prompt",
                    is_output_list=True,
                    tooltip="A list of prompts. To the prompt of Encode Subject or any other text input.",
                ),
                io.String.Output(
                    "file_name",
                    display_name="file_name",
                    is_output_list=True,
                    tooltip="A name for each: number and first words. To filename_prefix of Save Image.",
                ),
            ],
        )

    validate_inputs = Marks(lambda node_id: _problems(queued(node_id).get("prompts"), queued(node_id).get("prefix")))

    @classmethod
    def execute(cls, prompts, prefix="") -> io.NodeOutput:
        if problems := [*filter(None, _problems(prompts, prefix).values())]:
            raise ValueError("\n".join(problems))
        found = _lines(prompts)
        return io.NodeOutput(found, file_names(found, prefix))


def _lines(prompts: str) -> list[str]:
    """The lines that are prompts."""
    lines = [line.strip() for line in prompts.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _problems(prompts: Any, prefix: Any) -> dict[str, str | None]:
    """What is wrong with a list of prompts and the beginning of its file names, by input; of links nothing is known."""
    found = _lines(prompts) if isinstance(prompts, str) else None
    if found and len(found) > MOST_PROMPTS:
        text = (
            f"prompts has {len(found)} lines with text, expected at most {MOST_PROMPTS}. Queue them in several lists."
        )
        return {"prompts": text, "prefix": None}
    names = file_names(found or [""], prefix) if isinstance(prefix, str) else []
    bad = next(filter(None, map(path_problem, names)), None)  # Save Image would say so after sampling
    return {
        "prompts": NO_LINE if found == [] else None,
        "prefix": bad
        and f"prefix is {prefix!r:.100}, with which a file's name {bad}. Expected a name in ComfyUI's output folder,"
        " with folders or without, such as subject/.",
    }


class SubjectEncode(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "condition",
            node_id="SubjectEncode",
            display_name="Encode Subject",
            description="The MLLM reads prompt and reference images together: hidden states of every layer and token.",
            search_aliases=["mllm encode", "text and image encode", "subject reference", "multimodal prompt"],
            inputs=[
                MLLM.Input("mllm", tooltip="From Load MLLM, MLLM from CLIP or Load Subject Pipeline."),
                prompt_input(),
                *image_inputs(),
                DLA.Input(
                    "dla",
                    optional=True,
                    tooltip="Checks this DLA against the MLLM, and runs only the layers that it pools.",
                ),
                advanced(
                    io.Int.Input,
                    "image_size",
                    default=0,
                    min=0,
                    max=2048,
                    step=28,
                    tooltip=(
                        "Size at which the MLLM reads each image, in pixels (side of a square of the same area, for"
                        " InternVL of a tile; the aspect ratio is kept). 0: the MLLM's own default."
                    ),
                ),
                advanced(
                    io.Int.Input,
                    "tiles",
                    default=0,
                    min=0,
                    max=12,
                    tooltip="InternVL only: most tiles per image. More: finer detail, more tokens. 0: one tile.",
                ),
                advanced(
                    io.String.Input,
                    "system_prompt",
                    multiline=True,
                    default="",
                    placeholder="empty: the MLLM's stock template",
                    tooltip="Replaces the MLLM's system prompt. Leave empty unless your DLA was trained with another.",
                ),
            ],
            outputs=[
                Features.Output(
                    "features",
                    display_name="features",
                    tooltip="Hidden states, with each token's modality and image. To Aggregate Layers.",
                )
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, mllm, prompt, dla=None, image_size=0, tiles=0, system_prompt="", **images) -> io.NodeOutput:
        from ..loaders.mllm import encode_subject

        options = {"image_size": image_size, "tiles": tiles, "system_prompt": system_prompt}
        show_hints(cls, image_hints(cls, prompt, images), f"Images: {image_count(images)}")
        return io.NodeOutput(encode_subject(mllm, prompt, in_order("image", images), dla, **options))


class SubjectAggregateLayers(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "condition",
            node_id="SubjectAggregateLayers",
            display_name="Aggregate Layers",
            description="Pools the MLLM's layers into the DiT's context tokens; without a DLA they are the stock ones.",
            search_aliases=["dla", "layerwise attention pooling", "mllm to conditioning"],
            inputs=[
                Features.Input("features", tooltip="From Encode Subject."),
                DLA.Input(
                    "dla",
                    optional=True,
                    tooltip=(
                        "A DLA for this MLLM and your DiT. Without one, the context is that of the MLLM's own text"
                        " encoder (the last layer, or several side by side)."
                    ),
                ),
                advanced(
                    io.Combo.Input,
                    "template",
                    options=["auto", "keep", "drop"],
                    default="auto",
                    tooltip=(
                        "Tokens of the chat template that go to the DiT. auto: as the stock model (Qwen-Image drops"
                        " what precedes the user's words) or as the DLA was trained. keep: all. drop: none."
                    ),
                ),
                advanced(
                    io.Float.Input,
                    "vit_blend",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip=(
                        "Without a DLA: share of the vision encoder's own features mixed into the image tokens of the"
                        " last layer (the paper's baseline). 0: none."
                    ),
                ),
                io.Conditioning.Input(
                    "pooled_from",
                    optional=True,
                    tooltip="Its pooled vector is copied: for FLUX.1 the prompt's CLIP-L encoding, else zeros.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning",
                    display_name="conditioning",
                    tooltip="Context tokens for the DiT. To Add Identity, or straight to a sampler for MLLM only.",
                )
            ],
        )

    @classmethod
    def execute(cls, features, dla=None, template="auto", vit_blend=0.0, pooled_from=None) -> io.NodeOutput:
        from ..loaders.conditioning import aggregate_conditioning

        return io.NodeOutput(
            aggregate_conditioning(features, dla, template=template, vit_blend=vit_blend, pooled_from=pooled_from)
        )


class SubjectAddIdentity(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "condition",
            words="UNO, face, reference",
            node_id="SubjectAddIdentity",
            display_name="Add Identity",
            description=(
                "Encodes reference images with the VAE and adds them to the conditioning as reference latents, sized"
                " and placed as the model's family expects. Chain several for references with strengths and masks of"
                " their own."
            ),
            search_aliases=[
                "reference",
                "reference image",
                "reference latent",
                "add reference",
                "reference strength",
                "consistent character",
                "character reference",
                "face",
                "face id",
                "ipadapter",
                "pulid",
                "multi subject",
                "regional reference",
                "region mask",
                "uno",
                "uso",
                "kontext",
                "subject identity",
                "ReferenceLatent",
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip="From Aggregate Layers, CLIP Text Encode or another Add Identity."
                ),
                io.Model.Input(
                    "model",
                    tooltip="The DiT that will sample; its family decides size, crop and placement. Not changed.",
                ),
                io.Vae.Input("vae", tooltip="The DiT's VAE."),
                io.Image.Input("image", tooltip="The reference; a batch is several references with the same strength."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White: the part of the reference to use; black parts get no tokens. Is scaled to it.",
                ),
                *reference_inputs(lambda kind, *name, **options: kind(*name, **options)),
                region_input("region", "this reference"),
                Stages.Input(
                    "stages",
                    optional=True,
                    tooltip=(
                        "A schedule for this reference alone, from Stage Schedule or Stage Keyframe, on any clock: its"
                        " VAE strength is multiplied into the run's. Its MLLM strength is ignored. Needs Apply Stages,"
                        " Staged Sampler or Staged Guider; other samplers ignore it."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "with_identity",
                    display_name="conditioning",
                    tooltip="The context with reference latents. To Staged Sampler, Staged Guider or any sampler.",
                )
            ],
        )

    @classmethod
    def execute(cls, conditioning, model, vae, image, mask=None, **settings) -> io.NodeOutput:
        from ..loaders.reference_latents import add_identity, cut_hints

        out = add_identity(conditioning, model, vae, image, mask, **settings)
        hints = image_hints(cls, "", {"image": image, "mask": mask}) + cut_hints(model, {"image": image}, **settings)
        show_placement(cls, model, out, hints)
        return io.NodeOutput(out)


NODES = [SubjectPromptList, SubjectEncode, SubjectAggregateLayers, SubjectAddIdentity]
