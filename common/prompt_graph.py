"""A queued graph in the API's form, and the one walk along its links.

What is queued comes from elsewhere: a malformed node has no inputs here.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeGuard

Graph = Mapping[str, Any]  # node id -> class_type and inputs; a link is [node id, output number]


def inputs_of(graph: Graph, node: Any) -> Mapping[str, Any]:
    """Values and links of a node's inputs by name; empty for a node that the graph has not."""
    found = graph.get(str(node))
    inputs = found.get("inputs") if isinstance(found, Mapping) else None
    return inputs if isinstance(inputs, Mapping) else {}


def is_link(value: Any) -> TypeGuard[list]:
    """Whether an input's value is a link: [node id, output number]."""
    return isinstance(value, list) and len(value) == 2


def upstream(graph: Graph, node: Any) -> Iterator[str]:
    """A node and those that it is made from, the nearest first, each once."""
    return _reached(
        str(node), lambda key: (str(value[0]) for value in inputs_of(graph, key).values() if is_link(value))
    )


def downstream(graph: Graph, node: Any, inputs: Collection[str] | None = None) -> Iterator[str]:
    """A node and those that read it, the nearest first, each once; with `inputs`, by inputs of these names alone."""
    readers: dict[str, list[str]] = {}
    for key in graph:
        for name, value in inputs_of(graph, key).items():
            if is_link(value) and (inputs is None or name in inputs):
                readers.setdefault(str(value[0]), []).append(key)
    return _reached(str(node), lambda key: readers.get(key, ()))


def _reached(node: str, following: Callable[[str], Iterable[str]]) -> Iterator[str]:
    found, wanted = {node}, [node]
    for key in wanted:
        yield key
        for other in following(key):
            if other not in found:
                found.add(other)
                wanted.append(other)
