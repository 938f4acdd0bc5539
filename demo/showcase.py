"""The demo's sheet: toys that the family has never seen, each asked for in a new view, under three schedules."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from PIL import Image

from ..common.drawing.sheet import contact_sheet
from ..tools.comfy_client import workflow

CASES = (  # reference in demo/images, prompt: the test split's first case of each kind of toy, not the best
    ("toy-1.png", "the duck on sand, seen from the right from slightly above"),
    ("toy-2.png", "the toy on a white carpet, seen from the front left"),
    ("toy-3.png", "the boat on sand, seen from the front right"),
    ("toy-4.png", "the toy on grass, seen from the back"),
    ("toy-5.png", "the car at night, seen from the front right from high above"),
)
PRESETS = {"VAE and MLLM throughout": "both", "MLLM only": "mllm_only", "staged": "paper"}


def showcase(client, saved: dict, images: Path, log: Callable[[str], None]) -> tuple[list[bytes], Image.Image]:
    """Draws every case under every preset.

    Args:
        client: Of the server (tools.comfy_client.server.Client).
        saved: The demo workflow, as the editor saved it. Each picture brings it back with its own values.
        images: Folder of the references.
        log: Called with a line before each picture.

    Returns:
        The files that the server saved, row by row, and the sheet.
    """
    files, rows, info = [], [], client.object_info()
    prompt = workflow.to_api(saved, info)
    for name, text in CASES:
        pictures = [Image.open(images / name)]
        for title, preset in PRESETS.items():
            log(f"{text}: {title}")
            case = workflow.put_in(prompt, [client.upload(images / name)], text)
            for node in case.values():
                if node["class_type"] == "SubjectStageSchedule":
                    node["inputs"]["preset"] = preset
            outputs = client.wait(client.queue(case, {}, workflow.editor_graph(saved, case, info)), case)
            saved = [image for output in outputs.values() for image in output.get("images", [])]
            (saved,) = [image for image in saved if image["type"] == "output"]
            files.append(client.fetch(saved))
            pictures.append(Image.open(BytesIO(files[-1])))
        rows.append((text, pictures, ["reference", *PRESETS]))
    return files, contact_sheet(rows, side=224)
