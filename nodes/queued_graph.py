"""What the queued graph says of a node: the host's hidden inputs `prompt` and `unique_id`.

Validation gets no graph from the host: there it is that of the request to queue it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

from ..common.prompt_graph import Graph, inputs_of, is_link, upstream
from ..sampling.clock import OWN_STEPS

T = TypeVar("T")
# Of the request that this task answers: the graph, and what functions made of it.
_queued: ContextVar[tuple[Graph, dict[Callable, Any]] | None] = ContextVar("queued_graph", default=None)
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
    _queued.set((graph if isinstance(graph, dict) else {}, {}))
    return request


def once(make: Callable[[Graph], T]) -> T:
    """What a function makes of the graph that is validated: made once for all its nodes, which come one by one."""
    graph, made = _queued.get() or ({}, {})
    if make not in made:
        made[make] = make(graph)
    return made[make]


def queued(node_id: Any) -> Mapping[str, Any]:
    """The inputs of a node of the graph that is validated: values, and links as [node, output]; empty outside."""
    return inputs_of(_graph(), node_id)


def before(node_id: Any, name: str) -> Iterator[str]:
    """A node of the graph that is validated and those before it by inputs of a name, the nearest first, each once."""
    return upstream(_graph(), node_id, inputs=[name])


def nodes_of(kind: str) -> list[str]:
    """The nodes of a class in the graph that is validated."""
    return [key for key, node in _graph().items() if isinstance(node, Mapping) and node.get("class_type") == kind]


def own_steps_behind(node_id: Any) -> str | None:
    """The sampler of a node, or one that its MODEL or GUIDER goes to, if it chooses its own steps; else None."""
    return once(_own_steps).get(str(node_id))


def _own_steps(graph: Graph) -> dict[str, str]:
    """The nodes before samplers that choose their own steps, and these themselves, each with the sampler's name."""
    samplers: dict[str, list[str]] = {}
    for node in graph:
        inputs = inputs_of(graph, node)
        sampler = inputs.get("sampler")  # Sampler Custom's, from KSampler Select
        name = (inputs_of(graph, sampler[0]) if is_link(sampler) else inputs).get("sampler_name")
        if name in OWN_STEPS:
            samplers.setdefault(name, []).append(node)
    return {key: name for name in samplers for key in upstream(graph, *samplers[name], inputs=("model", "guider"))}


def number(value: Any) -> float | None:
    """A queued value as the host will convert it; None where it cannot, which it says itself, and for a link."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _graph() -> Graph:
    return (_queued.get() or ({}, {}))[0]
