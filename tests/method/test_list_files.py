"""Training lists and benchmark sets are read by one reader: every encoding, every spelling of a path."""

import json
import os
from collections import Counter
from functools import partial

import pytest
from PIL import Image
from subject_dla.common.list_files import DataError
from subject_dla.tools.benchmark.sets import read_prompts, read_set
from subject_dla.training.data.dataset import read_data


def as_training(path):
    data = read_data(path, validation=0)
    return data.training, data.problems


def as_benchmark(path):
    found = read_set(path)
    return found.items, found.problems


@pytest.fixture(params=[as_training, as_benchmark])
def read(request, tmp_path):
    for name in ("a/0.jpg", "a/1.jpg", "b/0.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 48), "teal").save(tmp_path / name)
    return request.param


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_the_same_list_in_every_encoding(tmp_path, read, encoding):
    """Also UTF-16 with its byte order mark, as Windows writes it; prompt lists too."""
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    prompts = ["eine müde Katze", "eine nasse Katze"]
    entries = [{"prompt": prompt, "image_path": "a/0.jpg", "image_tgt_path": "a/1.jpg"} for prompt in prompts]
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    for suffix, text in ((".json", f"[{','.join(lines)}]"), (".jsonl", "\r\n".join(lines))):
        path = (tmp_path / "list").with_suffix(suffix)
        path.write_bytes(mark + text.encode(encoding))
        examples, problems = read(path)
        assert [example.prompt for example in examples] == prompts and not problems, suffix
    (tmp_path / "prompts.txt").write_bytes(mark + "\n".join(prompts).encode(encoding))
    assert read_prompts(tmp_path / "prompts.txt") == prompts


def test_every_spelling_of_a_path_inside_the_folder(tmp_path, read):
    """Through a parent folder and back, and from the root of the disk: the same picture under one name."""
    names = ["a/../a/0.jpg", f"../{tmp_path.name}/a/0.jpg", "b\\..\\a\\0.jpg", str(tmp_path / "a" / "0.jpg")]
    entries = [{"prompt": name, "image_paths": [name], "image_tgt_path": "b/../a/1.jpg"} for name in names]
    (tmp_path / "list.json").write_text(json.dumps(entries), encoding="utf-8")
    examples, problems = read(tmp_path / "list.json")
    assert not problems and [example.prompt for example in examples] == names
    assert {example.references for example in examples} == {(tmp_path / "a" / "0.jpg",)}
    assert {example.target for example in examples} == {tmp_path / "a" / "1.jpg" if read is as_training else None}
    assert examples[0].subject == "a/../a/0", "seeds follow the subject: as 0.1.0 called it"
    assert examples[3].subject == "a/0"


@pytest.mark.parametrize("name, text, words", [
    ("list.json", "", "not JSON"), ("list.json", "[", "not JSON"), ("list.json", '[{"prompt": ', "not JSON"),
    ("list.json", "[" * 100_000, "not JSON"), ("list.json", "{}", "dict, expected a list"),
    ("list.json", "[]", "nothing to (train on|draw)"), ("list.json", "[1]", "1 problem"),
    ("list.csv", "a,b", "ending in .json or .jsonl"), ("gone", None, "no such"), ("gone.json", None, "no such"),
])  # fmt: skip
def test_lists_that_are_none(tmp_path, read, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        read(tmp_path / name)


def test_a_missing_picture_is_looked_for_twice_and_said_with_its_folder(read, tmp_path, monkeypatch):
    """A list of 200,000 entries whose pictures are all missing took a minute."""
    looked, there = [], {"prompt": "a cup", "image_paths": ["a/0.jpg"], "image_tgt_path": "a/1.jpg"}
    missing = [there | {"image_paths": [f"a/gone-{number}.jpg"]} for number in range(300)]

    def counted(real, path, *given, **options):
        looked.append(os.path.basename(str(path)))
        return real(path, *given, **options)

    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, partial(counted, getattr(os, name)))
    (tmp_path / "list.json").write_text(json.dumps([there, *missing]), encoding="utf-8")
    found, problems = read(tmp_path / "list.json")
    said = f"list.json entry 301: gone-299.jpg does not exist (in {tmp_path / 'a'})"
    assert len(found) == 1 and problems[299].startswith(said)
    counts = Counter(name for name in looked if name.startswith("gone-"))
    assert len(counts) == 300 and set(counts.values()) <= {1, 2}
