"""What the queued graph says of a node: the host's hidden inputs `prompt` and `unique_id`.

Validation gets no graph from the host: there it is that of the request to queue it.
"""

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

_queued: ContextVar[dict | None] = ContextVar("queued_graph", default=None)  # of the request that this task answers
MODEL_FILES = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt", ".gguf")


def model_files(hidden: Any, socket: str, *, chain: bool = False) -> list[str]:
    """The model files that the node at a socket names; with `chain` also all those behind it, as LoRAs and loaders.

    Empty where nothing is queued, as in a test.
    """
    graph: dict = (hidden.prompt if hidden else None) or {}
    links = [_inputs(graph, hidden.unique_id).get(socket)] if graph else []
    found: list[str] = []
    seen = set()
    while links:
        link = links.pop()
        if not (isinstance(link, list) and len(link) == 2) or str(link[0]) in seen:
            continue
        seen.add(str(link[0]))
        values = _inputs(graph, link[0]).values()
        found += [value for value in values if isinstance(value, str) and value.lower().endswith(MODEL_FILES)]
        links += values if chain else ()
    return found


def source(hidden: Any, socket: str, kind: str) -> dict:
    """The inputs of the node of a class that a socket of the node is connected to; empty where it is another."""
    graph: dict = (hidden.prompt if hidden else None) or {}
    link = _inputs(graph, hidden.unique_id).get(socket) if graph else None
    if not (isinstance(link, list) and link) or graph.get(str(link[0]), {}).get("class_type") != kind:
        return {}
    return _inputs(graph, link[0])


def remember(request: Any) -> Any:
    """The host's handler of requests to /prompt: keeps the graph for `queued` until the answer, and passes it on."""
    graph = request.get("prompt") if isinstance(request, dict) else None
    _queued.set(graph if isinstance(graph, dict) else {})
    return request


def queued(node_id: Any) -> dict:
    """The inputs of a node of the graph that is validated: values, and links as [node, output]; empty outside."""
    return _inputs(_queued.get() or {}, node_id)


def samplers_behind(node_id: Any) -> Iterator[str]:
    """Names of the samplers that a node's MODEL or GUIDER goes to, in the graph that is validated."""
    graph, wanted, seen = _queued.get() or {}, [str(node_id)], set()
    while wanted:
        source = wanted.pop()
        if source in seen:
            continue
        seen.add(source)
        for key in graph:
            inputs = _inputs(graph, key)
            links = (inputs.get(name) for name in ("model", "guider"))
            if not any(isinstance(link, list) and link and str(link[0]) == source for link in links):
                continue
            wanted.append(str(key))
            sampler = inputs.get("sampler")  # Sampler Custom's, from KSampler Select
            own = _inputs(graph, sampler[0]) if isinstance(sampler, list) and sampler else inputs
            if isinstance(name := own.get("sampler_name"), str):
                yield name


def _inputs(graph: dict, node_id: Any) -> dict:
    node = graph.get(str(node_id))
    inputs = node.get("inputs") if isinstance(node, dict) else None
    return inputs if isinstance(inputs, dict) else {}
