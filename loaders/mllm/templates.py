"""Chat templates: the text that an MLLM reads around a prompt and its images."""

from dataclasses import dataclass, replace

CHATML_SYSTEM = "<|im_start|>system\n{}<|im_end|>\n"


@dataclass(frozen=True)
class Template:
    """A family's chat template."""

    system: str  # "" = none
    system_images: str | None = None  # system prompt where there are images, if another
    system_empty: str | None = None  # where there are no images and no words, if another
    image: str = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"  # for each image; {} = its number, from 1
    between: str = ""  # between two images
    empty: str = ""  # in place of a prompt of no words
    tail: str = "<|im_end|>\n<|im_start|>assistant\n"
    around: str = CHATML_SYSTEM  # what stands around a system prompt
    turn: str = "<|im_start|>user\n"  # opens the user's turn
    by_host: bool = False  # the host's tokenizer puts the template around the prompt, if the system prompt is its own
    whole: str = "<|im_start|>"  # a prompt without images that starts so is kept as it is; "" = none is

    def text(self, prompt: str, images: int = 0, system_prompt: str | None = None) -> str:
        """The whole text, with one placeholder per image."""
        if not images and self.whole and prompt.startswith(self.whole):
            return prompt
        if self.by_host and not system_prompt:
            return prompt
        system = self.system
        if images and self.system_images is not None:
            system = self.system_images
        elif not images and not prompt.strip() and self.system_empty is not None:
            system = self.system_empty
        system = system_prompt or system
        opening = self.around.format(system) if system else ""
        pictures = self.between.join(self.image.format(number) for number in range(1, images + 1))
        return f"{opening}{self.turn}{pictures}{prompt or self.empty}{self.tail}"


# Word for word the host's: its Qwen-Image text encoder without images, its TextEncodeQwenImageEditPlus with images.
_DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the"
    " objects and background:"
)
_EDIT = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how"
    " the user's text instruction should alter or modify the image. Generate a new image that meets the user's"
    " requirements while maintaining consistency with the original input where appropriate."
)
QWEN_IMAGE = Template(system=_DESCRIBE, system_images=_EDIT)
# The host's OmniGen2 text encoder. Its stock model keeps every token.
OMNIGEN2 = Template(
    system="You are a helpful assistant that generates high-quality images based on user instructions.",
    tail="<|im_end|>\n",
)
# Our choice: the paper does not give its template, so these state the task in one sentence.
_TASK = "Read the reference images and the text together, and picture the subjects of the images as the text describes."
QWEN3_VL = Template(system=_TASK)
INTERNVL = Template(system=_TASK, image="Image-{}: <img><IMG_CONTEXT></img>\n")

# Word for word the host's, of its text encoders of these names
_BARE_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_IMAGE_2_1 = Template(
    system="Comprehend and analyze the provided prompt.", image="<image{}>" + _BARE_IMAGE, between=" ", empty=" "
)
KREA2 = Template(system=_DESCRIBE)  # the host has no edit node for it; its images are numbered as Qwen-Image's
MAGE_FLOW = Template(system=_DESCRIBE, system_images=_EDIT, image="Image {}: " + _BARE_IMAGE)
BOOGU = Template(
    system="You are a helpful assistant that generates high-quality images based on user instructions. The instructions"
    " are as follows.",
    system_images=_EDIT,
    system_empty=_EDIT,
    image=_BARE_IMAGE,
    tail="<|im_end|>\n",
)
KLEIN = Template(system="", tail="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", whole="")
Z_IMAGE = Template(system="", whole="")
FLUX2 = Template(
    system="You are an AI that reasons about image descriptions. You give structured responses focusing on object"
    " relationships, object\nattribution and actions without speculation.",
    around="[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]",
    turn="[INST]",
    tail="[/INST]",
    whole="",
)
IDEOGRAM4 = Template(system="")
GEMMA = Template(system="", around="", turn="", tail="", whole="")  # the prompt alone
GEMMA3 = replace(GEMMA, image="Picture {}: <image_soft_token>\n")
GEMMA4 = Template(
    system=_TASK,
    image="Picture {}: <|image><|image|><image|>\n",
    tail="<turn|>\n<|turn>model\n",
    around="<|turn>system\n{}<turn|>\n",
    turn="<|turn>user\n",
    whole="<|turn>",
)
LONGCAT = Template(
    system="As an image captioning expert, generate a descriptive text prompt based on an image content, suitable for"
    " input to a text-to-image model.",
    system_images="As an image editing expert, first analyze the content and attributes of the input image(s). Then,"
    " based on the user's editing instructions, clearly and precisely determine how to modify the given image(s),"
    " ensuring that only the specified parts are altered and all other aspects remain consistent with the original(s).",
    image=_BARE_IMAGE,
    by_host=True,  # it also pads the words, before the tail, and reads quoted ones letter by letter
)
JOYIMAGE = Template(system=f" \\n{_DESCRIBE}", image=_BARE_IMAGE)
