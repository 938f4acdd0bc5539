"""What the queued graph says of a node: the host's hidden inputs `prompt` and `unique_id`."""

from typing import Any

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


def _inputs(graph: dict, node_id: Any) -> dict:
    return graph.get(str(node_id), {}).get("inputs", {})
