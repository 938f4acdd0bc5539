"""Chat templates: the text that an MLLM reads around a prompt and its images."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """A family's chat template."""

    system: str
    system_images: str | None = None  # system prompt where there are images, if another
    image: str = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"  # for each image; {} = its number, from 1
    tail: str = "<|im_end|>\n<|im_start|>assistant\n"

    def text(self, prompt: str, images: int = 0, system_prompt: str | None = None) -> str:
        """The whole text, with one placeholder per image; a prompt that starts with <|im_start|> is kept as it is."""
        if not images and prompt.startswith("<|im_start|>"):
            return prompt
        system = system_prompt or (self.system_images if images and self.system_images else self.system)
        pictures = "".join(self.image.format(number) for number in range(1, images + 1))
        return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{pictures}{prompt}{self.tail}"


# Word for word the host's: its Qwen-Image text encoder without images, its TextEncodeQwenImageEditPlus with images.
QWEN_IMAGE = Template(
    system="Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of"
    " the objects and background:",
    system_images="Describe the key features of the input image (color, shape, size, texture, objects, background),"
    " then explain how the user's text instruction should alter or modify the image. Generate a new image that meets"
    " the user's requirements while maintaining consistency with the original input where appropriate.",
)
# The host's OmniGen2 text encoder. Its stock model keeps every token.
OMNIGEN2 = Template(
    system="You are a helpful assistant that generates high-quality images based on user instructions.",
    tail="<|im_end|>\n",
)
# Our choice: the paper does not give its template, so these state the task in one sentence.
_TASK = "Read the reference images and the text together, and picture the subjects of the images as the text describes."
QWEN3_VL = Template(system=_TASK)
INTERNVL = Template(system=_TASK, image="Image-{}: <img><IMG_CONTEXT></img>\n")
