"""Apply Stages in the front end's own workflow templates, on small models.

    nox -s tests -- tests/server/test_templates.py --write-docs

writes this host's column of docs/templates.md, which says what happens in each, and its line of what it lacks; with
--host-title "0.33.0 with parts of 0.37" that of a private host.
"""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load
from subject_dla.common.markdown import markdown
from subject_dla.demo import run as demo
from subject_dla.loaders.backbones import BACKBONES
from subject_dla.tests.small import template_models, templates
from subject_dla.tests.small.prompts import run
from subject_dla.tools.comfy_client import workflow
from subject_dla.tools.comfy_client.client import WorkflowError
from subject_dla.tools.comfy_client.editor_graph import EDITOR_ONLY, MUTED
from subject_dla.tools.comfy_client.server import PACK, ROOT, Server

PAGE = ROOT / "docs" / "templates.md"
TEMPLATES = templates.templates()
PICTURE = "toy-1.png"
LACKING = "nodes", "models"
STAGE = re.compile(r"^steps .*, flow time ([\d.]+) to ([\d.]+): MLLM ([\d.]+), VAE ([\d.]+)$", re.MULTILINE)
# Why a run can have no stage without context: it would have no references either.
REFUSED = "the positive condition holds no reference latent"
# small DiT file -> the family's record in the pack, or the name of a family that has none
FAMILIES = {
    "flux": "flux", "flux_checkpoint": "flux", "flux2": "flux2", "klein_4b": "flux2", "klein_9b": "flux2",
    "longcat": "longcat_image", "omnigen2": "omnigen2", "qwen_image": "qwen_image", "qwen_layered": "qwen_image",
    "krea2": "krea2", "boogu": "boogu", "mage_flow": "mage_flow", "joyimage": "joyimage", "flux3": "FLUX 3 Klein",
    "qwen_image21": "qwen_image21", "ming": "ming_image", "moss": "MOSS-Image",
}  # fmt: skip


class Host:
    """A server on small models, the templates in API format that its nodes allow, and why it cannot run the others."""

    def __init__(self, server: Server, comfyui: Path, models: Path, title: str | None):
        self.server, self.info = server, server.client.object_info()
        self.column = f"ComfyUI {title or server.client.version()}"
        self.prompts, self.files = {}, {}
        self.lacks: dict[str, tuple[str, list[str]]] = {}  # template -> "nodes" or "models", which
        for name, saved in TEMPLATES.items():
            try:
                prompt = workflow.to_api(saved, self.info)
            except workflow.WorkflowFileError:
                if not (lacking := _lacking_nodes(saved, self.info)):
                    raise
                self.lacks[name] = "nodes", lacking
                continue
            templates.shrink(prompt, PICTURE)
            values = {str(value) for node in prompt.values() for value in node["inputs"].values()}
            self.files[name] = {value[:-12] for value in values if value.endswith(".safetensors")}
            self.prompts[name] = prompt
        script = [sys.executable, ROOT / "common/bootstrap.py", "tests.small.template_models", comfyui, models]
        kinds = sorted({kind for files in self.files.values() for kind in files})
        made = subprocess.run([*script, *kinds], check=True, stdout=subprocess.PIPE, text=True)
        lacking = json.loads(made.stdout.splitlines()[-1])
        for name, files in self.files.items():
            if missing := sorted(lacking.keys() & set(files)):
                self.lacks[name] = "models", missing

    def line(self) -> str:
        """The page's line about what templates need and this host lacks."""
        found = {kind: {one for k, some in self.lacks.values() if k == kind for one in some} for kind in LACKING}
        return f"- **{self.column}** lacks " + "; ".join(
            f"{k}: {', '.join(sorted(v)) or 'none'}" for k, v in found.items()
        )

    def run(self, name: str, preset: str = "", own_encode: bool = False) -> "Run":
        label = f"{name}-{preset or 'own'}"
        encode = templates.encode_for_stages if own_encode else dict
        prompt, records = templates.instrument(encode(self.prompts[name]), self.info, label, preset)
        return Run(self.server, run(self.server, prompt), records)


class Run:
    """What a run of a template left: latents and pictures, and by sampler the calls of the model and the preview."""

    def __init__(self, server: Server, outputs: dict, records: list[str]):
        fetch = server.client.fetch
        self.latents = [load(fetch(outputs[f"latent {record}"]["latents"][0]))["latent_tensor"] for record in records]
        saved = [image for key in sorted(outputs) for image in outputs[key].get("images", []) if "preview" not in key]
        self.pictures = [Image.open(io.BytesIO(fetch(image))).convert("RGB").tobytes() for image in saved]
        paths = [server.base / "output" / f"{record}.jsonl" for record in records]
        self.calls = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
        shown = [outputs.get(f"text {record}", {"text": [""]})["text"][0] for record in records]
        self.stages = [[tuple(map(float, found)) for found in STAGE.findall(text)] for text in shown]

    def given(self) -> list[dict[float, tuple[int, int]]]:
        """By sampler, sigma -> most context tokens and references that a condition had there."""
        return [
            {
                sigma: tuple(max(c[key] for c in calls if c["sigma"] == sigma) for key in ("tokens", "references"))
                for sigma in {call["sigma"] for call in calls}
            }
            for calls in self.calls
        ]


def _lacking_nodes(saved: dict, info: dict) -> list[str]:
    graphs = {graph["id"] for graph in (saved.get("definitions") or {}).get("subgraphs", [])}
    return sorted({n["type"] for n in templates.nodes(saved) if n["mode"] != MUTED} - {*info, *graphs, *EDITOR_ONLY})


@pytest.fixture(scope="module")
def host(comfyui, tmp_path_factory, pytestconfig):
    models = tmp_path_factory.mktemp("template-models")
    for folder in template_models.KINDS:
        (models / folder).mkdir()
    own = Path(__file__).parent
    packs = {"small_host": own / "small_host", "template_host": own / "template_host", PACK: ROOT}
    base = tmp_path_factory.mktemp("template-host")
    with Server(comfyui, base, packs=packs, models=[models], arguments=["--cpu"]) as server:
        server.client.upload(demo.IMAGES / PICTURE)
        yield Host(server, comfyui, models, pytestconfig.getoption("--host-title"))


@pytest.fixture(scope="module")
def cells() -> dict[str, str]:
    """Template -> what this host's column of the page says of it, filled by the tests below."""
    return {}


@pytest.mark.parametrize("name", TEMPLATES)
def test_template(host, cells, name):
    if name in host.lacks:
        kind, lacking = host.lacks[name]
        cells[name] = f"lacks {kind}"
        pytest.skip(f"this host lacks {kind}: {', '.join(lacking)}")
    own = host.run(name)
    references = [max(found[1] for found in given.values()) for given in own.given()]
    assert any(references), "the template reads no reference"
    assert all(latent.isfinite().all() for latent in own.latents)

    both = host.run(name, "both")
    assert both.calls == own.calls
    assert all((a == b).all() for a, b in zip(own.latents, both.latents, strict=True))
    assert both.pictures == own.pictures and own.pictures

    if "FLUX 3" in _dit(name):
        with pytest.raises(WorkflowError, match="FLUX 3 .* is refused"):
            host.run(name, "semantics_first")
        cells[name] = "refused, but for both"
        return

    in_the_text = any(node["class_type"] == templates.IN_THE_TEXT for node in host.prompts[name].values())
    if in_the_text:
        with pytest.raises(WorkflowError, match="Put Encode Qwen-Image 2.1 for Stages in the place"):
            host.run(name, "semantics_first")
        for preset in ("", "both"):
            found = host.run(name, preset, own_encode=True)
            assert all((a == b).all() for a, b in zip(own.latents, found.latents, strict=True))

    runs, logged = [own], host.server.log.stat().st_size
    refused = ""
    for preset in ("semantics_first", "mllm_only", "two_stage"):
        try:
            found = host.run(name, preset, own_encode=in_the_text)
        except WorkflowError as error:
            assert preset == "two_stage" and REFUSED in str(error), error
            refused = ", not two_stage"
            break
        assert all(latent.isfinite().all() for latent in found.latents)
        for given, stages, most in zip(found.given(), found.stages, references, strict=True):
            for sigma, (tokens, count) in given.items():
                (on,) = {(m > 0, v > 0) for first, last, m, v in stages if first + 1e-3 > sigma > last - 1e-3}
                assert (tokens > 1, count) == (on[0], most if on[1] else 0), (preset, sigma)
        for other in runs:  # not as mllm_only: the references are read from their stage on
            differ = [bool((a != b).any()) for a, b in zip(other.latents, found.latents, strict=True)]
            assert differ == [count > 0 or preset == "two_stage" for count in references], preset
        runs.append(found)
    said = host.server.log.read_bytes()[logged:].decode(errors="replace")
    assert refused or ("token layout is unknown" in said) == ("(no record)" in _dit(name)), said
    counts = ", ".join(map(str, sorted(set(references))))
    cells[name] = f"staged ({counts}){refused}{', two nodes' * in_the_text}"


def test_the_page_says_it(host, cells, request):
    """docs/templates.md has a column and a line for each host that it was written on."""
    if missing := TEMPLATES.keys() - cells.keys():
        pytest.skip(f"{len(missing)} templates were not run")
    text = PAGE.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    columns = {title: dict(zip([row[0] for row in rows], column)) for title, *column in zip(head, *rows)}
    lacks = re.findall(r"^- \*\*ComfyUI .* lacks .*$", text, re.MULTILINE)
    if request.config.getoption("--write-docs"):
        columns[host.column] = {f"`{name}`": cell for name, cell in cells.items()}
        hosts = sorted((title for title in columns if title.startswith("ComfyUI")), key=_version)
        new = [["template", "DiT", *hosts]]
        new += [[f"`{name}`", _dit(name), *(columns[h].get(f"`{name}`", "-") for h in hosts)] for name in TEMPLATES]
        kept = [line for line in lacks if f"**{host.column}**" not in line]
        text = text.replace("\n".join(lacks), "\n".join(sorted([*kept, host.line()], key=_version)))
        PAGE.write_text(text.replace("\n".join(lines), markdown(new)), encoding="utf-8")
    elif host.column not in columns:
        pytest.skip(f"docs/templates.md has no column {host.column}: write it with --write-docs")
    else:
        assert columns["DiT"] == {f"`{name}`": _dit(name) for name in TEMPLATES}
        assert columns[host.column] == {f"`{name}`": cell for name, cell in cells.items()}
        assert host.line() in lacks


def _dit(name: str) -> str:
    """Families of the DiTs that a template loads."""
    found = {FAMILIES[kind] for kind in templates.dits(TEMPLATES[name])}
    return ", ".join(sorted(BACKBONES[f].title if f in BACKBONES else f"{f} (no record)" for f in found))


def _version(title: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", title)]
