"""The front end's own workflow templates with reference images, made small, with Apply Stages in front of what samples.

They come from the package comfyui-workflow-templates-json. What a template loads is replaced by the small random files
of `template_models`, its pictures by one of 128 px, its steps by three; all else is as published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import resources

from ...tools.comfy_client.editor_graph import ALWAYS, MUTED

PACKAGE = "comfyui_workflow_templates_json"
REFERENCES = re.compile(r"Reference(Multi)?Latent|TextEncode\w*Edit(Plus)?|TextEncodeQwenImage21")
API_NODES = {"ByteDanceSeedreamNode", "GeminiImage2Node", "GrokImageEditNode", "OpenAIGPTImage1"}  # want an account
IN_THE_TEXT = "TextEncodeQwenImage21"  # the node that puts references into the text
ALL_ON = ", all on"
SIDE, STEPS = 128, 3
CLOCK = {"clock": "flow_time", "tau1": 0.95, "tau2": 0.85}
# "class of the loader, type of the text encoder, file" -> small file; the first that is found
FILES = {
    r"^Lora": "lora", r"^CLIPVision": "siglip", r"^ModelPatch": "uso_projector",
    r"^Checkpoint.* flux1": "flux_checkpoint",
    r"^VAE.*qwen_image_2.1": "wan_21", r"^VAE.*layered": "wan_rgba", r"^VAE.*(qwen_image|wan_2.1)": "wan",
    r"^VAE.*mage": "mage_vae", r"^VAE.*(flux2|full_encoder)": "kl_flux2", r"^VAE.* ae\.": "taesd",
    r" qwen3.5_9b_qwen_image_2.1_pe": "qwen3vl_8b",  # of a prompt enhancer that is off: it is not loaded
    r" krea2 qwen3vl_4b": "qwen3vl_krea", r" qwen3vl_4b": "qwen3vl_4b", r" qwen3vl_8b": "qwen3vl_8b",
    r" qwen_2.5_vl_7b": "qwen25_7b", r" qwen_2.5_vl_fp16": "qwen25_3b", r" mistral_3": "mistral",
    r" qwen_3_4b": "qwen3_4b", r" qwen_3_8b": "qwen3_8b", r" t5xxl": "t5xxl", r" clip_l": "clip_l",
    r"^UNET.*flux3": "flux3", r"^UNET.*qwen_image_2.1": "qwen_image21", r"^UNET.*ming": "ming", r"^UNET.*moss": "moss",
    r"^UNET.*klein.*4b": "klein_4b", r"^UNET.*klein.*9b": "klein_9b", r"^UNET.*flux2": "flux2",
    r"^UNET.*kontext": "flux", r"^UNET.*layered": "qwen_layered", r"^UNET.*(qwen_image|FireRed)": "qwen_image",
    r"^UNET.*omnigen2": "omnigen2", r"^UNET.*longcat": "longcat", r"^UNET.*krea2": "krea2", r"^UNET.*boogu": "boogu",
    r"^UNET.*mage_flow": "mage_flow", r"^UNET.*joyai": "joyimage",
}  # fmt: skip


def templates() -> dict[str, dict]:
    """Templates that read reference images, by name; with a muted or bypassed part also with all parts on.

    Nodes of an API are muted.
    """
    found = {}
    for path in sorted((resources.files(PACKAGE) / "templates").iterdir(), key=lambda path: path.name):
        if path.suffix != ".json" or not REFERENCES.search(text := path.read_text(encoding="utf-8")):
            continue
        for name, every in ((path.stem, False), (f"{path.stem}{ALL_ON}", True)):
            workflow = json.loads(text)
            off = [node for node in nodes(workflow) if node.setdefault("mode", ALWAYS) != ALWAYS]
            for node in nodes(workflow):
                node["mode"] = MUTED if node["type"] in API_NODES else ALWAYS if every else node["mode"]
            kinds = {node["type"] for node in nodes(workflow) if node["mode"] != MUTED}
            if (off or not every) and "LoadImage" in kinds and any(REFERENCES.fullmatch(kind) for kind in kinds):
                found[name] = workflow
    return found


def nodes(workflow: dict) -> Iterator[dict]:
    """All nodes, those of subgraphs' definitions too."""
    for graph in (workflow, *(workflow.get("definitions") or {}).get("subgraphs", [])):
        yield from graph["nodes"]


def dits(workflow: dict) -> set[str]:
    """The small files that take the places of a template's DiTs."""
    loaders = [node for node in nodes(workflow) if node["type"] in ("UNETLoader", "CheckpointLoaderSimple")]
    return {small_file(node["type"], "", node["widgets_values"][0]) for node in loaders}


def shrink(prompt: dict, picture: str) -> None:
    """Small files, pictures and step counts in a workflow in API format."""
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        for name, value in inputs.items():
            if str(value).endswith(".safetensors"):
                inputs[name] = f"{small_file(kind, inputs.get('type', ''), value)}.safetensors"
            elif name == "steps":
                inputs[name] = STEPS
            elif name in ("width", "height") and (kind.startswith("Empty") or isinstance(value, int)):
                inputs[name] = SIDE
            elif name == "max_length":
                inputs[name] = 4
            elif kind == "LoadImage" and name == "image":
                inputs[name] = picture


def small_file(loader: str, kind: str, file: str) -> str:
    """Name of the small file that takes a published file's place; a name that no file has where none does."""
    loaded = f"{loader} {kind} {file}"
    return next((small for pattern, small in FILES.items() if re.search(pattern, loaded)), f"none for {loaded}")


def instrument(prompt: dict, info: dict, name: str, preset: str = "") -> tuple[dict, list[str]]:
    """A copy that records every sampler's calls and saves its latent, with Apply Stages where a preset is given.

    Returns it with the name of each sampler's record. Its latent is the output of the node "latent {record}", the text
    of the stage preview that of "text {record}".
    """
    prompt = {key: {**node, "inputs": dict(node["inputs"])} for key, node in prompt.items()}
    records = []
    for key, node in list(prompt.items()):
        made = set(info[node["class_type"]]["output"]) & {"LATENT", "GUIDER"}
        if "model" not in node["inputs"] or not made:
            continue
        model, record = node["inputs"]["model"], f"{name}-{len(records)}"
        sampler = (
            key if "LATENT" in made else next(k for k, n in prompt.items() if n["inputs"].get("guider") == [key, 0])
        )
        new = {f"latent {record}": ("SaveLatent", {"samples": [sampler, 0], "filename_prefix": record})}
        if preset:
            new |= preview(prompt, sampler, model, record, preset)
            new[f"stages {record}"] = ("SubjectApplyStages", {"model": model, "preset": preset, **CLOCK})
            model = [f"stages {record}", 0]
        new[f"record {record}"] = ("RecordCalls", {"model": model, "name": record})
        node["inputs"]["model"] = [f"record {record}", 0]
        prompt |= {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in new.items()}
        records.append(record)
    return prompt, records


def encode_for_stages(prompt: dict) -> dict:
    """A copy with Encode Qwen-Image 2.1 for Stages in the place of the host's node, whose images are a growing list."""
    prompt = dict(prompt)
    for key, node in prompt.items():
        if node["class_type"] == IN_THE_TEXT:
            inputs = {name.removeprefix("images."): value for name, value in node["inputs"].items()}
            prompt[key] = {"class_type": "SubjectEncodeQwenImage21", "inputs": inputs}
    return prompt


def preview(prompt: dict, sampler: str, model: list, record: str, preset: str) -> dict[str, tuple[str, dict]]:
    """Nodes that show the stages of a sampler's run as text."""
    inputs, new = prompt[sampler]["inputs"], {}
    sigmas = inputs.get("sigmas")
    if not sigmas:
        scheduler = {name: inputs[name] for name in ("scheduler", "steps", "denoise")}
        new[f"sigmas {record}"], sigmas = ("BasicScheduler", {"model": model, **scheduler}), [f"sigmas {record}", 0]
    shown = {"stages": [f"schedule {record}", 0], "model": model, "sigmas": sigmas, "latent": inputs["latent_image"]}
    return new | {
        f"schedule {record}": ("SubjectStageSchedule", {"preset": preset, **CLOCK}),
        f"preview {record}": ("SubjectStagePreview", shown),
        f"text {record}": ("PreviewAny", {"source": [f"preview {record}", 1]}),
    }
