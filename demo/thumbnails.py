"""The pictures of the editor's list of templates, `workflows/*.jpg`: references, and what comes of them.

    COMFYUI_PATH=FOLDER python common/bootstrap.py demo.thumbnails [short names]

The weights that most workflows need are not here, so the demo's family draws all of them, on a real server, and each
says so in its corner.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from io import BytesIO

from PIL import Image, ImageDraw

from ..common.console import say
from ..common.drawing.palette import GREY, INK, PAPER
from ..common.drawing.text import text_width, write
from ..tools.comfy_client import workflow
from ..tools.comfy_client.server import Server, device
from ..tools.comfy_client.shipped import shipped
from .run import IMAGES

SIDE, FOOT, GAP, LETTERS = 440, 24, 6, 15  # px: the picture is square, as the list's frames are
FINE = Image.Resampling.LANCZOS
CORNER = "drawn by small demo models"
DUCK, RING, BOAT, STAR, CAR = (f"toy-{number}.png" for number in range(1, 6))
# Short name -> reference, prompt, changes of the demo's schedule. Seed and steps are the demo's; nothing is chosen.
SINGLE = {
    "qwen_image_edit_one_node": (BOAT, "the boat in the snow, seen from the left", {}),
    "demo": (DUCK, "the duck on sand, seen from the right from slightly above", {}),
    "qwen_image_edit_staged": (RING, "the toy on a white carpet, seen from the front left", {}),
    "qwen_image_2_1_staged": (CAR, "the car on grass, seen from the front right", {}),
    "flux_uno_staged": (STAR, "the toy on a road, seen from the front right", {}),
    "omnigen2_staged": (BOAT, "the boat on sand, seen from the front right", {}),
    "train_dla": (CAR, "the car in the snow, seen from the front left", {}),
    "train_dla_klein": (DUCK, "the duck on grass, seen from the front right", {}),
    "use_trained_dla": (RING, "the toy at night, seen from the front right", {}),
    "paper": (CAR, "the car at night, seen from the front right from high above", {}),
    "mllm_only": (STAR, "the toy on a carpet in the colour of its wheels, seen from the left", {"preset": "mllm_only"}),
    "system_omnigen2": (DUCK, "the duck in the snow, seen from the front left", {"preset": "both"}),
    "system_qwen_image_edit": (BOAT, "the boat on a blue carpet, seen from the right", {"preset": "both"}),
    "system_uso": (STAR, "the toy on sand, seen from the front left", {"preset": "both"}),
    "system_uno": (RING, "the toy on grass, seen from the left", {"preset": "both"}),
    "system_dreamo": (CAR, "the car on a road, seen from the left", {"preset": "both"}),
}
PLACES = ("on a road, seen from the left", "in the snow, seen from the front right", "at night, seen from the right")
THRESHOLDS = (
    ("both", 1),
    ("paper", 0.95),
    ("paper", 0.8),
    ("paper", 0.65),
    ("paper", 0.5),
    ("paper", 0.35),
    ("paper", 0.2),
)


def main() -> int:
    """The command."""
    names = sys.argv[1:] or [*SINGLE, "batch_prompts", "several_subjects", "threshold_sweep", "layer_roles"]
    with tempfile.TemporaryDirectory(prefix="subject-dla-thumbnails-", ignore_cleanup_errors=True) as base:
        with Server(os.environ["COMFYUI_PATH"], base, arguments=device()) as server:
            artist = _Artist(server.client)
            for name in names:
                path = shipped(name).with_suffix(".jpg")
                _thumbnail(artist, name).save(path, quality=88, optimize=True)
                say(f"{path.stat().st_size // 1024:3} KB  {path.name}")
    return 0


class _Artist:
    """Draws on a server with the workflow `demo`."""

    def __init__(self, client):
        self.client = client
        self.prompt = workflow.to_api(workflow.read("demo"), client.object_info())
        for name in (DUCK, RING, BOAT, STAR, CAR):
            client.upload(IMAGES / name)

    def draw(self, reference: str, text: str, changes: dict) -> list[Image.Image]:
        """The pictures of one queued job; `changes` are of the schedule's widgets."""
        return self.run(_set(workflow.put_in(self.prompt, [reference], text), "SubjectStageSchedule", **changes))

    def run(self, prompt: dict) -> list[Image.Image]:
        outputs = self.client.wait(self.client.queue(prompt, {}), prompt)
        saved = [image for output in outputs.values() for image in output.get("images", [])]
        return [Image.open(BytesIO(self.client.fetch(image))) for image in saved if image["type"] == "output"]


def _thumbnail(artist: _Artist, name: str) -> Image.Image:
    if name in SINGLE:
        reference, text, changes = SINGLE[name]
        (picture,) = artist.draw(reference, text, changes)
        return _one([_toy(reference)], picture)
    if name == "batch_prompts":
        return _grid([_toy(DUCK), *(artist.draw(DUCK, f"the duck {place}", {})[0] for place in PLACES)], 2)
    if name == "threshold_sweep":
        text = "the boat on grass, seen from the front left"
        schedules = [{"preset": preset, "tau1": tau, "tau2": tau - 0.1} for preset, tau in THRESHOLDS]
        drawn = [artist.draw(BOAT, text, {**changes, "clock": "flow_time"})[0] for changes in schedules]
        return _grid([_toy(BOAT), *drawn[:5], *artist.draw(BOAT, text, {"preset": "mllm_only"}), *drawn[5:]], 3)
    if name == "layer_roles":
        return _grid([_toy(STAR), *artist.run(_layers(artist.prompt))[:8]], 3)
    (picture,) = artist.run(_halves(artist.prompt))
    return _one([_toy(BOAT), _toy(CAR)], picture)


def _layers(prompt: dict) -> dict:
    """The demo with layers of the MLLM set to zero, or kept alone, before they are aggregated."""
    prompt = workflow.put_in(prompt, [STAR], "the toy on a road, seen from the front left")
    encode = workflow.nodes_of(prompt, "SubjectEncode")[0]
    sweep = {"modalities": "text and image", "actions": "zero and keep", "groups": "early; middle; late"}
    prompt["100"] = {"class_type": "SubjectAblationSweep", "inputs": {"features": [encode, 0], **sweep}}
    for node in prompt.values():
        if node["class_type"] == "SubjectAggregateLayers" and node["inputs"]["features"][0] == encode:
            node["inputs"]["features"] = ["100", 0]
    return _set(prompt, "SubjectStageSchedule", preset="mllm_only")


def _halves(prompt: dict) -> dict:
    """The demo twice, for the halves of one wide picture: its family has learned pictures of one toy alone."""
    parts, areas = [], {}
    for half, (toy, words) in enumerate(((BOAT, "the boat"), (CAR, "the car"))):
        part = workflow.put_in(prompt, [toy], f"{words} on grass, seen from the front left")
        parts.append({f"{key}{half}": _renamed(node, str(half)) for key, node in part.items()})
        sampler = workflow.nodes_of(parts[-1], "SubjectStagedSampler")[0]
        for name in ("positive", "negative"):
            area = {"width": 112, "height": 112, "x": 112 * half, "y": 0, "strength": 1.0}
            link = parts[-1][sampler]["inputs"][name]
            areas[f"{name}{half}"] = {"class_type": "ConditioningSetArea", "inputs": {"conditioning": link, **area}}
    for name in ("positive", "negative"):
        both = {"conditioning_1": [f"{name}0", 0], "conditioning_2": [f"{name}1", 0]}
        areas[name] = {"class_type": "ConditioningCombine", "inputs": both}
        parts[0][workflow.nodes_of(parts[0], "SubjectStagedSampler")[0]]["inputs"][name] = [name, 0]
    for kind in ("SaveImage", "VAEDecode", "SubjectStagedSampler"):
        del parts[1][workflow.nodes_of(parts[1], kind)[0]]
    return _set({**parts[0], **parts[1], **areas}, "EmptySD3LatentImage", width=224)


def _renamed(node: dict, suffix: str) -> dict:
    linked = {key: [f"{v[0]}{suffix}", v[1]] if isinstance(v, list) else v for key, v in node["inputs"].items()}
    return {**node, "inputs": linked}


def _set(prompt: dict, kind: str, **values) -> dict:
    prompt = deepcopy(prompt)
    for key in workflow.nodes_of(prompt, kind):
        prompt[key]["inputs"].update(values)
    return prompt


def _toy(name: str) -> Image.Image:
    return Image.open(IMAGES / name)


def _one(references: Sequence[Image.Image], picture: Image.Image) -> Image.Image:
    """A picture, above it or on its bottom left what it was made from."""
    page = _page()
    wide = picture.width > picture.height
    high = SIDE * picture.height // picture.width if wide else SIDE - FOOT
    page.paste(picture.convert("RGB").resize((SIDE, high), FINE), (0, SIDE - FOOT - high))
    side = SIDE - FOOT - high - 2 * GAP if wide else 124
    top = GAP if wide else SIDE - FOOT - side - GAP
    for number, reference in enumerate(references):
        left = number * SIDE // len(references) + (SIDE // len(references) - side) // 2 if wide else GAP
        page.paste(PAPER, (left - GAP, top - GAP, left + side + GAP, top + side + GAP))
        _paste(page, reference, (left, top, side, side), "reference")
    return page


def _grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures in rows, the first one the reference."""
    page = _page()
    wide, high = SIDE // columns, (SIDE - FOOT) // columns
    for number, picture in enumerate(pictures):
        place = (number % columns * wide + 1, number // columns * high + 1, wide - 2, high - 2)
        _paste(page, picture, place, "" if number else "reference")
    return page


def _page() -> Image.Image:
    page = Image.new("RGB", (SIDE, SIDE), PAPER)
    write(ImageDraw.Draw(page), (SIDE - 8, SIDE - FOOT / 2), CORNER, GREY, LETTERS, "rm")
    return page


def _paste(page: Image.Image, picture: Image.Image, place: tuple[int, int, int, int], tag: str) -> None:
    """At left, top, width, height, with a tag at the bottom: the editor's own badge is at the top."""
    left, top, width, height = place
    page.paste(picture.convert("RGB").resize((width, height), FINE), (left, top))
    if tag:
        pen, bottom = ImageDraw.Draw(page), top + height
        pen.rectangle((left, bottom - LETTERS - 8, left + text_width(tag, LETTERS) + 10, bottom), PAPER)
        write(pen, (left + 5, bottom - LETTERS / 2 - 4), tag, INK, LETTERS, "lm")


if __name__ == "__main__":
    sys.exit(main())
