"""One record for each MLLM architecture; both back ends read it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...dla.features import MLLMInfo
from ..preprocessing import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD
from .templates import FLUX2, GEMMA, GEMMA3, GEMMA4, INTERNVL, KLEIN, OMNIGEN2, QWEN3_VL, QWEN_IMAGE, Template
from .vision import Vision


@dataclass(frozen=True)
class MLLMFamily:
    """What all MLLMs of one architecture share; a CLIP socket's template and context are its text encoder's."""

    name: str  # `model_type` in a Hugging Face folder's config.json
    template: Template
    vision: Vision | None  # of the vision tower; None = reads text only
    placeholder: str = "<|image_pad|>"  # token in the template that stands for an image
    default_size: int = 384  # px, side of the square with the area at which an image is read (tiled: of a tile)
    tiled: bool = False  # whether images are cut into square tiles, as InternVL does
    pooled: bool = False  # whether patches are averaged to tokens, as Gemma 4 does
    mrope: bool = True  # whether positions count time, height and width
    bidirectional: bool = False  # whether tokens of one image see each other in every layer
    # whether a token's states depend on those before it alone, through keys and values: transformers' Qwen3.5 continues
    # its linear attention one token at a time, Gemma 4 slides its window and shares keys between layers
    keeps_prefix: bool = True
    start: str = ""  # token before every text; a CLIP's tokenizer adds its own
    markers: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")  # of the template, that a folder's tokenizer must know
    # model types of the config's parts, where the library would build any: with tables, or code of further packages
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    transformers: str = "4.57"  # the release from which on it can load a folder

    def info(self, name: str, layers: int, width: int, drop_leading_template: bool = True) -> MLLMInfo:
        """MLLMInfo of one such MLLM."""
        return MLLMInfo(name, self.name, layers, width, drop_leading_template)


FAMILIES = {
    family.name: family
    for family in (
        # 384: as the host's TextEncodeQwenImageEditPlus
        MLLMFamily("qwen2_5_vl", QWEN_IMAGE, Vision(14, 2, CLIP_MEAN, CLIP_STD)),
        MLLMFamily("qwen3_vl", QWEN3_VL, Vision(16, 2, HALF, HALF)),
        MLLMFamily(
            "internvl", INTERNVL, Vision(14, 2, IMAGENET_MEAN, IMAGENET_STD), "<IMG_CONTEXT>", 448, True, mrope=False,
            parts={"text_config": ("qwen2", "qwen3", "llama"), "vision_config": ("internvl_vision",)},
        ),
        MLLMFamily("qwen2_5", OMNIGEN2, None),
        MLLMFamily("qwen3", KLEIN, None),
        MLLMFamily("mistral3", FLUX2, None),
        MLLMFamily("qwen3_5", QWEN3_VL, Vision(16, 2, HALF, HALF), keeps_prefix=False, transformers="5.2"),
        MLLMFamily("gemma2", GEMMA, None),
        MLLMFamily(
            "gemma3", GEMMA3, Vision(14, 4, HALF, HALF), "<image_soft_token>", 896, mrope=False, bidirectional=True,
            keeps_prefix=False,
        ),
        MLLMFamily(  # 768: within the 280 tokens per image of its own processor
            "gemma4", GEMMA4, Vision(16, 3, (0.0,) * 3, (1.0,) * 3), "<|image|>", 768, pooled=True, mrope=False,
            keeps_prefix=False,            start="<bos>", markers=("<|turn>", "<turn|>"), transformers="5.6",
        ),
    )
}  # fmt: skip
FOLDER_FAMILIES = ["internvl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma4"]  # read from Hugging Face folders
