"""Orientations of pictures as a table and as overlays: what Subject Orientation gives."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..common.masks import empty_masks, split_batch
from ..loaders.orient_anything.network import Angles
from .orientation_overlay import CLEAR, overlays

EMPTY = "mask empty: the whole picture was read, confidence set to 0"


@dataclass(frozen=True, eq=False)
class OrientationReport:
    """Overlays (N, h, w, 3) in 0..1, the table, and the angles of N pictures."""

    overlay: Tensor
    text: str
    angles: Angles


def orientation_report(model, image: Tensor, mask: Tensor | None = None, threshold: float = CLEAR) -> OrientationReport:
    """The orientation of each subject of an IMAGE (and MASK, see `split_batch`), by an OrientationModel.

    threshold: of the confidence; below it the axes are grey and the table says so. Raises ImageError for pictures or
    masks that cannot be read.
    """
    images, masks = split_batch(image, mask)
    angles = model.estimate(images, masks)
    text = table(angles, threshold=threshold, notes=dict.fromkeys(empty_masks(images, masks), EMPTY))
    return OrientationReport(overlays(images, angles, masks, threshold=threshold), text, angles)


def table(angles: Angles, *, threshold: float = CLEAR, notes: Mapping[int, str] | None = None) -> str:
    """One aligned line per picture, degrees; `notes` by number from 0 go to the end of their line."""
    lines = ["picture  azimuth  polar  rotation  confidence"]
    for number, (azimuth, polar, rotation, confidence) in enumerate(angles.rows()):
        line = f"{number + 1:7d}  {azimuth:7.0f}  {polar:5.0f}  {rotation:8.0f}  {confidence:10.3f}"
        remarks = ["no clear front"] if confidence < threshold else []
        remarks += [notes[number]] if notes and number in notes else []
        lines.append(line + ("  " + "; ".join(remarks) if remarks else ""))
    return "\n".join(lines)
