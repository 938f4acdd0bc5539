"""Reference images as the sockets bring them: checked, and taken apart into single pictures."""

from torch import Tensor

from ..common.images import SLIMMEST, SMALLEST, ImageError, check_values

LIMIT = 10


def collect_images(*sockets: Tensor | None, limit: int = LIMIT, required: bool = True) -> list[Tensor]:
    """Every picture of the IMAGE sockets (None or (b, h, w, c)), in order, each (h, w, 3) float32 in 0..1.

    Raises ImageError for no picture (if `required`), more than `limit`, or one with a side under 28 px, alpha,
    greyscale, NaN or infinity, values far outside 0..1 or a wrong rank; it says which socket (`image_1` is the first)
    and which of its batch.
    """
    images = []
    found = sum(socket.shape[0] for socket in sockets if isinstance(socket, Tensor) and socket.ndim == 4)
    if found > limit:
        raise ImageError(
            f"{found} reference images found, {limit} are the limit. A batch counts as several: take some out, or pick"
            " from the batch with the host's ImageFromBatch node."
        )
    for number, socket in enumerate(sockets, 1):
        if socket is None:
            continue
        if not isinstance(socket, Tensor) or socket.ndim != 4:
            shape = tuple(socket.shape) if isinstance(socket, Tensor) else type(socket).__name__
            raise ImageError(
                f"image_{number} is {shape}, expected an IMAGE (batch, height, width, 3). Connect an IMAGE output; a"
                " MASK becomes one with the host's MaskToImage node."
            )
        for index, image in enumerate(socket):
            where = f" (number {index + 1} of its batch of {len(socket)})" if len(socket) > 1 else ""
            images.append(_check(image, f"image_{number}{where}"))
    if required and not images:
        raise ImageError(
            "No reference image is connected, expected at least one. Connect a Load Image node to image_1."
        )
    return images


def _check(image: Tensor, where: str) -> Tensor:
    height, width, channels = image.shape
    if channels == 4:
        raise ImageError(
            f"{where} has 4 channels, expected 3 (RGB). Its alpha must be composited first: the host's"
            " SplitImageWithAlpha node gives the RGB part and a mask, ImageCompositeMasked puts it on a background."
        )
    if channels == 1:
        raise ImageError(
            f"{where} is greyscale (1 channel), expected 3 (RGB). Send it through the host's MaskToImage node (after"
            " ImageToMask), which repeats the channel three times."
        )
    if channels != 3:
        raise ImageError(f"{where} has {channels} channels, expected 3 (RGB).")
    if min(height, width) < SMALLEST:
        raise ImageError(
            f"{where} is {width} x {height} px, expected at least {SMALLEST} px a side. Use a larger picture; upscaling"
            " this one would give the MLLM nothing to see."
        )
    if max(height, width) > SLIMMEST * min(height, width):
        raise ImageError(
            f"{where} is {width} x {height} px, sides more than {SLIMMEST}:1 apart. Crop it to the subject first."
        )
    image = image.float()
    check_values(image, where)
    return image
