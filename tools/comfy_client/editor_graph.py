"""From the editor's graph to the queue's format, as the front end's `graphToPrompt` does it.

First a flat list of nodes with what is inside subgraphs ("12:34" is node 34 in the subgraph of node 12) and each node's
values; then every input's link is followed through reroutes, bypassed nodes and the borders of subgraphs, and written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .node_inputs import Socket, bypass_input, socket_type, sockets, widget_values

ALWAYS, MUTED, BYPASSED = 0, 2, 4  # modes of a node
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
EDITOR_ONLY = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")
DEEPEST = 50  # subgraphs in subgraphs
MOST = 100_000  # nodes, with those of subgraphs, which may hold each other twice and again
REPAIR = "Open the file in the editor, mend this link and save the file again."
FROM_INPUTS, TO_OUTPUTS = "-10", "-20"  # the ends of links inside a subgraph that are the subgraph's own


class WorkflowFileError(ValueError):
    """A workflow file that cannot be used here; the text says why and what to do."""


class _Link(NamedTuple):
    origin: str
    slot: int
    target: str
    target_slot: int


class _Value(NamedTuple):
    """What a PrimitiveNode, or a widget on a subgraph's node, hands to an input instead of a link."""

    value: Any


@dataclass
class _Graph:
    """A workflow, or a subgraph's definition."""

    nodes: list[dict]
    links: dict[Any, _Link]
    inputs: list[dict]
    outputs: list[dict]


@dataclass(eq=False)
class _Node:
    id: str
    saved: dict
    graph: _Graph
    host: _Node | None  # the node whose subgraph this one is in
    inside: _Graph | None = None  # its own subgraph
    sockets: list[Socket] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)  # types
    values: dict[str, Any] = field(default_factory=dict)  # of its widgets

    @property
    def type(self) -> str:
        return self.saved["type"]

    @property
    def mode(self) -> int:
        return self.saved.get("mode", ALWAYS)

    @property
    def outgoing(self) -> list[dict]:
        return self.saved.get("outputs") or []

    def __str__(self) -> str:
        return f"Node {self.id} ({self.type})"


def graph_to_prompt(workflow: dict, object_info: dict) -> dict:
    """The queue's format (id -> class_type, inputs) of a workflow that was saved from the editor.

    Muted nodes, and those that the editor alone has, are left out. The server's `object_info` says which inputs are
    widgets, and the order in which their values are saved. Raises WorkflowFileError for a node that the server lacks
    or a link that leads nowhere.
    """
    flat = _Flat(workflow, object_info)
    prompt, unknown = {}, []
    for node in flat.nodes.values():
        if node.inside or node.type in EDITOR_ONLY or node.mode in (MUTED, BYPASSED):
            continue
        if node.type not in object_info:
            if any(s.link is not None for s in node.sockets) or any(s.get("links") for s in node.outgoing):
                unknown.append(f"{node.type} (node {node.id})")
            continue  # else a label or a switch for the editor, of a pack that the server lacks
        inputs = {name: _boxed(value) for name, value in node.values.items()}
        for index, socket in enumerate(node.sockets):
            try:
                source = flat.source(node, index)
            except RecursionError:
                raise WorkflowFileError(
                    f"{node}: what feeds its input {socket.name!r} leads in a circle. {REPAIR}"
                ) from None
            if isinstance(source, _Value):
                inputs[socket.name] = _boxed(source.value)
            elif source:
                inputs[socket.name] = source
        title = node.saved.get("title") or object_info[node.type].get("display_name") or node.type
        prompt[node.id] = {"class_type": node.type, "inputs": inputs, "_meta": {"title": title}}
    if unknown:
        raise WorkflowFileError(
            f"The server has no node {', '.join(unknown)}. Install its pack; what the editor alone has (Get and Set "
            "nodes), replace by links; or mute or bypass it."
        )
    return prompt


class _Flat:
    """All nodes of a workflow by id, those in subgraphs after the node that they are in."""

    def __init__(self, workflow: dict, object_info: dict):
        self.info, self.nodes = object_info, {}
        definitions = workflow.get("definitions") or {}
        self.subgraphs = {s["id"]: _read_graph(s, s.get("name")) for s in definitions.get("subgraphs") or []}
        self._add(_read_graph(workflow, "workflow"), None)

    def _add(self, graph: _Graph, host: _Node | None) -> None:
        for saved in graph.nodes:
            node = _Node(f"{host.id}:{saved['id']}" if host else str(saved["id"]), saved, graph, host)
            self.nodes[node.id] = node
            if len(self.nodes) > MOST:
                raise WorkflowFileError(f"{node}: it has over {MOST:,} nodes with those of its subgraphs.")
            node.inside, info = self.subgraphs.get(node.type), self.info.get(node.type)
            given = saved.get("inputs") or []
            if node.inside:
                known = [Socket(s["name"], s["type"]) for s in node.inside.inputs]
                node.outputs = [s["type"] for s in node.inside.outputs]
            else:
                known = sockets(info, [s["name"] for s in given]) if info else []
                names = {socket.name for socket in known}
                others = [s for s in given if s["name"] not in names and not (info and s.get("widget"))]
                known += [Socket(s["name"], socket_type(s["type"])) for s in others]  # as other packs' scripts add them
                made = info["output"] if info else []
                node.outputs = [socket_type(k) for k in [*made, *(s["type"] for s in node.outgoing[len(made) :])]]
            linked = {s["name"]: s.get("link") for s in given}
            node.sockets = [socket._replace(link=linked.get(socket.name)) for socket in known]
            if info:
                node.values = widget_values(info, node.saved.get("widgets_values") or [])
            if node.inside and node.mode not in (MUTED, BYPASSED):
                if node.id.count(":") > DEEPEST:
                    raise WorkflowFileError(
                        f"{node}: its subgraph contains itself. Take that node out of it in the editor."
                    )
                self._add(node.inside, node)
                self._promote(node)

    def _promote(self, host: _Node) -> None:
        """Values of the widgets that a subgraph's node shows: its own, else those of the nodes inside."""
        for index, socket in enumerate(host.sockets):
            for inner, name in self._fed(host, index):
                if name in inner.values:
                    host.values[socket.name] = inner.values[name]
                    break
        own = host.saved.get("widgets_values") or []
        for name, value in zip(list(host.values), own):
            if value is not None:
                host.values[name] = value
        for (key, name, *_), value in zip((host.saved.get("properties") or {}).get("proxyWidgets") or [], own):
            if value is not None:
                self._set(host, str(key), name, value)

    def _set(self, host: _Node, key: str, name: str, value: Any) -> None:
        """Sets a widget of a node inside, or of one inside that ("12: seed"); the host's own input, if it feeds it."""
        inner = self.nodes.get(f"{host.id}:{key}")
        if key == "-1":
            if name in host.values:
                host.values[name] = value
        elif inner and inner.inside and (deeper := re.match(r"\s*(\d+)\s*:\s*(.+)", name)):
            self._set(inner, *deeper.groups(), value)
        elif inner and name in inner.values:
            feeding = (s.name for i, s in enumerate(host.sockets) if (inner, name) in self._fed(host, i))
            target = next(feeding, None)
            (host if target else inner).values[target or name] = value

    def _fed(self, host: _Node, index: int) -> list[tuple[_Node, str]]:
        """Nodes and names of their inputs that an input of a subgraph feeds."""
        return [
            (node, socket.name)
            for key, link in host.inside.links.items()
            if link[:2] == (FROM_INPUTS, index) and (node := self.nodes.get(f"{host.id}:{link.target}"))
            for socket in node.sockets
            if socket.link == key
        ]

    def source(self, node: _Node, index: int, kind: str | None = None) -> list | _Value | None:
        """[node id, slot] that feeds an input, or a value; None: nothing does. `kind` is the type asked for."""
        socket = node.sockets[index]
        if socket.link is None:
            return None
        if socket.link not in node.graph.links:
            raise WorkflowFileError(
                f"{node}: there is no link {socket.link}, which its input {socket.name!r} has. {REPAIR}"
            )
        return self._follow(node.graph.links[socket.link], node.host, kind or socket.type)

    def _follow(self, link: _Link, host: _Node | None, kind: str) -> list | _Value | None:
        """The source of a link of the workflow, or of a link in the subgraph of `host`."""
        if host and link.origin == FROM_INPUTS:
            if link.slot >= len(host.sockets):
                raise WorkflowFileError(
                    f"{host}: its subgraph has no input {link.slot}, which a link comes from. {REPAIR}"
                )
            name = host.sockets[link.slot].name
            if host.sockets[link.slot].link is None:
                return _Value(host.values[name]) if name in host.values else None
            return self.source(host, link.slot)
        key = f"{host.id}:{link.origin}" if host else link.origin
        if key not in self.nodes:
            raise WorkflowFileError(f"There is no node {key}, which a link to node {link.target} comes from. {REPAIR}")
        return self._output(self.nodes[key], link.slot, kind)

    def _output(self, node: _Node, slot: int, kind: str) -> list | _Value | None:
        """The source behind an output of a node; `kind` is the type of the input that it is for."""
        if node.type == "PrimitiveNode":
            values = node.saved.get("widgets_values")
            return _Value(values[0]) if values else None
        if node.mode == MUTED:
            return None
        if slot >= len(node.outputs) and (node.inside or node.mode == BYPASSED):
            raise WorkflowFileError(f"{node} has no output {slot}, which a link comes from. {REPAIR}")
        if node.mode == BYPASSED:
            index = bypass_input([s.type for s in node.sockets], node.outputs[slot], slot, kind)
            return None if index is None else self.source(node, index)
        if node.inside:
            links = (link for link in node.inside.links.values() if link[2:] == (TO_OUTPUTS, slot))
            return self._follow(link, node, kind) if (link := next(links, None)) else None
        if node.type == "Reroute":
            return self.source(node, 0, kind) if node.sockets else None
        return [node.id, slot]


def _boxed(value: Any) -> Any:
    """A widget's value as the queue takes it: a list would be read as a link."""
    return {"__value__": value} if isinstance(value, list) else value


def _read_graph(saved: dict, name: str) -> _Graph:
    """The graph of a workflow or a subgraph, whose links are lists or objects."""
    nodes = saved.get("nodes") or []
    used = [s for node in nodes for s in node.get("inputs") or [] if s.get("link") is not None]
    if used and saved.get("links") is None:
        raise WorkflowFileError(f"The {name} has no table `links`, which its nodes' inputs refer to. Save it again.")
    links = {}
    for link in saved.get("links") or []:
        if not link:
            continue
        try:
            parts = [link[key] for key in LINK] if isinstance(link, dict) else link
            number, origin, slot, target, target_slot, *_ = parts
            links[number] = _Link(str(origin), slot, str(target), target_slot)
        except (KeyError, ValueError):
            raise WorkflowFileError(f"The {name} has a link {link}, expected {', '.join(LINK)}. {REPAIR}") from None
    return _Graph(nodes, links, saved.get("inputs") or [], saved.get("outputs") or [])
