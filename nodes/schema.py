"""Schemas on every host: arguments that an older host does not know are left out, never guessed from its version."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields

from comfy_api.latest import io

from ..common.dtypes import DTYPES
from .checks import check_inputs
from .translation import translate

CATEGORY = "subject"

MLLM = io.Custom("MLLM")
Features = io.Custom("MLLM_FEATURES")
DLA = io.Custom("DLA")
Stages = io.Custom("STAGES")
Orientation = io.Custom("ORIENTATION_MODEL")

WEIGHT_DTYPES = ["default", *DTYPES]
NONE = "none"
LONGEST = 3000  # letters of an error: keys of a file from elsewhere have millions
CAPTION_TIP = "A short text for each picture, to figures of Contact Sheet."


class Node(io.ComfyNode):
    """A node of the pack: what its errors say begins with its display name."""

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        for name in ("execute", "validate_inputs"):
            method = getattr(vars(cls).get(name), "__func__", None)
            if method and not hasattr(method, "__wrapped__"):  # the host copies a node's class for each run
                setattr(cls, name, classmethod(_titled(method)))


def _titled(method: Callable) -> Callable:
    """A node's method whose errors, and texts of what is not valid, begin with the node's display name."""

    @functools.wraps(method)
    def titled(cls, *arguments, **inputs):
        try:
            if method.__name__ == "execute":
                check_inputs(cls, method, arguments, inputs)
            found = method(cls, *arguments, **inputs)
        except (ValueError, RuntimeError) as error:
            text = translate(with_title(cls, str(error)))
            error.args = (text if len(text) <= LONGEST else f"{text[:LONGEST]} …", *error.args[1:])
            raise
        return problem(cls, [found]) if isinstance(found, str) else found

    titled.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]  # the host asks which inputs it takes
    return titled


class Problem(str):
    """What is wrong with a node's inputs. The host writes it beside each input that was validated, in their order."""

    def __new__(cls, texts: list[str]):
        self = super().__new__(cls, "\n".join(texts))
        self.texts = iter(texts)
        return self

    def __str__(self) -> str:
        return next(self.texts, "see above")


def problem(node: type[io.ComfyNode], texts: list[str | None]) -> bool | Problem:
    """The answer of a node's `validate_inputs`: True where nothing is wrong with any of its inputs, in their order."""
    fine = "this one is right; another input of the node is not."
    return not any(texts) or Problem([translate(with_title(node, text or fine)) for text in texts])


def with_title(node: type[io.ComfyNode], text: str) -> str:
    """The text behind the node's display name, unless it begins with it; nodes that sample apply stages themselves."""
    title = node.define_schema().display_name.split(" (")[0]
    text = text.removeprefix("Apply Stages: ")
    return text if text.startswith(title) else f"{title}: {text}"


def schema(group: str, *, words: str = "", **arguments) -> io.Schema:
    """io.Schema in a group of the pack's category, without the arguments this host lacks (`search_aliases`: 0.11).

    Hosts without aliases search names alone, their first 30 letters or so: there the name has `words` behind it.
    """
    known = {field.name for field in fields(io.Schema)}
    if words and "search_aliases" not in known:
        arguments["display_name"] += f" ({words})"
    arguments = {key: value for key, value in arguments.items() if key in known}
    return io.Schema(category=f"{CATEGORY}/{group}", **arguments)


def output(kind, name: str, tooltip: str, *, is_list: bool = False):
    """An output of that io type whose id is also its label."""
    return kind.Output(name, display_name=name, tooltip=tooltip, is_output_list=is_list)


def advanced(input_type, *arguments, **keywords):
    """An input that hosts from 0.10 on fold away under "advanced"; older ones show it like any other."""
    if "advanced" in inspect.signature(input_type.__init__).parameters:
        keywords["advanced"] = True
    return input_type(*arguments, **keywords)
