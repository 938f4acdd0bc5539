"""What the queued graph says of a node: the host's hidden inputs `prompt` and `unique_id`.

Validation gets no graph from the host: there it is that of the request to queue it.
"""

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from ..common.prompt_graph import downstream, inputs_of, is_link, upstream

_queued: ContextVar[dict | None] = ContextVar("queued_graph", default=None)  # of the request that this task answers
MODEL_FILES = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt", ".gguf")


def model_files(hidden: Any, socket: str, *, chain: bool = False) -> list[str]:
    """The model files that the node at a socket names; with `chain` also all those behind it, as LoRAs and loaders.

    Empty where nothing is queued, as in a test.
    """
    graph = (hidden.prompt if hidden else None) or {}
    link = inputs_of(graph, hidden.unique_id).get(socket) if graph else None
    if not is_link(link):
        return []
    nodes = upstream(graph, link[0]) if chain else [link[0]]
    values = (value for node in nodes for value in inputs_of(graph, node).values())
    return [value for value in values if isinstance(value, str) and value.lower().endswith(MODEL_FILES)]


def source(hidden: Any, socket: str, kind: str) -> Mapping[str, Any]:
    """The inputs of the node of a class that a socket of the node is connected to; empty where it is another."""
    graph = (hidden.prompt if hidden else None) or {}
    link = inputs_of(graph, hidden.unique_id).get(socket) if graph else None
    found = is_link(link) and graph.get(str(link[0]), {}).get("class_type") == kind
    return inputs_of(graph, link[0]) if found else {}


def remember(request: Any) -> Any:
    """The host's handler of requests to /prompt: keeps the graph for `queued` until the answer, and passes it on."""
    graph = request.get("prompt") if isinstance(request, dict) else None
    _queued.set(graph if isinstance(graph, dict) else {})
    return request


def queued(node_id: Any) -> Mapping[str, Any]:
    """The inputs of a node of the graph that is validated: values, and links as [node, output]; empty outside."""
    return inputs_of(_queued.get() or {}, node_id)


def queued_of(kind: str) -> list[Mapping[str, Any]]:
    """The inputs of each node of a class in the graph that is validated."""
    graph = _queued.get() or {}
    found = (key for key, node in graph.items() if isinstance(node, Mapping) and node.get("class_type") == kind)
    return [inputs_of(graph, key) for key in found]


def samplers_behind(node_id: Any) -> Iterator[str]:
    """Names of the sampler of a node and of those that its MODEL or GUIDER goes to, in the graph that is validated."""
    graph = _queued.get() or {}
    for node in downstream(graph, node_id, ("model", "guider")):
        inputs = inputs_of(graph, node)
        sampler = inputs.get("sampler")  # Sampler Custom's, from KSampler Select
        name = (inputs_of(graph, sampler[0]) if is_link(sampler) else inputs).get("sampler_name")
        if isinstance(name, str):
            yield name
