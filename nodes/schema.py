"""Schemas on every host: arguments that an older host does not know are left out, never guessed from its version."""

import inspect
from dataclasses import fields

from comfy_api.latest import io

from ..common.dtypes import DTYPES

CATEGORY = "subject"

MLLM = io.Custom("MLLM")
Features = io.Custom("MLLM_FEATURES")
DLA = io.Custom("DLA")
Stages = io.Custom("STAGES")
Orientation = io.Custom("ORIENTATION_MODEL")

WEIGHT_DTYPES = ["default", *DTYPES]
NONE = "none"
CAPTION_TIP = "A short text for each picture, to figures of Contact Sheet."


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
