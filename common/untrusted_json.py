"""JSON from elsewhere: one reader, bounded in size and depth, whose errors say what was found."""

import json
import math
import os
import reprlib
from pathlib import Path
from typing import Any

from .files import DataError, read_bytes

LONGEST = 16 * 2**20  # bytes; the largest index of weights known here has 8 MB
DEEPEST = 64  # levels; configs and workflows have below 20
NAMES: dict[type, str] = {dict: "a JSON object", list: "a JSON list"}


class JSONError(DataError):
    """JSON that cannot be used. The text, such as "is not JSON (...)", follows the name of what holds it."""


def parse_json(text: str | bytes, expected: type | None = dict, longest: int = LONGEST) -> Any:
    """Parses JSON from elsewhere.

    Args:
        text: Text, or bytes in UTF-8, UTF-16 or UTF-32.
        expected: Type of the outermost value; None = any.
        longest: Most characters or bytes of it.

    Raises:
        JSONError: It is longer, no JSON (NaN and infinity are none), nested more than DEEPEST levels, of another type,
            or has an object with two values of one name.
    """
    if len(text) > longest:
        raise JSONError(f"is {len(text):,} bytes long, expected at most {longest:,} bytes of JSON")
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_float=_number, parse_constant=_number)
    except JSONError:
        raise
    except RecursionError:
        raise JSONError(f"is nested too deeply, expected at most {DEEPEST} levels") from None
    except ValueError as error:
        raise JSONError(f"is not JSON ({error})") from None
    if expected is not None and type(found) is not expected:
        raise JSONError(f"is {reprlib.repr(found)}, expected {NAMES.get(expected, expected.__name__)}")
    level, depth = [found], 0
    while level := [value for value in level if isinstance(value, (dict, list))]:
        depth += 1
        if depth > DEEPEST:
            raise JSONError(f"is nested too deeply, expected at most {DEEPEST} levels")
        level = [child for value in level for child in (value.values() if isinstance(value, dict) else value)]
    return found


def read_json(path: str | os.PathLike, expected: type | None = dict, longest: int = LONGEST) -> Any:
    """Reads a JSON file from elsewhere as `parse_json` does. Raises DataError, which names the file."""
    data = read_bytes(path, longest)
    try:
        return parse_json(data, expected, longest)
    except JSONError as error:
        raise DataError(f"{Path(path)} {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # readers differ in which one they take
        seen: dict[str, Any] = {}
        for name, value in pairs:
            if name in seen and seen[name] != value:
                raise JSONError(f"has two values of the name {name!r:.60}, expected one")
            seen[name] = value
    return found


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JSONError(f"is not JSON (it holds the number {text[:20]})")
    return value
