"""Workflow files: from the editor's format to the queue's (API), with one's own pictures and prompt."""

import json
from collections.abc import Iterator
from pathlib import Path

ALWAYS, MUTED, BYPASSED = 0, 2, 4  # modes of a node
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")
NOTES = ("Note", "MarkdownNote")
POSITIVE = ("positive", "cond1", "conditioning")  # samplers', DualCFGGuider's, BasicGuider's name for the condition
TEXTS = ("prompt", "text", "clip_l", "t5xxl")  # what encoders call their text


class WorkflowFileError(ValueError):
    """A workflow file that cannot be used here; the text says why and what to do."""


def read(path: Path) -> dict:
    """A workflow file in either format. Raises WorkflowFileError."""
    try:
        workflow = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WorkflowFileError(f"{path}: there is no such workflow file.") from None
    except ValueError as error:
        raise WorkflowFileError(f"{path}: not JSON ({error}). Save it from the editor again.") from error
    if not isinstance(workflow, dict):
        raise WorkflowFileError(f"{path}: expected a workflow saved from the editor, or exported in API format.")
    return workflow


def titles(prompt: dict) -> dict[str, str]:
    """The titles of the nodes of a workflow in API format, by id."""
    return {key: node.get("_meta", {}).get("title") or node["class_type"] for key, node in prompt.items()}


def to_api(workflow: dict, object_info: dict) -> dict:
    """The queue's format (id -> class_type, inputs) of a workflow in either format.

    Muted nodes are left out, bypassed ones pass their input on, reroutes vanish. The server's object_info says which
    inputs are widgets, and the order in which their values are saved. Raises WorkflowFileError for subgraphs, nodes
    that the server lacks, and widgets without a value.
    """
    if "nodes" not in workflow and all(isinstance(n, dict) and "class_type" in n for n in workflow.values()):
        return workflow  # in API format already
    if not isinstance(workflow.get("nodes"), list):
        raise WorkflowFileError(
            "Expected a workflow saved from the editor (`nodes`, `links`), or exported in API format."
        )
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}  # id -> [id, from node, from slot, to node, to slot, type]
    unknown = sorted({node["type"] for node in nodes.values()} - {*object_info, *NOTES, "Reroute"})
    if unknown:
        raise WorkflowFileError(
            f"The server has no node {', '.join(unknown)}. (Subgraphs: unpack them in the editor first.)"
        )

    def source(link: int | None) -> list | None:
        """[node id, slot] that a link comes from, through reroutes and bypassed nodes."""
        if link is None or link not in links:
            return None
        _, origin, slot, _, _, kind = links[link]
        node = nodes[origin]
        if node["type"] == "Reroute":
            return source(node["inputs"][0].get("link"))
        if node.get("mode", ALWAYS) == MUTED:
            return None
        if node.get("mode", ALWAYS) == BYPASSED:
            kind = node["outputs"][slot]["type"]
            return next(
                (source(i["link"]) for i in node.get("inputs", []) if i["type"] == kind and i.get("link") is not None),
                None,
            )
        return [str(origin), slot]

    prompt = {}
    for node in nodes.values():
        if node["type"] in (*NOTES, "Reroute") or node.get("mode", ALWAYS) in (MUTED, BYPASSED):
            continue
        inputs = _widget_values(node, object_info[node["type"]])
        for socket in node.get("inputs", []):
            found = source(socket.get("link"))
            if found:
                inputs[socket["name"]] = found
        name = node.get("title") or object_info[node["type"]].get("display_name") or node["type"]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": name}}
    return prompt


def _widget_values(node: dict, info: dict) -> dict:
    """Values of a node's widgets by name; saved is a list in the schema's order, with the editor's own in between."""
    saved = node.get("widgets_values") or []
    if isinstance(saved, dict):
        return dict(saved)
    values, position = {}, 0
    for name, kind, options in _widgets(info):
        if position >= len(saved):
            if "default" not in options:
                raise WorkflowFileError(
                    f"Node {node['id']} ({node['type']}) has no value for {name!r}: "
                    "open it in the editor and save again."
                )
            values[name] = options["default"]
            continue
        values[name] = saved[position]
        position += 1
        seed = kind == "INT" and (options.get("control_after_generate") or name in ("seed", "noise_seed"))
        if seed and position < len(saved) and saved[position] in AFTER_GENERATE:
            position += 1
        if options.get("image_upload"):
            position += 1  # the upload button
    return values


def _widgets(info: dict) -> Iterator[tuple[str, str, dict]]:
    """(name, kind, options) of the inputs that are widgets, in order."""
    for group in ("required", "optional"):
        given = info["input"].get(group, {})
        for name in info.get("input_order", {}).get(group, given):
            kind, options = given[name][0], given[name][1] if len(given[name]) > 1 else {}
            kind = "COMBO" if isinstance(kind, list) else kind
            if kind in WIDGETS and not options.get("forceInput"):
                yield name, kind, options


def put_in(prompt: dict, images: list[str] | None = None, text: str | None = None) -> dict:
    """A copy of a workflow in API format with one's own pictures and prompt `text`.

    `images` are names on the server, for the Load Image nodes in the order of their ids; others keep their picture.
    Raises WorkflowFileError where there are too few of these nodes, or there is no input for the prompt.
    """
    prompt = {key: {**node, "inputs": dict(node["inputs"])} for key, node in prompt.items()}
    loaders = nodes_of(prompt, "LoadImage")
    if images and len(images) > len(loaders):
        raise WorkflowFileError(
            f"{len(images)} images were given, but this workflow has {len(loaders)} Load Image nodes. "
            "Give fewer, or add nodes."
        )
    for key, image in zip(loaders, images or []):
        prompt[key]["inputs"]["image"] = image
    if text is not None:
        for key, name in text_inputs(prompt):
            prompt[key]["inputs"][name] = text
    return prompt


def text_inputs(prompt: dict) -> list[tuple[str, str]]:
    """(node, input) pairs that hold the prompt, where another node supplies the text, that node's.

    They are Encode Subject's, else those of the text node that a sampler's or guider's positive condition comes from.
    """
    encoders = nodes_of(prompt, "SubjectEncode")
    found = [(encoders[0], "prompt")] if encoders else _positive_texts(prompt)
    if not found:
        raise WorkflowFileError(
            "A prompt was given, but this workflow has no Encode Subject node to put it in, and no text node that a "
            "sampler's positive condition comes from."
        )
    return [text_source(prompt, *place) for place in found]


def _positive_texts(prompt: dict) -> list[tuple[str, str]]:
    """Text inputs of the nearest node with any, upstream of what a sampler or guider calls its positive condition."""
    starts = [
        prompt[key]["inputs"].get(name)
        for name in POSITIVE
        for key in sorted(prompt, key=_by_number)
        if name != "conditioning" or "Guider" in prompt[key]["class_type"]  # other nodes pass theirs on
    ]
    for start in (link for link in starts if isinstance(link, list)):
        wanted, seen = [start], set()
        while wanted:
            key = str(wanted.pop(0)[0])
            if key in seen or key not in prompt:
                continue
            seen.add(key)
            inputs = prompt[key]["inputs"]
            if texts := [(key, name) for name in TEXTS if name in inputs]:
                return texts
            wanted += [value for name, value in inputs.items() if isinstance(value, list) and name != "negative"]
    return []


def text_source(prompt: dict, key: str, name: str) -> tuple[str, str]:
    """(node, input) where the text of an input is written, through the links to it."""
    while isinstance(value := prompt[key]["inputs"].get(name), list):
        key = str(value[0])
        found = [n for n in ("prompts", "prompt", "text", "value", "string") if n in prompt[key]["inputs"]]
        if not found:
            raise WorkflowFileError(
                f"The prompt comes from node {key} ({prompt[key]['class_type']}), which has no text to replace."
            )
        name = found[0]
    return key, name


def nodes_of(prompt: dict, kind: str) -> list[str]:
    """Ids of the nodes of a class, in their order."""
    return sorted((key for key, node in prompt.items() if node["class_type"] == kind), key=_by_number)


def _by_number(key: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in key.split(":"))
