"""What a picture must be, and the one error for a picture that is not."""

from torch import Tensor

SMALLEST = 28  # px a side: one token of Qwen2.5-VL's vision tower (14 px patches, merged 2 x 2)
SLIMMEST = 200  # longest side / shortest side; what the MLLMs' own preprocessing accepts at most
MOST_CUT = 0.1  # share of a picture that is cut off without a word


class ImageError(ValueError):
    """A picture that cannot be read or used, and what to do about it."""


def check_values(image: Tensor, where: str) -> None:
    """Raises ImageError for a picture whose values are NaN, infinite, or far outside 0..1; `where`: its name."""
    if not bool(image.isfinite().all()):
        wrong = int((~image.isfinite()).sum())
        raise ImageError(
            f"{where} holds values that are NaN or infinite ({wrong} values of {image.numel()}), expected 0 to 1. The"
            " node that made it has failed (often a VAE decode in fp16: decode in fp32 or bf16)."
        )
    low, high = float(image.min()), float(image.max())
    if low < -1 or high > 2:  # room for the overshoot of a decode or an upscaler
        raise ImageError(f"{where} has values from {low:.3g} to {high:.3g}, expected 0 to 1. Divide by 255 first?")


def cut_off(
    width: int, height: int, kept_width: int, kept_height: int, most: float = MOST_CUT, scale: float = 0
) -> str:
    """What is lost where a picture is scaled evenly and cut at its centre, as text; "" where it is no more than `most`.

    Args:
        width: Of the picture, px.
        height: The same.
        kept_width: Of the result, px.
        kept_height: The same.
        most: Share of the picture's area, 0 to 1.
        scale: Of the picture before the cut; 0 = the least that fills the result.
    """
    scale = scale or max(kept_width / width, kept_height / height)
    share = 1 - kept_width * kept_height / (width * height * scale * scale)
    if share <= most:
        return ""
    return (
        f"{share:.0%} of the picture ({width} x {height} px) is cut off at its edges to fit {kept_width} x "
        f"{kept_height}. Crop it to the subject, or pad it to a shape that fits (the host's ImagePadForOutpaint)."
    )
