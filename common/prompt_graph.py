"""A queued graph in the API's form, and the one walk along its links.

What is queued comes from elsewhere: a malformed node has no inputs here.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from numbers import Real
from typing import Any, TypeGuard

Graph = Mapping[str, Any]  # node id -> class_type and inputs; a link is [node id, output number]


def inputs_of(graph: Graph, node: Any) -> Mapping[str, Any]:
    """Values and links of a node's inputs by name; empty for a node that the graph has not."""
    found = graph.get(str(node))
    inputs = found.get("inputs") if isinstance(found, Mapping) else None
    return inputs if isinstance(inputs, Mapping) else {}


def is_link(value: Any) -> TypeGuard[list]:
    """Whether an input's value is a link: [node id, output number]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], Real)


def upstream(graph: Graph, *nodes: Any, inputs: Collection[str] | None = None) -> Iterator[str]:
    """Nodes and those that they are made from, the nearest first, each once; with `inputs`, by these inputs alone."""
    return _reached(nodes, lambda key: (str(link[0]) for link in _links(graph, key, inputs)))


def downstream(graph: Graph, node: Any, inputs: Collection[str] | None = None) -> Iterator[str]:
    """A node and those that read it, the nearest first, each once; with `inputs`, by inputs of these names alone."""
    readers: dict[str, list[str]] = {}
    for key in graph:
        for link in _links(graph, key, inputs):
            readers.setdefault(str(link[0]), []).append(key)
    return _reached([node], lambda key: readers.get(key, ()))


def _links(graph: Graph, node: str, inputs: Collection[str] | None) -> Iterator[list]:
    """The links at a node's inputs, or at those of these names."""
    for name, value in inputs_of(graph, node).items():
        if is_link(value) and (inputs is None or name in inputs):
            yield value


def _reached(nodes: Iterable[Any], following: Callable[[str], Iterable[str]]) -> Iterator[str]:
    wanted = list(dict.fromkeys(map(str, nodes)))
    found = set(wanted)
    for key in wanted:
        yield key
        for other in following(key):
            if other not in found:
                found.add(other)
                wanted.append(other)
