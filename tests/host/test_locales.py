"""Chinese names and tooltips: one English source, the nodes' schemas, and no gaps.

`locales/zh.json` has a translation of each name and text; what the front end reads is made of it by
`nox -s tests -- tests/host/test_locales.py --write-docs`.
"""

import asyncio
import json
import re
from pathlib import Path

import pytest
from subject_dla.nodes import SubjectExtension

ROOT = Path(__file__).resolve().parents[2]
TABLE = json.loads((ROOT / "locales" / "zh.json").read_text(encoding="utf-8"))
SCHEMAS = [node.define_schema() for node in asyncio.run(SubjectExtension().get_node_list())]
FILES = {"nodeDefs": ROOT / "locales" / "zh" / "nodeDefs.json", "main": ROOT / "locales" / "zh" / "main.json"}


class Texts(dict):
    """English to Chinese, with a list of what was asked for."""

    def __init__(self, table):
        super().__init__(table)
        self.used = set()

    def __missing__(self, key):
        return ""

    def of(self, key):
        self.used.add(key)
        return self[key]


@pytest.fixture(scope="module")
def made():
    """What the front end reads, by file, and the tables with what was used of them."""
    names, texts, categories = (Texts(TABLE[part]) for part in ("names", "texts", "categories"))

    def socket(one):
        found = {"name": names.of(one.display_name or one.id)}
        return found | ({"tooltip": texts.of(one.tooltip)} if one.tooltip else {})

    nodes = {}
    for schema in SCHEMAS:
        nodes[schema.node_id] = {
            "display_name": texts.of(schema.display_name.split(" (")[0]),  # without words for older hosts' search
            "description": texts.of(schema.description),
            "inputs": {one.id: socket(one) for one in schema.inputs},
            "outputs": {str(number): socket(one) for number, one in enumerate(schema.outputs)},
        }
    words = sorted({part for schema in SCHEMAS for part in schema.category.split("/")})
    main = {"nodeCategories": {word: categories.of(word) for word in words}}
    return {"nodeDefs": nodes, "main": main}, {"names": names, "texts": texts, "categories": categories}


def test_every_name_and_text_has_a_translation_and_none_is_left_over(made):
    for part, found in made[1].items():
        assert [key for key in sorted(found.used) if not found[key]] == [], f"locales/zh.json lacks these {part}"
        assert sorted(found.keys() - found.used) == [], f"locales/zh.json: no node has these {part} any more"
    chinese = re.compile("[\u4e00-\u9fff]")
    plain = [text for key, text in TABLE["texts"].items() if not chinese.search(text)]
    assert plain == []


def test_translations_keep_numbers_and_values():
    """What a user types is not translated: numbers, and names of files, inputs and choices."""
    for english, text in TABLE["texts"].items():
        for word in re.findall(r"[a-z]+_[a-z_]+|\d[\d.,]*\d", english):
            assert word in text, (word, english)


def test_the_front_end_reads_these_translations(made, request):
    for name, path in FILES.items():
        text = json.dumps(made[0][name], ensure_ascii=False, indent=1) + "\n"
        if request.config.getoption("--write-docs"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.read_text(encoding="utf-8") == text, "write it with --write-docs, as the head of this test says"
