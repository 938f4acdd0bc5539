"""Prompt and images to CONDITIONING for Qwen-Image 2.1, whose references lie inside the text."""

from comfy_api.latest import io

from .encode import image_inputs, in_order, prompt_input
from .hints import image_count, image_hints, show_hints
from .schema import Node, output, schema


class SubjectEncodeQwenImage21(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "condition",
            node_id="SubjectEncodeQwenImage21",
            display_name="Encode Qwen-Image 2.1 for Stages",
            description=(
                "ComfyUI's Text Encode Qwen Image 2.1, run twice: with the references in the places of the images, and"
                " with the images in the text for stages without references. Needs ComfyUI 0.37 or later."
            ),
            search_aliases=["TextEncodeQwenImage21", "qwen image 2.1", "keep vision", "qwen edit"],
            inputs=[
                io.Clip.Input("clip", tooltip="Qwen-Image 2.1's text encoder (Qwen3-VL 8B)."),
                io.Vae.Input("vae", tooltip="Qwen-Image 2.1's VAE. Encodes each image as a reference."),
                prompt_input("<image1>"),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    optional=True,
                    tooltip="What to keep out of the picture, with cfg above 1. The MLLM reads it with the images.",
                ),
                *image_inputs("<image{}>"),
                io.Int.Input(
                    "resolution",
                    default=1024,
                    min=0,
                    max=4096,
                    step=32,
                    optional=True,
                    tooltip=(
                        "References are resized to about resolution x resolution pixels, at multiples of 32 and their"
                        " own aspect ratio. 0: their own size, to a multiple of 32."
                    ),
                ),
            ],
            outputs=[
                output(io.Conditioning, "positive", "To Apply Stages' sampler or guider."),
                output(io.Conditioning, "negative", "To the same sampler; not used with cfg 1."),
                output(io.Latent, "latent", "Empty, of the first reference's size: another size shifts an edit."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, vae, prompt, negative_prompt="", resolution=1024, **sockets) -> io.NodeOutput:
        from ..loaders.qwen_image21 import encode_for_stages

        images = in_order("image", sockets)
        show_hints(cls, image_hints(cls, prompt, sockets), f"Images: {image_count(sockets)}")
        return io.NodeOutput(*encode_for_stages(clip, vae, prompt, negative_prompt, images, resolution))


NODES = [SubjectEncodeQwenImage21]
