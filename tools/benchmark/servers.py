"""The servers of a run: their addresses, and what a workflow needs that they do not have."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import NamedTuple

from ..comfy_client.client import ODD, Client, title
from ..comfy_client.node_inputs import choices
from ..comfy_client.workflow import titles
from .ledger import RunError
from .template import upstream

MODEL_FILES = ("safetensors", "sft", "ckpt", "pt", "pth", "bin", "gguf", "onnx")
MODEL_FOLDERS = ("mllm",)  # inputs that name a folder of a model


class Found(NamedTuple):
    """What a server says of itself at the start."""

    client: Client
    problem: str  # why it does not answer, or empty
    nodes: dict | None = None  # the schema of every node; None where it does not show them
    version: str = "unknown"


def clients(addresses: Iterable[str], headers: Sequence[str] = ()) -> list[Client]:
    """One for each address; an option may hold several, with commas. Raises RunError for a header without a colon."""
    pairs = [header.partition(":") for header in headers]
    if not all(name.strip() and colon for name, colon, _ in pairs):
        raise RunError("--header: expected NAME: VALUE, as in --header 'Authorization: Bearer KEY'.")
    found = {name.strip(): value.strip() for name, _, value in pairs}
    made = [Client(part.strip(), headers=found) for text in addresses for part in text.split(",") if part.strip()]
    return list({client.address: client for client in made}.values())


def ask(servers: Sequence[Client]) -> list[Found]:
    """What each says of itself, all at once."""
    with ThreadPoolExecutor(len(servers)) as pool:
        return list(pool.map(_ask, servers))


def _ask(client: Client) -> Found:
    if problem := client.problem():
        return Found(client, problem)
    try:
        version = client.version()
    except (OSError, HTTPException, *ODD):  # a service need not say
        version = "unknown"
    try:
        return Found(client, "", client.object_info(), version)
    except (OSError, HTTPException, ValueError):
        return Found(client, "", None, version)


def check_equal(found: Sequence[Found], prompt: dict) -> None:
    """Raises RunError that lists, for each server, the nodes and files of a workflow that it does not have."""
    lacking = {one.client.address: missing(prompt, one.nodes) for one in found if one.nodes is not None}
    everywhere = set.intersection(*(set(lacks) for lacks in lacking.values())) if lacking else set()
    # that no server lists a value which is no file may be meant: some nodes take more than they list
    lines = [
        f"  {address}: {what}"
        for address, lacks in lacking.items()
        for what, certain in lacks.items()
        if certain or what not in everywhere
    ]
    if lines:
        raise RunError(
            "\n".join(["The workflow needs what these servers do not have:", *lines])
            + "\nInstall that there, or leave the server out."
        )


def missing(prompt: dict, nodes: Mapping[str, dict]) -> dict[str, bool]:
    """What a workflow needs and a server lacks, by its `nodes`; whether that is certain, a node or a model file."""
    found, names = {}, titles(prompt)
    run = upstream(
        prompt, (key for key, node in prompt.items() if nodes.get(node["class_type"], {}).get("output_node"))
    )
    for key, node in prompt.items():
        if node["class_type"] not in nodes:  # refused wherever it is; other values only where they are used
            found[f"the node {node['class_type']}"] = True
        if key not in run or node["class_type"] not in nodes:
            continue
        for name, values in choices(nodes[node["class_type"]]).items():
            value = node["inputs"].get(name)
            if isinstance(value, str) and value not in values:
                certain = value.lower().rpartition(".")[2] in MODEL_FILES or name in MODEL_FOLDERS
                found[f"{value}, {name} of {title(key, prompt, names)}"] = certain
    return found


def missing_now(client: Client, prompt: dict) -> list[str]:
    """What a server that has been away certainly lacks; nothing where it does not show its nodes."""
    try:
        return [what for what, certain in missing(prompt, client.object_info()).items() if certain]
    except (OSError, HTTPException, ValueError):
        return []
