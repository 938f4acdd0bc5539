"""The demo's sheet: toys that the family has never seen, each asked for in a new view, under three schedules."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from PIL import Image

from ..common.drawing.sheet import contact_sheet
from ..tools.comfy_client import workflow

SHOWN = (  # reference in demo/images, prompt: of the test split the first case of each kind, not the best
    ("toy-1.png", "the duck on sand, seen from the right from slightly above"),
    ("toy-2.png", "the toy on a white carpet, seen from the front left"),
    ("toy-3.png", "the boat on sand, seen from the front right"),
    ("toy-4.png", "the toy on grass, seen from the back"),
    ("toy-5.png", "the car at night, seen from the front right from high above"),
)
SCHEDULES = {
    "VAE and MLLM throughout": "both",
    "MLLM only": "mllm_only",
    "staged": "paper",
}


def showcase(client, prompt: dict, images: Path, tell: Callable[[str], None]) -> tuple[list[bytes], Image.Image]:
    """The pictures as the server saved them, row by row, and the sheet. prompt: the demo workflow in API format."""
    pictures, rows = [], []
    for name, text in SHOWN:
        shown, titles = [Image.open(images / name)], ["reference"]
        for title, preset in SCHEDULES.items():
            tell(f"{text}: {title}")
            asked = workflow.put_in(prompt, [client.upload(images / name)], text)
            for node in asked.values():
                if node["class_type"] == "SubjectStageSchedule":
                    node["inputs"]["preset"] = preset
            outputs = client.wait(client.queue(asked, {}), asked)
            (saved,) = [
                image for output in outputs.values() for image in output.get("images", []) if image["type"] == "output"
            ]
            pictures.append(client.fetch(saved))
            shown.append(Image.open(BytesIO(pictures[-1])))
            titles.append(title)
        rows.append((text, shown, titles))
    return pictures, contact_sheet(rows, side=224)
