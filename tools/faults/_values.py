"""Hostile values for the inputs of nodes, by their type, as hypothesis draws them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st

from ._queue import Given

INFINITY, NAN = float("inf"), float("nan")
LONG = 10**6  # characters
RESERVED = ("CON", "nul.txt", "aux/report", "COM1", "lpt9.png")  # Windows has no files of these names
NAMES = (
    "../outside/x", "..", "../../../../../../tmp/x", "/etc/passwd", "/faults-outside/x", "C:\\x", "C:x", "\\\\host\\x",
    "\\x", "..\\outside\\x", "a/../../outside/x", "a\0b", "\0", "a\nb", "a\x1b[31m", "~/x", "~root", "$HOME/x",
    "%TEMP%/x",
    "%year%/%width%/x", "%date:yyyy%", "a" * 300, "/".join(["a"] * 300), "a/" + "b" * 5000, ".", "/", "//", "./x",
    "x/", "x.",
    " x ", "x:y", "x|y", "x?*<>", "ａ／ｂ", "\u202etxt.exe", "subjects", "link/x", *RESERVED,
)  # fmt: skip
TEXTS = (
    "", " ", "\n", "\0", "\x00\x01\x1b[31m\r", "\ud800", "a\ud800b", "\u202eabc", "\ufeff", "🦊" * 50, "a" * LONG,
    "a " * LONG,
    "\n" * LONG, "<|im_start|>system\n<|im_end|>", "<image>" * 50, "image 99", "图9", "%s %d {0} {x}", "{a|b",
    "((((((", "))))",
    "(a:1e308)", "embedding:../../x", "NaN", "inf", "-1", "1e309", "0x10", "１", "1,2,3", "1;;2", "-5--1",
    "0-99999999999",
    "all, all", "early", ",,,", "0.9, 0.8, 0.7", ", ".join(map(str, range(5000))), "[run]\nname = 1",
    "training.steps = nan",
    "run.output_dir = '/faults-outside'", "a = [" * 2000, "training = 1", "run.name = \"../x\"", "x = 2e", "none",
)  # fmt: skip
WRONG: tuple[Any, ...] = (None, "text", 3, 0.5, NAN, True, b"bytes", {}, [], (), {"a": 1}, [None], ["x"], [[]], object)


def tensors(shape: tuple[int, ...]) -> tuple[tuple[str, torch.Tensor], ...]:
    """Tensors of a shape in every type and with every kind of value."""
    full = torch.full(shape, 0.5)
    fills = {"nan": NAN, "inf": INFINITY, "-inf": -INFINITY, "-1": -1.0, "255": 255.0, "1e30": 1e30, "0": 0.0, "1": 1.0}
    found = {name: torch.full(shape, value) for name, value in fills.items()}
    if full.numel():
        one = full.clone()
        one.view(-1)[-1] = NAN
        found["one nan"] = one
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.complex64)
    found |= {str(dtype): full.to(dtype) for dtype in dtypes}
    found["strided"] = torch.full((*shape[:-1], 2 * shape[-1]), 0.5)[..., ::2]
    found["grad"] = full.clone().requires_grad_()
    return tuple(found.items())


def _of_shapes(*shapes: tuple[int, ...]) -> list[tuple[str, Any]]:
    return [(str(shape), torch.full(shape, 0.5)) for shape in shapes]


SIDES = (
    (1, 1),
    (1, 20_000),
    (20_000, 1),
    (0, 64),
    (64, 0),
    (0, 0),
    (27, 64),
    (28, 28),
    (69, 1542),
    (28, 5600),
    (33, 57),
)


@cache
def images() -> list[tuple[str, Any]]:
    """IMAGE: (b, h, w, c)."""
    found = _of_shapes(*((1, *sides, 3) for sides in SIDES), *((1, 64, 64, channels) for channels in (0, 1, 2, 4, 5)))
    found += _of_shapes(
        (0, 64, 64, 3), (3, 64, 64, 3), (11, 64, 64, 3), (64, 64, 3), (64, 64), (3,), (), (1, 1, 64, 64, 3)
    )
    found += _of_shapes((1, 3, 64, 64), (1, 3000, 3000, 3), (2, 1, 20_000, 3), (1, 20, 40, 4))
    return [*found, *tensors((1, 64, 64, 3)), *tensors((2, 40, 60, 4))]


@cache
def masks() -> list[tuple[str, Any]]:
    """MASK: (b, h, w)."""
    found = _of_shapes(*((1, *sides) for sides in SIDES), (0, 64, 64), (3, 64, 64), (64, 64), (64,), (), (1, 1, 64, 64))
    found += _of_shapes((1, 64, 64, 3), (0,), (2, 64, 64), (1, 3000, 3000))
    return [*found, *tensors((1, 64, 64)), *tensors((64, 64))]


@cache
def latents() -> list[tuple[str, Any]]:
    """LATENT: a dict of samples and more."""
    shapes = [(1, c, 8, 8) for c in (0, 1, 3, 4, 32)] + [(0, 16, 8, 8), (3, 16, 8, 8), (1, 16, 0, 8), (1, 16, 8, 0)]
    shapes += [
        (1, 16, 1, 8, 8),
        (1, 16, 5, 8, 8),
        (16, 8, 8),
        (8, 8),
        (1, 16, 7, 9),
        (1, 16, 1, 1),
        (1, 1, 16, 1, 8, 8),
    ]
    found = [(name, {"samples": tensor}) for name, tensor in (*_of_shapes(*shapes), *tensors((1, 16, 8, 8)))]
    good = torch.zeros(1, 16, 8, 8)
    found += [("no samples", {}), ("samples None", {"samples": None}), ("samples list", {"samples": [good]})]
    for name, mask in masks():
        found.append((f"noise_mask {name}", {"samples": good, "noise_mask": mask}))
    for index in (None, [], [0, 1], [-1], ["x"], 3, [10**12]):
        found.append((f"batch_index {index}", {"samples": good, "batch_index": index}))
    return found


@cache
def sigmas() -> list[tuple[str, Any]]:
    """SIGMAS: (steps + 1,), falling."""
    lists = [
        [],
        [1.0],
        [0.0],
        [0.0, 0.0],
        [0.0, 0.5, 1.0],
        [1.0, 0.5, 0.7, 0.0],
        [1.0, 1.0, 1.0],
        [NAN, 0.5, 0.0],
        [1.0, NAN],
    ]
    lists += [
        [INFINITY, 1.0, 0.0],
        [-1.0, -2.0],
        [1.0, 0.5],
        [1000.0, 1.0],
        [1e-30, 0.0],
        [1.0, 0.5, -0.5],
        [1e30, 0.0],
    ]
    found: list[tuple[str, Any]] = [(str(values), torch.tensor(values)) for values in lists]
    found += [("falls from 14", torch.linspace(14, 0, 5)), ("falls slowly", torch.linspace(1, 0.999, 50))]
    return [*found, ("10,000", torch.linspace(1, 0, 10_000)), *tensors((3,)), *_of_shapes((), (2, 3), (1, 3), (3, 1))]


@cache
def conditionings() -> list[tuple[str, Any]]:
    """CONDITIONING: a list of [tokens, values]."""
    pooled = {"pooled_output": torch.zeros(1, 16), "reference_latents": [torch.zeros(1, 16, 8, 8)]}
    found: list[tuple[str, Any]] = [("nothing in it", [])]
    shapes = ((1, 0, 128), (0, 9, 128), (1, 9, 64), (1, 9, 0), (9, 128), (1, 1, 9, 128), (2, 9, 128), (1, 1, 128), ())
    for name, tensor in (*_of_shapes(*shapes), *tensors((1, 9, 128))):
        found.append((f"tokens {name}", [[tensor, pooled]]))
    tokens = torch.zeros(1, 9, 128)
    for name, entry in {
        "no values": [tokens], "three": [tokens, {}, 1], "values None": [tokens, None], "values list": [tokens, []],
        "tokens None": [None, pooled], "tokens text": ["x", {}], "entry None": None, "entry text": "ab", "empty": [],
    }.items():  # fmt: skip
        found.append((name, [entry]))
    for name, tensor in tensors((1, 16)):
        found.append((f"pooled {name}", [[tokens, {**pooled, "pooled_output": tensor}]]))
    for name, tensor in tensors((1, 16, 8, 8)):
        found.append((f"reference {name}", [[tokens, {**pooled, "reference_latents": [tensor]}]]))
    values: dict[str, list[Any]] = {
        "pooled_output": [None, torch.zeros(1, 8), torch.zeros(16), torch.zeros(2, 16), "x"],
        "reference_latents": [[], None, [None], ["x"], [torch.zeros(1, 4, 8, 8)], [torch.zeros(1, 16, 0, 8)],
                              [torch.full((1, 16, 8, 8), NAN)], [torch.zeros(16, 8, 8)], [torch.zeros(1, 16, 1, 8, 8)],
                              torch.zeros(1, 16, 8, 8), [torch.zeros(3, 16, 8, 8)], [torch.zeros(1, 16, 8, 8)] * 12],
        "attention_mask": [torch.ones(1, 5), torch.ones(9), torch.zeros(1, 9), torch.full((1, 9), NAN), "x", None],
        "guidance": [NAN, INFINITY, -1, None, "x", 1e308],
        "strength": [NAN, 0, -1, INFINITY, None], "start_percent": [2.0, -1.0, NAN], "end_percent": [-1.0, NAN],
        "reference_latents_method": [None, 3, "x", "offset"],
        "area": [(0, 0, 0, 0), (8, 8, 4, 4), (10**9, 10**9, 0, 0)], "mask": [torch.zeros(1, 5, 5), torch.ones(1, 64,
        64)],
    }  # fmt: skip
    for key, wrong in values.items():
        found += [(f"{key} {str(value)[:60]}", [[tokens, {**pooled, key: value}]]) for value in wrong]
    return [*found, ("two", [[tokens, pooled], [tokens, pooled]]), ("1,000", [[tokens, pooled]] * 1000)]


SOCKETS = {"IMAGE": images, "MASK": masks, "LATENT": latents, "SIGMAS": sigmas, "CONDITIONING": conditionings}
NUMBERS: tuple[Any, ...] = (
    NAN, INFINITY, -INFINITY, -1, 0, 1, 2, 0.5, -0.0, 1e308, -1e308, 1e-308, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**30, 17, 4096, 0.1 + 0.2, "7", "0.5", "NaN", "text", "", None, True, False, [1], {}, 1j, torch.tensor(3.0),
    torch.tensor([])
)  # fmt: skip


def values_for(input_: Any, lists: bool) -> st.SearchStrategy[tuple[str, Any]]:
    """(description, value) of one hostile value for an input of a node: a widget's, or `Given` for a link.

    Args:
        input_: Of the node's schema.
        lists: Whether the node takes lists: an empty one for another is an IndexError of the host, before any node.
    """
    kind = input_.io_type
    if kind in ("INT", "FLOAT"):
        ends = [value for value in (input_.min, input_.max) if value is not None]
        near = [value + step for value in ends for step in (-1, 0, 1)]
        drawn = st.one_of(st.sampled_from([*near, *NUMBERS]), st.integers(), st.floats())
        return st.builds(_widget_or_link, drawn, st.booleans())
    if kind == "STRING":
        drawn = st.one_of(st.sampled_from(TEXTS), st.sampled_from(NAMES), st.text(max_size=200), st.sampled_from(WRONG))
        return st.builds(_widget_or_link, drawn, st.booleans())
    if kind in ("COMBO", "BOOLEAN"):
        choices = st.sampled_from(input_.options or [""]) if kind == "COMBO" else st.booleans()
        drawn = st.one_of(st.sampled_from(NAMES), st.sampled_from(TEXTS), st.sampled_from(WRONG), choices)
        return st.builds(_widget_or_link, drawn, st.booleans())
    known = SOCKETS.get(kind)
    wrong = st.builds(lambda value: (f"{value!r:.60}", Given(value)), st.sampled_from(WRONG))
    if known is None:
        return wrong
    special = st.builds(lambda pair: (pair[0], Given(pair[1])), st.sampled_from(known()))
    listed = st.builds(
        lambda pairs: (f"list of {[name for name, _ in pairs]}", Given([value for _, value in pairs], True)),
        st.lists(st.sampled_from(known()), min_size=0 if lists else 1, max_size=3),
    )
    return st.one_of(special, special, special, special, wrong, listed)


def _widget_or_link(value: Any, linked: bool) -> tuple[str, Any]:
    """JSON's values may be a widget's; others come from another node."""
    plain = isinstance(value, str | int | float | bool | dict) and not isinstance(value, complex)
    described = f"{value!r:.60}" + (f" ({len(value)} characters)" if isinstance(value, str) and len(value) > 60 else "")
    return (f"linked {described}", Given(value)) if linked or not plain else (described, value)
