"""Messages of validation, and what else may be wrong before a node runs, in the language of the editor.

`locales/LANGUAGE.json` has each message with {} for its values, and words that are values (*a whole number*).

What the editor itself shows of a node (names, tooltips, help) it translates by `locales/LANGUAGE/`.
"""

import json
import re
from functools import cache
from pathlib import Path

from ..loaders.host import editor_language

LOCALES = Path(__file__).resolve().parents[1] / "locales"


def translate(text: str, language: str | None = None) -> str:
    """Each line of a message in a language; a line that has no translation stays English.

    Args:
        text: In English, as the code has it.
        language: Such as "zh". None: that which the user has chosen in the editor.
    """
    language = editor_language() if language is None else language
    if not re.fullmatch("[a-z]{2}(-[A-Z]{2})?", language):
        return text
    return "\n".join(_line(line, language) for line in text.split("\n"))


def _line(text: str, language: str) -> str:
    title, colon, rest = text.partition(": ")
    for said in (rest, text) if colon else (text,):  # behind the node's title, or without one
        for pattern, translated in _messages(language):
            if found := pattern.fullmatch(said):
                named = _titles(language).get(title, title) if said is rest else ""
                return f"{named}：" * bool(named) + translated.format(*(_value(v, language) for v in found.groups()))
    return text


def _value(text: str, language: str) -> str:
    """Words in the place of a value, such as what is expected of one."""
    for pattern, translated in _messages(language, "values"):
        if found := pattern.fullmatch(text):
            return translated.format(*found.groups())
    return text


@cache
def _messages(language: str, part: str = "messages") -> list[tuple[re.Pattern, str]]:
    """Each English message as a pattern of its values, and its translation."""
    messages = _table(language).get(part, {})
    return [(re.compile("(.+?)".join(map(re.escape, key.split("{}")))), text) for key, text in messages.items()]


@cache
def _titles(language: str) -> dict[str, str]:
    return _table(language).get("texts", {})


@cache
def _table(language: str) -> dict:
    path = LOCALES / f"{language}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
