"""One node in place of Encode Subject, Aggregate Layers and Add Identity, for positive and negative."""

from comfy_api.latest import io

from .encode import SOCKETS, image_inputs, in_order, prompt_input, reference_inputs, region_input, show_placement
from .hints import image_hints
from .schema import DLA, MLLM, Node, advanced, output, schema


class SubjectConditioning(Node):
    @classmethod
    def define_schema(cls):
        masks = [
            io.Mask.Input(
                f"mask_{index}",
                optional=True,
                tooltip=f"White: the part of image_{index} to use; black parts get no VAE tokens. Is scaled to it.",
            )
            for index in range(1, SOCKETS + 1)
        ]
        return schema(
            "condition",
            words="multi subject",
            node_id="SubjectConditioning",
            display_name="Subject Conditioning",
            description=(
                "Prompts and reference images to positive, negative and an empty latent of fitting size, for any"
                " sampler: Encode Subject, Aggregate Layers and Add Identity in one node."
            ),
            search_aliases=[
                "TextEncodeQwenImageEditPlus",
                "reference images",
                "subject reference",
                "image edit",
                "qwen image edit",
                "regional reference",
                "multi reference",
                "multi subject",
                "consistent character",
                "face",
                "ipadapter",
                "pulid",
                "kontext",
                "uno",
                "mllm to conditioning",
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The DiT that will sample; its family decides sizes and placement. Not changed.",
                ),
                io.Vae.Input("vae", tooltip="The DiT's VAE; encodes the images as reference latents."),
                MLLM.Input(
                    "mllm",
                    tooltip=(
                        "From MLLM from CLIP, Load MLLM or Load Subject Pipeline. Reads the prompts together with the"
                        " images; OmniGen2's, which reads text alone, the prompts alone."
                    ),
                ),
                prompt_input(),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    placeholder="negative prompt",
                    tooltip=(
                        "What CFG leads away from; may be empty. The negative has the same reference latents. The MLLM"
                        " reads this text with the images, as the stock Qwen-Image-Edit nodes do, or, with a DLA,"
                        " alone, as DLAs are trained. Costs a pass of the MLLM: see encode_negative."
                    ),
                ),
                *image_inputs(),
                *masks,
                *(region_input(f"region_{i}", f"image_{i}") for i in range(1, SOCKETS + 1)),
                DLA.Input(
                    "dla",
                    optional=True,
                    tooltip="A DLA for this MLLM and your DiT. Without one, the context is the text encoder's own.",
                ),
                io.Conditioning.Input(
                    "pooled_from",
                    optional=True,
                    tooltip=(
                        "Its pooled vector goes to the positive: for FLUX.1 the prompt's CLIP-L encoding. Without it,"
                        " and in the negative, zeros."
                    ),
                ),
                *(
                    io.Int.Input(
                        name,
                        default=0,
                        min=0,
                        max=16384,
                        step=16,
                        tooltip=(
                            f"{name.capitalize()} of the new picture in pixels, brought to whole tokens. 0: from the"
                            " other side by the first reference's aspect ratio; both 0: about one megapixel."
                        ),
                    )
                    for name in ("width", "height")
                ),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Pictures that are made at once."),
                *reference_inputs(advanced),
                advanced(
                    io.Boolean.Input,
                    "encode_negative",
                    default=True,
                    tooltip=(
                        "Off: for CFG 1, where samplers ignore the negative (Lightning and other distilled models)."
                        " Saves the MLLM's second pass; the negative is then the positive with zeros for tokens."
                    ),
                ),
            ],
            outputs=[
                output(io.Conditioning, "positive", "To the positive of any sampler or guider."),
                output(io.Conditioning, "negative", "To the negative of any sampler or guider."),
                output(io.Latent, "latent", "Empty, of the picture's size, as the model samples it."),
            ],
        )

    @classmethod
    def execute(cls, model, vae, mllm, prompt, negative_prompt="", **options) -> io.NodeOutput:
        from ..loaders.reference_latents import cut_hints
        from ..loaders.subject_conditioning import subject_conditioning

        sockets = [in_order(name, options) for name in ("image", "mask", "region")]
        others = {name: value for name, value in options.items() if not name.startswith(("image_", "mask_", "region_"))}
        out = subject_conditioning(model, vae, mllm, prompt, negative_prompt, *sockets, **others)
        pictures = {f"image_{number}": image for number, image in enumerate(sockets[0], 1)}
        show_placement(cls, model, out[0], image_hints(cls, prompt, options) + cut_hints(model, pictures, **others))
        return io.NodeOutput(*out)


NODES = [SubjectConditioning]
