"""What came to a node's inputs: the host checks what is typed into widgets, but nothing that another node gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from numbers import Integral, Real
from typing import Any

from comfy_api.latest import io

# What our code calls of each kind of object, and where it comes from.
OBJECTS = {
    "MODEL": (("model", "clone"), "a diffusion model, from Load Diffusion Model"),
    "VAE": (("encode", "decode"), "a VAE, from Load VAE"),
    "CLIP": (("cond_stage_model",), "a text encoder, from Load CLIP"),
    "CLIP_VISION": (("model",), "a vision encoder, from Load CLIP Vision"),
    "MLLM": (("encode", "info"), "an MLLM, from Load MLLM or MLLM from CLIP"),
    "MLLM_FEATURES": (("hidden_states", "info"), "features, from Encode Subject"),
    "DLA": (("aggregate", "config"), "a DLA, from Load DLA"),
    "STAGES": (("keyframes", "clock"), "a schedule, from Stage Schedule or Stage Keyframe"),
    "ORIENTATION_MODEL": (("estimate",), "an orientation model, from Load Orientation Model"),
}
EDGE = 0.01  # by which a mask may be outside 0..1
EXPLAINED = {"placement", "start", "tau1"}  # values that the node itself refuses, saying why
REMEDY = "Check the node that is connected there."
SHOWN = 60  # characters of a value in a text


class InputError(ValueError):
    """A value at a node's input that is not what the input takes."""


def check_inputs(
    node: type[io.ComfyNode], method: Callable, arguments: Sequence[Any], given: Mapping[str, Any]
) -> None:
    """Checks what the host passes to a node's `execute`.

    Args:
        node: With its schema.
        method: Its `execute`, before it is wrapped.
        arguments: Given by position.
        given: By name.

    Raises:
        InputError: It names the input, the value found, what is expected and the way out.
    """
    takes = inspect.signature(method).parameters
    values = {**dict(zip([*takes][1:], arguments)), **given}
    needed = {name for name, parameter in takes.items() if parameter.default is parameter.empty}
    schema = node.define_schema()
    judged = EXPLAINED | {*inspect.signature(node.validate_inputs).parameters}  # by the node itself, which knows more
    for input_ in schema.inputs:
        found = values.get(input_.id)
        if input_.id not in values and (input_.optional or input_.id not in needed):
            continue
        if not schema.is_input_list:
            _check(input_, found, judged)
        elif isinstance(found, list | tuple) and (found or input_.optional):
            for one in found:
                if one is None and input_.io_type not in OBJECTS:
                    _refuse(input_.id, "a list with an empty entry (None)", f"entries of type {input_.io_type}")
                _check(input_, one, judged)
        elif found is not None or not input_.optional:
            what = "picture" if input_.io_type == "IMAGE" else "value"
            raise InputError(f"{input_.id} holds no {what}, expected a list of at least one. {REMEDY}")


def _check(input_: Any, found: Any, judged: set[str]) -> None:
    """One value of one input."""
    kind, name = input_.io_type, input_.id
    if found is None:
        if input_.optional:
            return
        _refuse(name, "missing (None)", OBJECTS[kind][1] if kind in OBJECTS else f"a value of type {kind}")
    if kind in OBJECTS:
        attributes, expected = OBJECTS[kind]
        if isinstance(found, type) or not all(hasattr(found, attribute) for attribute in attributes):
            _refuse(name, _shown(found), expected)
    elif kind in KINDS:
        KINDS[kind](name, found)
    elif kind in ("INT", "FLOAT"):
        _check_number(input_, found, name not in judged)
    elif kind == "COMBO" and judged & {name, "widgets"}:  # a file's name
        _check_text(name, found)
    elif kind == "COMBO" and found not in input_.options:
        _refuse(name, _shown(found), f"one of {', '.join(map(str, input_.options)) or 'nothing'}")
    elif kind == "BOOLEAN" and not isinstance(found, bool | Integral):
        _refuse(name, _shown(found), "true or false")


def _check_number(input_: Any, found: Any, ranged: bool) -> None:
    """A whole number, or a finite number; with `ranged` in the widget's range."""
    name, whole = input_.id, input_.io_type == "INT"
    if not isinstance(found, Integral if whole else Real) or (isinstance(found, bool) and not whole):
        _refuse(name, _shown(found), "a whole number" if whole else "a number")
    least, most = input_.min, input_.max
    outside = ranged and ((least is not None and found < least) or (most is not None and found > most))
    if outside or not isfinite(found):
        _refuse(name, f"{found:g}" if abs(found) < 1e15 or not whole else str(found)[:SHOWN], f"{least} to {most}")


def _check_text(name: str, found: Any) -> None:
    if not isinstance(found, str):
        _refuse(name, _shown(found), "a text")
    try:
        found.encode("utf-8")
    except UnicodeEncodeError as error:
        _refuse(name, f"a text whose character {error.start + 1} is no character", "text in Unicode")
    if "\0" in found:
        _refuse(name, f"a text whose character {found.index(chr(0)) + 1} is NUL", "text without it")


def _check_tensor(name: str, found: Any, expected: str, ranks: Sequence[int], *, numbers: bool = True) -> None:
    """A tensor with something in it, of a rank, of numbers that are real and, with `numbers`, finite."""
    import torch

    if not isinstance(found, torch.Tensor):
        _refuse(name, _shown(found), expected)
    shape = tuple(found.shape)
    if found.ndim not in ranks or 0 in shape:
        _refuse(name, f"of shape {shape}", expected + (" with sides of 1 at least" if 0 in shape else ""))
    if found.is_complex():
        _refuse(name, f"of {found.dtype}", expected)
    if numbers and not bool(found.isfinite().all()):
        wrong = int((~found.isfinite()).sum())
        found_text = f"a tensor of shape {shape} of which {wrong} values are NaN or infinite"
        remedy = "The node that made it has failed (often in fp16: choose fp32 or bf16 there)."
        _refuse(name, found_text, f"{expected} of finite numbers", remedy)


def _check_image(name: str, found: Any) -> None:
    expected = "an IMAGE (batch, height, width, 3)"
    _check_tensor(name, found, expected, (4,), numbers=False)  # which picture it is, is known further on
    if not found.is_floating_point():
        _refuse(name, f"of {found.dtype}", f"{expected} of floats, 0 to 1", "Divide by 255 first?")


def _check_mask(name: str, found: Any) -> None:
    expected = "a MASK (height, width) or (batch, height, width)"
    _check_tensor(name, found, expected, (2, 3, 4))
    if found.ndim == 4 and found.shape[1] != 1:
        _refuse(name, f"of shape {tuple(found.shape)}", expected, "ImageToMask makes one of an IMAGE.")


def _check_sigmas(name: str, found: Any) -> None:
    _check_tensor(name, found, "SIGMAS (steps + 1)", (1,))


def _check_latent(name: str, found: Any) -> None:
    expected = "a LATENT with samples (batch, channels, height, width)"
    if not isinstance(found, Mapping) or "samples" not in found:
        _refuse(name, _shown(found), expected)
    _check_tensor(f"{name}: samples", found["samples"], expected, (4, 5))
    if not found["samples"].is_floating_point():
        _refuse(name, f"of {found['samples'].dtype}", expected)
    if found.get("noise_mask") is not None:
        _check_mask(f"{name}: noise_mask", mask := found["noise_mask"])
        low, high = float(mask.min()), float(mask.max())
        if low < -EDGE or high > 1 + EDGE:
            _refuse(f"{name}: noise_mask", f"of values from {low:.3g} to {high:.3g}", "0 to 1")
    index = found.get("batch_index")
    if index is not None and not (isinstance(index, list) and all(isinstance(one, int) and one >= 0 for one in index)):
        _refuse(f"{name}: batch_index", _shown(index), "a list of whole numbers from 0 on")


def _check_conditioning(name: str, found: Any) -> None:
    from ..loaders.conditioning import reference_latents

    expected = "CONDITIONING, a list of [tokens (batch, tokens, channels), values]"
    if not isinstance(found, list | tuple) or not found:
        empty = isinstance(found, list | tuple)
        _refuse(name, "empty" if empty else _shown(found), f"{expected}, with one entry at least")
    for number, entry in enumerate(found, 1):
        where = f"{name}: entry {number}"
        if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[1], Mapping):
            _refuse(where, _shown(entry), "[tokens, values]")
        tokens, values = entry
        _check_tensor(f"{where}: tokens", tokens, "a tensor (batch, tokens, channels)", (3,))
        if values.get("pooled_output") is not None:
            _check_tensor(f"{where}: pooled_output", values["pooled_output"], "a tensor (batch, channels)", (2,))
        if values.get("attention_mask") is not None:
            _check_tensor(f"{where}: attention_mask", values["attention_mask"], "a tensor (batch, tokens)", (2,))
        guidance = values.get("guidance")
        if guidance is not None and not (isinstance(guidance, Real) and isfinite(guidance)):
            _refuse(f"{where}: guidance", _shown(guidance), "a finite number")
        area = values.get("area")
        if area is not None and any(isinstance(side, int) and side < 1 for side in area[: len(area) // 2]):
            _refuse(f"{where}: area", str(tuple(area)), "height and width of 1 at least")
        try:
            latents = reference_latents(values)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
        for latent in latents:  # of a rank and dtype that are right
            _check_tensor(f"{where}: reference_latents", latent, "latents (batch, channels, height, width)", (4, 5))


KINDS: dict[str, Callable[[str, Any], None]] = {
    "STRING": _check_text,
    "IMAGE": _check_image,
    "MASK": _check_mask,
    "SIGMAS": _check_sigmas,
    "LATENT": _check_latent,
    "CONDITIONING": _check_conditioning,
}


def _shown(value: Any) -> str:
    """A value in a text, short."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    text = repr(value) if isinstance(value, str | int | float | bool) else type(value).__name__
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"


def _refuse(name: str, found: str, expected: str, remedy: str = REMEDY) -> None:
    raise InputError(f"{name} is {found}, expected {expected}. {remedy}")
