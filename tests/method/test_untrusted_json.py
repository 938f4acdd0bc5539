"""JSON from elsewhere: bounded, and refused with the file's name."""

import json
import os
import re

import pytest
from subject_dla.common.files import DataError
from subject_dla.common.untrusted_json import DEEPEST, LONGEST, JSONError, parse_json, read_json


@pytest.mark.parametrize(("text", "problem"), [
    ("", "is not JSON"), ("{", "is not JSON"), ("[" * 10**6, "nested too deeply"), ("\ud800", "is not JSON"),
    ('{"a":' * DEEPEST + "{}" + "}" * DEEPEST, f"nested too deeply, expected at most {DEEPEST} levels"),
    ("[1]", r"is \[1\], expected a JSON object"), ("null", "is None, expected a JSON object"),
    ('{"a": NaN}', "is not JSON .*NaN"), ('{"a": -Infinity}', "number -Infinity"), ('{"a": 1e999}', "number 1e999"),
    ('{"a": 1, "a": 2}', "two values of the name 'a'"), ('{"a": ' + "1" * 5000 + "}", "is not JSON"),
    (b'{"a": "\xff"}', "is not JSON"), (" " * (LONGEST + 1), "bytes long, expected at most 16,777,216"),
])  # fmt: skip
def test_what_cannot_be_used_is_said(tmp_path, text, problem):
    with pytest.raises(JSONError, match=problem):
        parse_json(text)
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=f"^{re.escape(str(path))} (.*{problem}|has 16,777,217 bytes)"):
        read_json(path)


def test_what_is_right_is_read(tmp_path):
    value = {"a": [1, 2.5, None, {"b": "ü"}], "c": "x" * 10**6}
    path = tmp_path / "config.json"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        path.write_bytes(json.dumps(value, ensure_ascii=False).encode(encoding))
        assert read_json(path) == value
    assert parse_json('{"a": 1, "a": 1}') == {"a": 1} and parse_json("3", None) == 3
    deep = '{"a":' * (DEEPEST - 1) + "{}" + "}" * (DEEPEST - 1)
    assert parse_json(deep) == json.loads(deep)


@pytest.mark.parametrize(("make", "problem"), [
    (lambda path: None, "does not exist"), (lambda path: path.mkdir(), "is a folder, expected a file"),
    (os.mkfifo, "is a pipe, socket or device"), (lambda path: path.symlink_to("/dev/zero"), "is a pipe, socket"),
    (lambda path: path.symlink_to(path), "cannot be read|does not exist"),
])  # fmt: skip
def test_what_is_no_file_is_not_opened(tmp_path, make, problem):
    make(tmp_path / "config.json")
    with pytest.raises(DataError, match=f"config.json ({problem})"):
        read_json(tmp_path / "config.json")
