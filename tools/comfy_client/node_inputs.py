"""A node's inputs as the front end makes them of the server's object_info: their order, and which are widgets."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "MARKDOWN", "TEXTAREA", "COLOR", "COLORS", "BOUNDING_BOX")
WIDGETS += ("BOUNDING_BOXES", "CURVE", "RANGE", "PAINTER", "COMPOSITOR", "VIDEO_EDIT", "COMFY_DYNAMICCOMBO_V3")
WITHOUT_DEFAULT = {"INT": 0, "FLOAT": 0, "STRING": "", "BOOLEAN": False}
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")
MATCH_TYPE, AUTOGROW, DYNAMIC_COMBO = "COMFY_MATCHTYPE_V3", "COMFY_AUTOGROW_V3", "COMFY_DYNAMICCOMBO_V3"


class Socket(NamedTuple):
    """An input of a node."""

    name: str
    type: str
    link: Any = None  # the link's id


def sockets(info: dict, saved: Iterable[str] = ()) -> list[Socket]:
    """A node's inputs in the front end's order: first those without a widget; `saved` are names of those that grew."""
    found = {False: [], True: []}
    for name, kind, options in _specs(info["input"], info.get("input_order")):
        is_widget = _is_widget(kind, options)
        if kind != AUTOGROW:
            found[is_widget].append(Socket(name, kind))
        grown = [other for other in saved if other.startswith(f"{name}.")]
        if grown and kind in (AUTOGROW, DYNAMIC_COMBO):
            groups = [options["template"]["input"]] if kind == AUTOGROW else [c["inputs"] for c in options["options"]]
            types = {inner: made for group in groups for inner, made, _ in _specs(group)}
            usual = next(iter(types.values()), "*")
            found[is_widget] += [Socket(other, types.get(other[len(name) + 1 :], usual)) for other in grown]
    return found[False] + found[True]


def _specs(groups: dict, order: dict | None = None) -> Iterator[tuple[str, str, dict]]:
    """(name, type, options) of a node's inputs, in order."""
    for group in ("required", "optional"):
        given = groups.get(group) or {}
        for name in (order or {}).get(group, given):
            kind, *options = given[name]
            options = options[0] if options else {}
            yield name, socket_type(kind), {"options": kind, **options} if isinstance(kind, list) else options


def socket_type(kind: Any) -> str:
    """The type of a socket, of what the schema or a file has as its type."""
    return "COMBO" if isinstance(kind, list) else "*" if kind == MATCH_TYPE else str(kind)


def _is_widget(kind: str, options: dict) -> bool:
    return options.get("widgetType", kind) in WIDGETS and not options.get("forceInput")


def choices(info: dict) -> dict[str, list]:
    """The values that a node lists for its inputs, by name; without inputs whose files are uploaded."""
    combos = [(name, options) for name, kind, options in _specs(info["input"]) if kind == "COMBO"]
    found = {name: options.get("options") for name, options in combos if not any("upload" in key for key in options)}
    return {name: values for name, values in found.items() if isinstance(values, list)}


def widget_values(info: dict, saved: list | dict) -> dict:
    """Values of a node's widgets by name; `saved` is in the schema's order, with the editor's own in between."""
    return saved if isinstance(saved, dict) else dict(_take(deque(saved), info["input"], info.get("input_order")))


def with_values(info: dict, saved: list | dict, values: dict) -> list | dict:
    """The saved values of a node's widgets, with `values` by name in place of theirs, where they were saved."""
    if isinstance(saved, dict):
        return {**saved, **values}
    numbered = [value if value in AFTER_GENERATE else index for index, value in enumerate(saved)]
    at = {index: name for name, index in widget_values(info, numbered + [-1] * 99).items()}
    return [values.get(at.get(index), value) for index, value in enumerate(saved)]


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
            yield from _take(saved, inputs.get(str(value), {}), prefix=f"{prefix}{name}.")


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
