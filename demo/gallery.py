"""The gallery, docs/gallery.md: what each knob does, drawn by the demo's family on a real server.

    COMFYUI_PATH=FOLDER python common/bootstrap.py demo.gallery

Every picture is a file of its own, as Save Image wrote it: dropped into the editor it brings its graph back.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

from ..common.bootstrap import ROOT
from ..common.console import say
from ..tools.comfy_client import workflow
from ..tools.comfy_client.server import Server, device
from .run import IMAGES

PAGE, FOLDER = ROOT / "docs" / "gallery.md", ROOT / "docs" / "images" / "gallery"
DUCK, RING, BOAT, STAR, CAR = (f"toy-{number}.png" for number in range(1, 6))
SCHEDULE, IDENTITY, SAMPLER = "SubjectStageSchedule", "SubjectAddIdentity", "SubjectStagedSampler"
Change = Callable[[dict], None]

HEAD = """# Gallery

What each knob does, drawn by the demo's small family (`demo/models`, 112 px) of toys on wheels that it has never seen.
It shows what a knob *does*, not how well a large model does it. Seed, steps and all that a row does not name are those
of the workflow `02 Demo - first picture of a subject without a download`; no picture was chosen. Each is a file that
brings its graph back when dropped into the editor; to run it, choose its reference in *Load Image* (`demo/images/`,
of which `toy-1.png` is in `input/` already). Made by `python common/bootstrap.py demo.gallery`.
"""


def _set(kind: str, **values) -> Change:
    """Values of every node of a class."""

    def change(prompt: dict) -> None:
        for key in workflow.nodes_of(prompt, kind):
            prompt[key]["inputs"].update(values)

    return change


def _all(*changes: Change) -> Change:
    def change(prompt: dict) -> None:
        for one in changes:
            one(prompt)

    return change


def _second(regions: bool) -> Change:
    """A second reference behind the first, in positive and negative; with `regions` each in a half of the picture."""

    def change(prompt: dict) -> None:
        sampler = prompt[workflow.nodes_of(prompt, SAMPLER)[0]]
        prompt["200"] = {"class_type": "LoadImage", "inputs": {"image": CAR}}
        for left, key in ((0, "210"), (56, "220")):
            solid = {"width": 112, "height": 112, "value": 0.0}, {"width": 56, "height": 112, "value": 1.0}
            for part, values in enumerate(solid, 1):
                prompt[f"{key[:2]}{part}"] = {"class_type": "SolidMask", "inputs": values}
            joined = {"destination": [f"{key[:2]}1", 0], "source": [f"{key[:2]}2", 0], "x": left, "y": 0}
            if regions:
                prompt[key] = {"class_type": "MaskComposite", "inputs": {**joined, "operation": "add"}}
            else:
                del prompt[f"{key[:2]}1"], prompt[f"{key[:2]}2"]
        for number, (first, name) in enumerate(zip(workflow.nodes_of(prompt, IDENTITY), ("positive", "negative"))):
            second = deepcopy(prompt[first])
            second["inputs"] |= {"conditioning": [first, 0], "image": ["200", 0]}
            if regions:
                prompt[first]["inputs"]["region"], second["inputs"]["region"] = ["210", 0], ["220", 0]
            prompt[f"23{number}"] = second
            sampler["inputs"][name] = [f"23{number}", 0]

    return change


def _keyframe(mllm: float, vae: float) -> Change:
    """One keyframe in the place of the preset: these strengths throughout."""

    def change(prompt: dict) -> None:
        key = workflow.nodes_of(prompt, SCHEDULE)[0]
        values = {"start": 1.0, "mllm_strength": mllm, "vae_strength": vae, "blend": "hold", "clock": "flow_time"}
        prompt[key] = {"class_type": "SubjectStageKeyframe", "inputs": values}

    return change


BOTH = _set(SCHEDULE, preset="both")
TAUS = (0.98, 0.95, 0.85, 0.7, 0.5, 0.3)
# title, what is to be seen, reference, prompt, changes by label
PRESETS = ("both", "vae_only", "mllm_only", "semantics_first", "paper", "two_stage")
ROWS: list[tuple[str, str, str, str, dict[str, Change]]] = [
    (
        "Presets",
        "of Stage Schedule and Apply Stages. `vae_only` reads nothing of the prompt: it repeats the reference's view,"
        " on a ground of its own. The others follow the prompt; they differ in details, as the colour of"
        " the wheels.",
        DUCK,
        "the duck on sand, seen from the right from slightly above",
        {name: _set(SCHEDULE, preset=name) for name in PRESETS},
    ),
    (
        "When the reference joins",
        "`tau1` of the preset `paper` on the clock `flow_time` (1 is noise, 0 the picture), `tau2` 0.1 below it. The"
        " earlier the reference joins, the more of it gets into the shape; late, the view is the prompt's alone.",
        BOAT,
        "the boat on grass, seen from the front left",
        {
            f"tau1 {tau}": _set(SCHEDULE, preset="paper", clock="flow_time", tau1=tau, tau2=round(tau - 0.1, 2))
            for tau in TAUS
        },
    ),
    (
        "Strength of a reference",
        "`strength` of Add Identity, with the preset `both`: 0 leaves the reference's VAE tokens out, 1 is the model's"
        " own behaviour. Here the MLLM's tokens say nearly all, so that little changes: cab and roof.",
        CAR,
        "the car at night, seen from the front right from high above",
        {f"strength {value}": _all(BOTH, _set(IDENTITY, strength=value)) for value in (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)},
    ),
    (
        "Strengths of MLLM and VAE",
        "one Stage Keyframe throughout: MLLM tokens / VAE tokens. With less of the MLLM's the reference's own framing"
        " comes back, and without them the prompt is gone.",
        STAR,
        "the toy on a road, seen from the front right",
        {f"{m} / {v}": _keyframe(m, v) for m, v in ((1, 1), (1, 0.5), (1, 0), (0.5, 1), (0.25, 1), (0, 1))},
    ),
    (
        "CFG",
        "of the sampler, with the demo's schedule: shapes become crisper and colours stronger.",
        RING,
        "the toy on a white carpet, seen from the front left",
        {f"cfg {value}": _set(SAMPLER, cfg=value) for value in (1.0, 1.5, 2.5, 4.0, 6.0)},
    ),
    (
        "Two references, and regions",
        "a boat, and a car as the second reference. The family has learned pictures of one toy alone: the second"
        " reference changes details of the one toy and does not become another; a region limits where each is read."
        " Two subjects in one picture need a model that has learned them.",
        BOAT,
        "the boat on grass, seen from the front left",
        {
            "one": BOTH,
            "two": _all(BOTH, _second(False)),
            "two, a half each": _all(BOTH, _second(True)),
            "two, staged": _second(False),
            "two, a half each, staged": _second(True),
        },
    ),
]


def main() -> int:
    """The command."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = [HEAD]
    with tempfile.TemporaryDirectory(prefix="subject-dla-gallery-", ignore_cleanup_errors=True) as base:
        with Server(os.environ["COMFYUI_PATH"], base, arguments=device()) as server:
            for image in sorted(IMAGES.glob("toy-*.png")):
                server.client.upload(image)
            for number, row in enumerate(ROWS, 1):
                lines.append(_row(server.client, number, *row))
                PAGE.write_text("\n".join(lines), encoding="utf-8")
    return 0


def _row(client, number: int, title: str, text: str, reference: str, words: str, cases: dict[str, Change]) -> str:
    """Draws a row and returns its part of the page."""
    saved, info = workflow.read("demo"), client.object_info()
    cells = [f'<td><img src="../demo/images/{reference}" width="112"><br>reference</td>']
    for index, (label, change) in enumerate(cases.items(), 1):
        prompt = workflow.put_in(workflow.to_api(saved, info), [reference], words)
        change(prompt)
        job = client.queue(prompt, {}, workflow.editor_graph(saved, prompt, info))
        outputs = client.wait(job, prompt)
        found = [image for output in outputs.values() for image in output.get("images", [])]
        (picture,) = [image for image in found if image["type"] == "output"]
        path = FOLDER / f"{number}-{index}.png"
        path.write_bytes(client.fetch(picture))
        say(f"{path.stat().st_size // 1024:3} KB  {path.name}  {title}: {label}")
        cells.append(f'<td><img src="{_relative(path)}" width="112"><br>{label}</td>')
    table = "\n".join(["<table><tr>", *cells, "</tr></table>"])
    return f"## {title}\n\n*{words}*: {text}\n\n{table}\n"


def _relative(path: Path) -> str:
    return path.relative_to(PAGE.parent).as_posix()


if __name__ == "__main__":
    sys.exit(main())
