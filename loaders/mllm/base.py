"""MLLMs under the host's model management: what they share, whichever back end runs them.

A prompt becomes one chat-formatted text with one placeholder per reference image; the back end turns it into hidden
states; here it is settled which token is what.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dla.features import Features, MLLMInfo, Modality

WEIGHT_DTYPES = ("default", "bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2", "fp32")


class MLLMError(ValueError):
    """An MLLM that cannot be loaded, or cannot read what it was given, and what to do about it."""


@dataclass(frozen=True)
class Template:
    """A family's chat template. `image` holds one placeholder per picture; {} is the picture's number, from 1."""

    system: str
    system_images: str | None = None  # system prompt where there are images, if another
    image: str = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"
    tail: str = "<|im_end|>\n<|im_start|>assistant\n"

    def text(self, prompt: str, images: int = 0, system_prompt: str | None = None) -> str:
        """The whole text. A prompt that brings its own chat markup (starts with <|im_start|>) stays as it is."""
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
# Our choice: the paper does not give its template, so these say the task in one sentence.
_TASK = "Read the reference images and the text together, and picture the subjects of the images as the text describes."
QWEN3_VL = Template(system=_TASK)
INTERNVL = Template(system=_TASK, image="Image-{}: <img><IMG_CONTEXT></img>\n")


class MLLM:
    """An MLLM ready to encode. Subclasses give `template`, `default_size`, `tokenize` and `run`.

    `patcher` is the host's model patcher, for model management and LoRAs.
    """

    info: MLLMInfo
    patcher: object
    template: Template
    default_size: int
    reads_images = True

    def encode(
        self,
        prompt: str,
        images=(),
        *,
        image_size: int = 0,
        tiles: int = 0,
        system_prompt: str | None = None,
        layers=None,
    ) -> Features:
        """Hidden states of `prompt` read together with `images` (each (H, W, 3) in 0..1, from `collect_images`).

        image_size: side in px of the square that has the area at which the MLLM sees an image (InternVL: side of a
        tile); 0 = the family's default. tiles: InternVL, most tiles per image; 0 = 1. system_prompt: None or "" = the
        family's stock template. layers: layer numbers wanted, None = all of 0..L; layers above the highest are not run
        by the transformers back end. Returns Features of batch 1. Raises MLLMError.
        """
        images = list(images)
        wanted = self._wanted(layers)
        if images and not self.reads_images:
            raise MLLMError(
                f"{self.info.name} reads text only, but {len(images)} image(s) are connected. Disconnect them (this"
                " model gets its references as VAE latents, with Add Identity), or load an MLLM with eyes: Load MLLM."
            )
        if image_size and not 28 <= image_size <= 4096:
            raise MLLMError(f"image_size is {image_size}, expected 0 (default, {self.default_size}) or 28 to 4096 px.")
        if not 0 <= tiles <= 64:
            raise MLLMError(f"tiles is {tiles}, expected 0 (default, 1) to 64.")
        text = self.template.text(prompt, len(images), system_prompt)
        tail = self.template.tail if text.endswith(self.template.tail) else ""
        states, tokens, mask, counts = self.run(text, images, image_size or self.default_size, max(tiles, 1), wanted)
        modality, image_index, prefix = lay_out(tokens, counts, self.header(), len(self.tokenize(tail)) if tail else 0)
        if states.shape[2] != len(modality):
            raise MLLMError(
                f"{self.info.name} gave {states.shape[2]} tokens, expected {len(modality)} for this prompt and"
                f" {len(images)} image(s). A node has probably changed its tokenizer or its vision tower."
            )
        return Features(states, wanted, modality[None], image_index[None], mask, self.info, prefix=(prefix,))

    def run(self, text, images, size, tiles, wanted):
        """-> states (1, M, T, C); tokens, a list of ids with None for an image; mask (1, T) bool; tokens per image.
        Each loader (mllm_transformers, mllm_clip) has its own."""
        raise NotImplementedError

    def tokenize(self, text: str) -> list[int]:
        """Each loader has its own."""
        raise NotImplementedError

    def header(self) -> list[int]:
        """The three tokens that open the user's turn."""
        return self.tokenize("<|im_start|>user\n")

    def _wanted(self, layers) -> tuple[int, ...]:
        top = self.info.layers
        wanted = tuple(range(top + 1)) if layers is None else tuple(sorted({int(layer) for layer in layers}))
        if not wanted or wanted[0] < 0 or wanted[-1] > top:
            raise MLLMError(
                f"layers is {wanted}, expected numbers from 0 (embeddings) to {top}, the last of {self.info.name}."
            )
        return wanted


def lay_out(tokens: list, counts: list[int], header: list[int], tail: int) -> tuple[Tensor, Tensor, int]:
    """What each token is: modality (T,) uint8, image index (T,) int16, and the length of the prefix.

    tokens: ids, None standing for one image, which takes counts[k] positions. The prefix is what the host's Qwen-Image
    text encoder drops: everything before the second <|im_start|>, and it together with "user\\n" where these follow as
    tokens of their own. Prefix and the last `tail` tokens are TEMPLATE; vision markers are TEXT, as the stock
    conditioning keeps them.
    """
    start = [i for i, token in enumerate(tokens) if token == header[0]][:2]
    prefix = start[-1] if start else 0
    if tokens[prefix : prefix + 3] == header and len(tokens) > prefix + 3:
        prefix += 3
    modality, image_index, image = [], [], 0
    for position, token in enumerate(tokens):
        if token is None:
            modality += [Modality.IMAGE] * counts[image]
            image_index += [image] * counts[image]
            image += 1
        else:
            inside = prefix <= position < len(tokens) - tail
            modality.append(Modality.TEXT if inside else Modality.TEMPLATE)
            image_index.append(-1)
    return torch.tensor(modality, dtype=torch.uint8), torch.tensor(image_index, dtype=torch.int16), prefix


def to_area(image: Tensor, side: int) -> Tensor:
    """(H, W, 3) -> (h, w, 3), about side x side px in area, aspect kept: as the host's TextEncodeQwenImageEditPlus."""
    scale = math.sqrt(side * side / (image.shape[0] * image.shape[1]))
    size = (round(image.shape[0] * scale), round(image.shape[1] * scale))
    return F.interpolate(image[None].movedim(-1, 1), size=size, mode="area").movedim(1, -1)[0]


def list_mllms() -> list[str]:
    """Names of the Hugging Face folders under models/mllm."""
    from ..folders import mllm_names

    return mllm_names()


def load_mllm(name: str, weight_dtype: str = "default") -> MLLM:
    """The MLLM in the folder `name` under models/mllm, by transformers. Raises MLLMError."""
    from ..folders import find
    from .huggingface import load_folder

    return load_folder(find("mllm", name), weight_dtype)


def mllm_from_clip(clip, name: str = "") -> MLLM:
    """The MLLM inside a CLIP socket (the host's Qwen2.5-VL). Raises MLLMError for a text encoder that is none."""
    from .native import ClipMLLM

    return ClipMLLM(clip, name)


def read_info(name: str) -> MLLMInfo:
    """Which MLLM the folder `name` holds, from its config.json alone. Raises ValueError."""
    from ..folders import find
    from .checkpoint import read_config

    folder = find("mllm", name)
    config = read_config(folder)
    text = config.get("text_config", config)  # Qwen2.5-VL as published keeps these at the top
    for field in ("num_hidden_layers", "hidden_size"):
        if not isinstance(text.get(field), int):
            raise MLLMError(f"{folder / 'config.json'}: {field} is {text.get(field)!r}, expected a whole number.")
    return MLLMInfo(folder.name, config["model_type"], text["num_hidden_layers"], text["hidden_size"])
