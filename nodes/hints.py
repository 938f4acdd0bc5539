"""Hints where a node's inputs may not do what the user means: on the node, as a message of the editor, in the log."""

import logging
import re
from collections.abc import Iterable
from typing import Any

import folder_paths
from PIL import Image
from torch import Tensor

from ..loaders.host import editor_of_run, show_on_node
from . import queued_graph
from .schema import Node, with_title
from .translation import translate

log = logging.getLogger(__name__)
HINT_EVENT = "subject_dla.hint"  # web/js/hints.js listens to it

# "image 2", "picture 2", "<image2>", "图2", "图像 2", "图片2"
NUMBERED = re.compile(r"(?:\b(?:image|picture)\s?|图[像片]?\s?)([1-9]\d?)(?![a-z\d])", re.IGNORECASE)


def image_hints(node: type[Node], prompt: str, sockets: dict[str, Tensor | None]) -> list[str]:
    """Hints on a prompt and the images that it is read with.

    Args:
        node: With its hidden inputs, of which the queued graph says where images come from.
        prompt: May name images by number.
        sockets: What the node's inputs brought, by name: images (`image`, `image_1`, …), and masks of the same numbers.
    """
    images = {name: value for name, value in sockets.items() if name.split("_")[0] == "image" and value is not None}
    count, inputs = image_count(sockets), {one.id for one in node.define_schema().inputs}
    absent = sorted({int(number) for number in NUMBERED.findall(prompt)} - set(range(1, count + 1)))
    there = f"{count} image{'' if count == 1 else 's'}" if count else "no image"
    hints = [f"the prompt names image {number}, but {there} came in." for number in absent]
    for name in images:
        mask = name.replace("image", "mask")
        if sockets.get(mask) is None and (file := _cut_out(node.hidden, name)):
            by_mask = f"Connect its MASK through InvertMask to {mask}, or put" if mask in inputs else "Put"
            hints.append(
                f"{name}: {file} is cut out, but Load Image also gives the background that its transparency hides."
                f" {by_mask} the picture on a plain background (ImageCompositeMasked)."
            )
    return hints


def image_count(sockets: dict[str, Tensor | None]) -> int:
    """How many images came in at sockets that may have batches."""
    images = (value for name, value in sockets.items() if name.split("_")[0] == "image")
    return sum(len(image) for image in images if isinstance(image, Tensor) and image.ndim == 4)


def show_hints(node: type[Node], hints: Iterable[str], text: str) -> None:
    """Shows `text` and the hints on the node; without the text, hints of an earlier run would stay."""
    send = editor_of_run()
    for hint in (hints := list(hints)):
        log.warning("%s", with_title(node, hint))
        if send is not None:
            send(HINT_EVENT, {"title": node.define_schema().display_name, "text": translate(hint)})
    node_id = node.hidden.unique_id if node.hidden else None
    show_on_node("\n".join([text, *(translate(f"Warning: {hint}") for hint in hints)]), node_id)


def _cut_out(hidden: Any, socket: str) -> str:
    """Name of the file with transparent parts that a Load Image gives to a socket; "" where it is none."""
    file = queued_graph.source(hidden, socket, "LoadImage").get("image")
    if not isinstance(file, str):
        return ""
    try:
        with Image.open(folder_paths.get_annotated_filepath(file)) as picture:
            if "A" not in picture.getbands() and "transparency" not in picture.info:
                return ""
            return file if picture.convert("RGBA").getextrema()[3][0] < 128 else ""
    except (OSError, ValueError):  # Load Image says what is wrong with it
        return ""
