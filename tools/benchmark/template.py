"""The workflow of a case: a template with its references, prompt and seed filled in."""

import hashlib
import json
from collections.abc import Iterable, Sequence

from ...common.prompt_graph import is_link
from ..comfy_client import workflow
from ..comfy_client.client import title
from ..comfy_client.node_inputs import bypass_input, socket_type, sockets
from ..comfy_client.workflow import WorkflowFileError
from .sets import Case


class Template:
    """A workflow in API format whose references, prompt and seed are each case's own.

    `object_info` is the server's; `prompt_node` the id of the node that holds the prompt, None: as `text_inputs` finds
    it. Raises WorkflowFileError where there is no seed, no prompt or no Save Image node.
    """

    def __init__(self, prompt: dict, object_info: dict, prompt_node: str | None = None):
        self.prompt, self.object_info, self.titles = prompt, object_info, workflow.titles(prompt)
        if prompt_node is None:
            self.texts = workflow.text_inputs(prompt)
        elif prompt_node not in prompt:
            raise WorkflowFileError(f"--prompt-node is {prompt_node}, expected one of {', '.join(prompt)}.")
        else:
            names = [name for name in workflow.TEXTS if name in prompt[prompt_node]["inputs"]]
            if not names:
                raise WorkflowFileError(f"--prompt-node: {title(prompt_node, prompt, self.titles)} has no text.")
            self.texts = [workflow.text_source(prompt, prompt_node, name) for name in names]
        self.seeds = _seed_inputs(prompt)
        if not self.seeds:
            raise WorkflowFileError("This workflow has no seed, so its pictures could not be distinguished.")
        self.loaders = workflow.nodes_of(prompt, "LoadImage")
        if not workflow.nodes_of(prompt, "SaveImage"):
            raise WorkflowFileError("This workflow has no Save Image node, so there is no picture to collect.")
        self.used = upstream(prompt)

    @property
    def digest(self) -> str:
        """Hash of nodes, links and settings, without what belongs to a case."""
        prompt = self._fill("", [""] * len(self.loaders), 0, "")
        return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()

    def fill(self, case: Case, images: Sequence[str], folder: str) -> dict:
        """The case's own workflow, which reads these `images` of the server and saves into its `folder`.

        Load Image nodes left over are bypassed. Raises WorkflowFileError where with so few references nothing would be
        drawn, or a picture without one of them.
        """
        prompt = self._fill(case.item.prompt, images, case.seed, f"{folder}/{case.name}")
        for loader in self.loaders[len(images) :]:
            _bypass(prompt, loader, self.object_info)
        if not workflow.nodes_of(prompt, "SaveImage"):
            raise WorkflowFileError(
                f"This workflow draws nothing from {len(images)} reference(s): it has {len(self.loaders)} Load Image "
                "nodes and needs them all. Give more (--references), or take nodes out."
            )
        left = upstream(prompt)
        lost = [key for key in self.loaders[: len(images)] if key in self.used and key not in left]
        if lost:
            raise WorkflowFileError(
                f"{title(lost[0], prompt, self.titles)}: with {len(images)} reference(s) for {len(self.loaders)} Load "
                "Image nodes nothing leads from here to the picture, which would be drawn without it. Give more "
                "(--references), or take nodes out."
            )
        return prompt

    def _fill(self, text: str, images: Sequence[str], seed: int, file: str) -> dict:
        prompt = workflow.put_in(self.prompt, list(images))
        for key, name in self.texts:
            prompt[key]["inputs"][name] = text
        for key, name in self.seeds:
            prompt[key]["inputs"][name] = seed
        for key in workflow.nodes_of(prompt, "SaveImage"):
            prompt[key]["inputs"]["filename_prefix"] = file
        return prompt


def _seed_inputs(prompt: dict) -> list[tuple[str, str]]:
    """(node, input) pairs where the workflow's seeds are written, through the links to them."""
    found = []
    for key, node in prompt.items():
        for name in ("seed", "noise_seed"):
            target, value = (key, name), node["inputs"].get(name)
            if is_link(value) and value[0] in prompt:
                target = (value[0], "value")
                value = prompt[value[0]]["inputs"].get("value")
            if isinstance(value, int) and not isinstance(value, bool):
                found.append(target)
    return list(dict.fromkeys(found))


def upstream(prompt: dict, starts: Iterable[str] | None = None) -> set[str]:
    """Ids of some nodes, None: those that save pictures, and of all that they are made from."""
    wanted, found = list(workflow.nodes_of(prompt, "SaveImage") if starts is None else starts), set()
    while wanted:
        key = wanted.pop()
        if key in prompt and key not in found:
            found.add(key)
            links = [value for value in prompt[key]["inputs"].values() if is_link(value)]
            wanted += [link[0] for link in links if isinstance(link[0], str)]
    return found


def _bypass(prompt: dict, key: str, object_info: dict) -> None:
    """Removes a node as the editor's bypass does, one of its linked inputs in an output's stead; dependents too."""
    node = prompt.pop(key)
    if not object_info:
        raise WorkflowFileError(
            "There are fewer references than Load Image nodes, and no server shows its nodes (/object_info), by which "
            "the others could be bypassed. Give more (--references), or take nodes out."
        )
    info = object_info[node["class_type"]]
    inputs = sockets(info, node["inputs"])
    links = [node["inputs"].get(socket.name) for socket in inputs]
    linked = [is_link(link) and link[0] in prompt for link in links]
    for other in list(prompt):
        for name, value in list(prompt.get(other, {"inputs": {}})["inputs"].items()):
            if not is_link(value) or value[0] != key:
                continue
            reader = object_info[prompt[other]["class_type"]]
            kind = next((s.type for s in sockets(reader, [name]) if s.name == name), "*")
            types = [socket.type if usable else None for socket, usable in zip(inputs, linked)]
            index = bypass_input(types, socket_type(info["output"][value[1]]), value[1], kind)
            if index is not None and linked[index]:
                prompt[other]["inputs"][name] = links[index]
                continue
            del prompt[other]["inputs"][name]
            if name in reader["input"].get("required", {}):
                _bypass(prompt, other, object_info)
                break
