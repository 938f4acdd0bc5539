"""One record for each of the host's text encoders that holds an LLM: what is behind a CLIP socket."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...common.markdown import markdown
from ...dla.features import StockContext
from . import templates
from .families import FAMILIES, MLLMFamily
from .templates import Template
from .vision import to_area, to_long_edge, to_square


@dataclass(frozen=True)
class HostEncoder:
    """One text encoder of the host. The tests compare each record with the host's own encode nodes.

    Source: the host's comfy/text_encoders, read at 0.3.75 and 0.33.0.
    """

    title: str  # for people: the stock model, and the LLM
    kind: str  # type of the host's Load CLIP; "" = any without a record of its own
    family: MLLMFamily
    keys: tuple[str, ...]  # names under which the host's class holds the LLM
    host_class: str = ""  # how its name begins; "" = every other class that holds such an LLM
    template: Template | None = None  # None = the family's
    stock: StockContext = StockContext()
    drop_leading_template: bool = True  # whether the stock model drops what precedes the user's turn before its DiT
    drop_header: bool = True  # and the line that opens that turn with it
    prefix: int | None = None  # tokens dropped, where the host counts them instead of looking for the turn
    text_only: bool = False  # whether images are refused although the LLM reads them
    own_images: bool = False  # whether this pack prepares and rotates images, since the host does not as the original
    cut_tail: bool = False  # whether the stock model drops the template's tail, too
    image_sizes: str = ""  # of the LLM that read images, where others do not
    most_images: int | None = None  # that its template has room for
    default_size: int = 0  # px, as in MLLMFamily; 0 = the family's
    resize: Callable[[Tensor, int], Tensor] = to_area  # of an image (H, W, 3) to a size in px

    @property
    def reads_images(self) -> bool:
        """Whether images are read; a loaded encoder may lack its vision tower."""
        return self.family.vision is not None and not self.text_only


_QWEN3_VL_4B, _QWEN3_VL_8B = ("qwen3vl_4b",), ("qwen3vl_8b",)
_VL, _VL3 = FAMILIES["qwen2_5_vl"], FAMILIES["qwen3_vl"]
_WHOLE = StockContext(always_masked=True)
_IDEOGRAM = StockContext((1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 36), interleaved=True, always_masked=True)

ENCODERS = (
    HostEncoder("Qwen-Image (Qwen2.5-VL 7B)", "qwen_image", _VL, ("qwen25_7b",)),
    HostEncoder(
        "OmniGen2 (Qwen2.5 3B)", "omnigen2", FAMILIES["qwen2_5"], ("qwen25_3b",),
        stock=_WHOLE, drop_leading_template=False,
    ),
    HostEncoder(  # images as tokens of its own; as reference latents the stock model drops their tokens
        "Qwen-Image 2.1 (Qwen3-VL 8B)", "qwen_image", _VL3, _QWEN3_VL_8B, "QwenImage21TEModel",
        templates.QWEN_IMAGE_2_1, StockContext(normed=False), drop_header=False, default_size=1024,
    ),
    HostEncoder(
        "Krea 2 (Qwen3-VL 4B)", "krea2", _VL3, _QWEN3_VL_4B, "Krea2TEModel", templates.KREA2,
        StockContext((2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)),
    ),
    HostEncoder(
        "Mage-Flow (Qwen3-VL 4B)", "mage", _VL3, _QWEN3_VL_4B, "MageFlowTEModel", templates.MAGE_FLOW,
        resize=to_long_edge,
    ),
    HostEncoder(
        "Boogu (Qwen3-VL 8B)", "boogu", _VL3, _QWEN3_VL_8B, "BooguTEModel", templates.BOOGU, _WHOLE,
        drop_leading_template=False,
    ),
    HostEncoder(
        "JoyImage (Qwen3-VL 8B)", "joyimage", _VL3, _QWEN3_VL_8B, "JoyImageTEModel", templates.JOYIMAGE,
        StockContext(normed=False, always_masked=True), prefix=34, default_size=1024,
    ),
    HostEncoder(
        "FLUX.2 Klein (Qwen3 4B, 8B)", "flux2", FAMILIES["qwen3"], ("qwen3_4b", "qwen3_8b"), "Flux2TEModel",
        stock=StockContext((9, 18, 27), padding=True, always_masked=True), drop_leading_template=False,
    ),
    HostEncoder(
        "Z-Image (Qwen3 4B)", "lumina2", FAMILIES["qwen3"], ("qwen3_4b",), "ZImageTEModel", templates.Z_IMAGE,
        StockContext((-2,), always_masked=True), drop_leading_template=False,
    ),
    HostEncoder(
        "FLUX.2 dev (Mistral3 24B)", "flux2", FAMILIES["mistral3"], ("mistral3_24b",),
        stock=StockContext((10, 20, 30), always_masked=True), drop_leading_template=False,
    ),
    HostEncoder(
        "Ideogram 4 (Qwen3-VL 8B)", "ideogram4", _VL3, _QWEN3_VL_8B, "Ideogram4", templates.IDEOGRAM4,
        _IDEOGRAM, drop_leading_template=False,
    ),
    HostEncoder(
        "LongCat-Image (Qwen2.5-VL 7B)", "longcat_image", _VL, ("qwen25_7b",), "LongCatImageTEModel", templates.LONGCAT,
        StockContext(padding=True), cut_tail=True, most_images=1, default_size=1024,
    ),
    HostEncoder(
        "Lumina 2 (Gemma 2 2B)", "lumina2", FAMILIES["gemma2"], ("gemma2_2b",),
        stock=StockContext((-2,), always_masked=True), drop_leading_template=False,
    ),
    HostEncoder(
        "Gemma 3 4B", "lumina2", FAMILIES["gemma3"], ("gemma3_4b", "gemma3_4b_vision"),
        stock=StockContext((-2,), always_masked=True), drop_leading_template=False, resize=to_square,
    ),
    HostEncoder(
        "Gemma 3 12B, also LTX-2's", "", FAMILIES["gemma3"], ("gemma3_12b",),
        drop_leading_template=False, resize=to_square,
    ),
    # the LLMs of no DiT: template and dropped tokens are those of Load MLLM, so that a DLA reads either
    HostEncoder("Gemma 4", "", FAMILIES["gemma4"], ("gemma4",), image_sizes="E2B, E4B"),
    HostEncoder(
        "Qwen3.5", "", FAMILIES["qwen3_5"], ("qwen35_08b", "qwen35_2b", "qwen35_4b", "qwen35_9b", "qwen35_27b"),
        stock=StockContext((-2,), always_masked=True), own_images=True,
    ),
    HostEncoder(
        "Qwen3-VL", "", _VL3, _QWEN3_VL_4B + _QWEN3_VL_8B,
        stock=StockContext(normed=False, always_masked=True),
    ),
)  # fmt: skip


# Classes of the host built on one of these encoders, whose DiTs get another context: read by its record, or refused.
BUILT_ON = {"HunyuanImage": True, "Kandinsky5": True, "PixelDiT": False}


def built_on(module: Any) -> str:
    """The name in `BUILT_ON` of a CLIP's text encoder; "" where it is none of them."""
    classes = [base.__name__ for base in type(module).__mro__]
    return next((name for name in BUILT_ON if any(base.startswith(name) for base in classes)), "")


def encoder_of(module: Any, key: Any) -> HostEncoder | None:
    """The record of a CLIP's text encoder that holds an LLM as `key`; None where this pack does not know it."""
    classes = [base.__name__ for base in type(module).__mro__]
    if not BUILT_ON.get(built_on(module), True):
        return None
    found = [encoder for encoder in ENCODERS if key in encoder.keys]
    named = [e for e in found if e.host_class and any(name.startswith(e.host_class) for name in classes)]
    return next(iter(named + [encoder for encoder in found if not encoder.host_class]), None)


def titles() -> str:
    """Types and names of all text encoders, those that read text alone marked."""
    found = [(encoder.kind or "any", encoder.title, ", text only" * (not encoder.reads_images)) for encoder in ENCODERS]
    return "; ".join(f"{kind}: {title}{limit}" for kind, title, limit in found)


def table() -> str:
    """The text encoders as a markdown table, for docs/nodes.md."""
    rows = [("model and LLM", "type in Load CLIP", "reads images", "context without a DLA", "tokens")]
    for encoder in ENCODERS:
        stock = encoder.stock
        joined = f"layers {', '.join(map(str, stock.layers))} side by side"
        context = joined if len(stock.layers) > 1 else "last layer" + " but one" * (stock.layers == (-2,))
        rows.append((
            encoder.title,
            f"`{encoder.kind}`" if encoder.kind else "any other",
            (encoder.image_sizes or "yes") if encoder.reads_images else "no, text only",
            context + ", before the norm" * (not stock.normed),
            ("the user's turn" if encoder.drop_leading_template else "all") + ", and padding" * stock.padding,
        ))  # fmt: skip
    return markdown(rows)
