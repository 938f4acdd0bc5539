"""From the editor's graph to the queue's format, as the front end's `graphToPrompt` does it.

First a flat list of nodes with what is inside subgraphs ("12:34" is node 34 in the subgraph of node 12) and each node's
values; then every input's link is followed through reroutes, bypassed nodes and the borders of subgraphs, and written.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ALWAYS, MUTED, BYPASSED = 0, 2, 4  # modes of a node
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "MARKDOWN", "TEXTAREA", "COLOR", "COLORS", "BOUNDING_BOX")
WIDGETS += ("BOUNDING_BOXES", "CURVE", "RANGE", "PAINTER", "COMPOSITOR", "VIDEO_EDIT", "COMFY_DYNAMICCOMBO_V3")
WITHOUT_DEFAULT = {"INT": 0, "FLOAT": 0, "STRING": "", "BOOLEAN": False}
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")
MATCH_TYPE, AUTOGROW, DYNAMIC_COMBO = "COMFY_MATCHTYPE_V3", "COMFY_AUTOGROW_V3", "COMFY_DYNAMICCOMBO_V3"
EDITOR_ONLY = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")
DEEPEST = 50  # subgraphs in subgraphs
FROM_INPUTS = "-10"  # what a link inside a subgraph has as origin where it comes from the subgraph's inputs


class WorkflowFileError(ValueError):
    """A workflow file that cannot be used here; the text says why and what to do."""


class Socket(NamedTuple):
    """An input of a node."""

    name: str
    type: str
    link: Any = None  # the link's id


class _Link(NamedTuple):
    origin: str
    slot: int
    target: str


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
                raise WorkflowFileError(f"{node}: what feeds its input {socket.name!r} leads in a circle.") from None
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
            node.inside, info = self.subgraphs.get(node.type), self.info.get(node.type)
            given = saved.get("inputs") or []
            if node.inside:
                known = [Socket(s["name"], s["type"]) for s in node.inside.inputs]
                node.outputs = [s["type"] for s in node.inside.outputs]
            else:
                known = sockets(info, [s["name"] for s in given]) if info else []
                names = {socket.name for socket in known}
                others = [s for s in given if s["name"] not in names and not (info and s.get("widget"))]
                known += [Socket(s["name"], _type(s["type"])) for s in others]  # as other packs' scripts add them
                made = info["output"] if info else []
                node.outputs = [_type(k) for k in [*made, *(s["type"] for s in node.outgoing[len(made) :])]]
            linked = {s["name"]: s.get("link") for s in given}
            node.sockets = [socket._replace(link=linked.get(socket.name)) for socket in known]
            if info:
                node.values = _widget_values(node, info)
            if node.inside and node.mode not in (MUTED, BYPASSED):
                if node.id.count(":") > DEEPEST:
                    raise WorkflowFileError(f"{node}: its subgraph contains itself.")
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
            for key in host.inside.inputs[index].get("linkIds") or []
            if key in host.inside.links and (node := self.nodes.get(f"{host.id}:{host.inside.links[key].target}"))
            for socket in node.sockets
            if socket.link == key
        ]

    def source(self, node: _Node, index: int, kind: str | None = None) -> list | _Value | None:
        """[node id, slot] that feeds an input, or a value; None: nothing does. `kind` is the type asked for."""
        socket = node.sockets[index]
        if socket.link is None:
            return None
        if socket.link not in node.graph.links:
            raise WorkflowFileError(f"{node}: there is no link {socket.link}, which its input {socket.name!r} has.")
        return self._follow(node.graph.links[socket.link], node.host, kind or socket.type)

    def _follow(self, link: _Link, host: _Node | None, kind: str) -> list | _Value | None:
        """The source of a link of the workflow, or of a link in the subgraph of `host`."""
        if host and link.origin == FROM_INPUTS:
            name = host.sockets[link.slot].name
            if host.sockets[link.slot].link is None:
                return _Value(host.values[name]) if name in host.values else None
            return self.source(host, link.slot)
        key = f"{host.id}:{link.origin}" if host else link.origin
        if key not in self.nodes:
            raise WorkflowFileError(f"There is no node {key}, which a link to node {link.target} comes from.")
        return self._output(self.nodes[key], link.slot, kind)

    def _output(self, node: _Node, slot: int, kind: str) -> list | _Value | None:
        """The source behind an output of a node; `kind` is the type of the input that it is for."""
        if node.type == "PrimitiveNode":
            values = node.saved.get("widgets_values")
            return _Value(values[0]) if values else None
        if node.mode == MUTED:
            return None
        if node.mode == BYPASSED:
            index = bypass_input([s.type for s in node.sockets], node.outputs[slot], slot, kind)
            return None if index is None else self.source(node, index)
        if node.inside:
            links = [node.inside.links[k] for k in node.inside.outputs[slot]["linkIds"] if k in node.inside.links]
            return self._follow(links[0], node, kind) if links else None
        if node.type == "Reroute":
            return self.source(node, 0, kind)
        return [node.id, slot]


def bypass_input(inputs: Sequence[str | None], output: str, slot: int, kind: str) -> int | None:
    """Index of the input that a bypassed node hands on as its output `slot`, as the front end chooses it.

    That of the output's own position where the types fit, else the first of the type asked for, else one that fits.

    Args:
        inputs: types of the node's inputs; None for one that is not to be chosen.
        output: type of the output.
        slot: index of the output.
        kind: type of the input that it leads to.
    """
    if kind in ("*", "") and inputs:
        return slot if slot < len(inputs) else 0
    fitting = [i for i, given in enumerate(inputs) if given is not None and _fit(given, output) and _fit(given, kind)]
    if slot in fitting:
        return slot
    return inputs.index(kind) if kind in inputs else next(iter(fitting), None)


def _fit(one: str, other: str) -> bool:
    """Whether a link may join two types, which may be lists ("INT,FLOAT") or any ("*")."""
    one, other = set(one.lower().split(",")), set(other.lower().split(","))
    return bool(one & other or {"*", ""} & (one | other))


def sockets(info: dict, saved: Iterable[str] = ()) -> list[Socket]:
    """A node's inputs in the front end's order: first those without a widget; `saved` are names of those that grew."""
    found = {False: [], True: []}
    for name, kind, options in _specs(info["input"], info.get("input_order")):
        if kind == AUTOGROW:
            found[False] += [Socket(other, "*") for other in saved if other.startswith(name + ".")]
            continue
        is_widget = _is_widget(kind, options)
        found[is_widget].append(Socket(name, kind))
        if kind == DYNAMIC_COMBO:
            found[True] += [Socket(other, "*") for other in saved if other.startswith(name + ".")]
    return found[False] + found[True]


def _specs(groups: dict, order: dict | None) -> Iterator[tuple[str, str, dict]]:
    """(name, type, options) of a node's inputs, in order."""
    for group in ("required", "optional"):
        given = groups.get(group) or {}
        for name in (order or {}).get(group, given):
            kind, *options = given[name]
            options = options[0] if options else {}
            yield name, _type(kind), {"options": kind, **options} if isinstance(kind, list) else options


def _type(kind: Any) -> str:
    return "COMBO" if isinstance(kind, list) else "*" if kind == MATCH_TYPE else str(kind)


def _is_widget(kind: str, options: dict) -> bool:
    return options.get("widgetType", kind) in WIDGETS and not options.get("forceInput")


def _widget_values(node: _Node, info: dict) -> dict:
    """Values of a node's widgets by name; saved is a list in the schema's order, with the editor's own in between."""
    saved = node.saved.get("widgets_values") or []
    if isinstance(saved, dict):
        return saved
    return dict(_take(deque(saved), info["input"], info.get("input_order")))


def _take(saved: deque, groups: dict, order: dict | None = None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of a group of widgets, off the front of the saved values."""
    for name, kind, options in _specs(groups, order):
        if not _is_widget(kind, options):
            continue
        choices = options.get("options") or [None]
        if kind == DYNAMIC_COMBO:
            choices, inputs = [c["key"] for c in choices], {c["key"]: c["inputs"] for c in choices}
        value = saved.popleft() if saved else options.get("default", WITHOUT_DEFAULT.get(kind, choices[0]))
        yield prefix + name, value
        seed = options.get("control_after_generate") or (kind == "INT" and name in ("seed", "noise_seed"))
        if seed and saved and saved[0] in AFTER_GENERATE:
            saved.popleft()
        if kind == DYNAMIC_COMBO:
            yield from _take(saved, inputs.get(value, {}), prefix=f"{prefix}{name}.")


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
        if isinstance(link, dict):
            link = [link[key] for key in ("id", "origin_id", "origin_slot", "target_id")]
        if link:
            links[link[0]] = _Link(str(link[1]), link[2], str(link[3]))
    return _Graph(nodes, links, saved.get("inputs") or [], saved.get("outputs") or [])
