"""Workflow files: from the editor's format to the queue's (API), with one's own pictures and prompt."""

import copy
import json
from pathlib import Path

from ...common.files import DataError, read_bytes
from ...common.prompt_graph import is_link
from .editor_graph import WorkflowFileError, graph_to_prompt
from .node_inputs import with_values
from .shipped import find

LONGEST = 64 * 2**20  # bytes of a workflow file
POSITIVE = ("positive", "cond1", "conditioning")  # samplers', DualCFGGuider's, BasicGuider's name for the condition
TEXTS = ("prompt", "text", "clip_l", "t5xxl")  # what encoders call their text


def read(path: Path) -> dict:
    """A workflow file in either format, or the shipped one of a short name. Raises WorkflowFileError."""
    if not find(path).exists():
        raise WorkflowFileError(f"{path}: there is no such workflow file.")
    try:
        workflow = json.loads(read_bytes(find(path), LONGEST))
    except DataError as error:
        raise WorkflowFileError(str(error)) from None
    except (ValueError, RecursionError) as error:  # NaN may be in it: pictures' prompts have some
        raise WorkflowFileError(f"{path}: not JSON ({error}). Save it from the editor again.") from error
    if not isinstance(workflow, dict):
        raise WorkflowFileError(f"{path}: expected a workflow saved from the editor, or exported in API format.")
    return workflow


def titles(prompt: dict) -> dict[str, str]:
    """The titles of the nodes of a workflow in API format, by id."""
    return {key: node.get("_meta", {}).get("title") or node["class_type"] for key, node in prompt.items()}


def to_api(workflow: dict, object_info: dict, file: Path | None = None) -> dict:
    """The queue's format (id -> class_type, inputs) of a workflow in either format.

    Raises WorkflowFileError as `graph_to_prompt` does, and for anything else; its text names the `file`.
    """
    try:
        if "nodes" not in workflow and all(isinstance(n, dict) and "class_type" in n for n in workflow.values()):
            _check(workflow)
            return workflow  # in API format already
        if not isinstance(workflow.get("nodes"), list):
            raise WorkflowFileError("expected a workflow saved from the editor (`nodes`, `links`), or in API format.")
        return graph_to_prompt(workflow, object_info)
    except WorkflowFileError as error:
        raise WorkflowFileError(f"{file or 'This workflow'}: {error}") from None
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:  # entries of other types
        raise WorkflowFileError(
            f"{file or 'This workflow'}: is not as the editor saves it ({type(error).__name__}: {error!s:.200}). Open "
            "it in the editor and save it again."
        ) from error


def _check(prompt: dict) -> None:
    """Raises WorkflowFileError where a node in API format has an entry of another type, or a link to none."""
    for key, node in prompt.items():
        wrong = [name for name, kind in (("class_type", str), ("inputs", dict), ("_meta", dict))
                 if not isinstance(node.get(name, {} if name == "_meta" else None), kind)]  # fmt: skip
        if wrong:
            raise WorkflowFileError(
                f"node {key:.60} has {wrong[0]} {node.get(wrong[0])!r:.60}, expected a node's class, inputs and title. "
                "Export it again."
            )
        for name, value in node["inputs"].items():
            if is_link(value) and value[0] not in prompt:
                raise WorkflowFileError(
                    f"node {key:.60}'s {name:.60} is linked to node {value[0]:.60}, which it has not."
                )


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


def editor_graph(saved: dict, prompt: dict, object_info: dict) -> dict | None:
    """A saved workflow in the editor's format with the values of `prompt`, its changed copy in API format.

    It is what a picture restores when dropped into the editor. None where the format has no such graph: `saved` is in
    API format, or a value inside a subgraph was changed.
    """
    if "nodes" not in saved:
        return None
    graph = copy.deepcopy(saved)
    for node in graph["nodes"]:
        if (now := prompt.get(str(node["id"]))) and node.get("widgets_values"):
            values = {name: value for name, value in now["inputs"].items() if not is_link(value)}
            node["widgets_values"] = with_values(object_info[node["type"]], node["widgets_values"], values)
    return graph if to_api(graph, object_info) == prompt else None


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
    for start in filter(is_link, starts):
        wanted, seen = [start], set()
        while wanted:
            key = str(wanted.pop(0)[0])
            if key in seen or key not in prompt:
                continue
            seen.add(key)
            inputs = prompt[key]["inputs"]
            if texts := [(key, name) for name in TEXTS if name in inputs]:
                return texts
            wanted += [value for name, value in inputs.items() if is_link(value) and name != "negative"]
    return []


def text_source(prompt: dict, key: str, name: str) -> tuple[str, str]:
    """(node, input) where the text of an input is written, through the links to it."""
    seen = set()
    while is_link(value := prompt[key]["inputs"].get(name)):
        if (key, name) in seen:
            raise WorkflowFileError(f"The prompt comes from node {key}, which is linked to itself.")
        seen.add((key, name))
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
    return tuple(int(part) if part.isdecimal() and len(part) < 16 else 0 for part in key.split(":"))
