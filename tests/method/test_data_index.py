"""The index of a run's data: read once, brought up to date, and equal to what is read without one."""

import hashlib
import json
import os
import random
import shutil

import numpy
import pytest
import torch
from PIL import Image
from subject_dla.common import list_files
from subject_dla.common.list_files import DataReader
from subject_dla.common.picture_files import shown_size, whole_pictures
from subject_dla.tests.method.test_training_data import damaged, entry, painted, subject, subjects
from subject_dla.training.data import index as index_module
from subject_dla.training.data.buckets import Order, Sizes, snapped
from subject_dla.training.data.dataset import read_data
from subject_dla.training.flow import generator

ORIENTATION = 0x0112


class Interrupt(Exception):
    pass


@pytest.fixture
def opened(monkeypatch):
    """The names of the pictures that are opened, in order."""
    names = []

    def counted(path, whole=True):
        names.append(path.name)
        return shown_size(path, whole)

    monkeypatch.setattr(list_files, "shown_size", counted)
    return names


def write_list(folder, count=12):
    subjects(folder, count)
    entries = [entry(f"subject-{n:02d}/0.jpg", f"subject-{n:02d}/1.jpg") for n in range(count)]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    return folder / "list.jsonl"


def touch(path, time):
    os.utime(path, ns=(time, time))


@pytest.mark.parametrize("kind", ["list", "folder"])
def test_second_start_opens_no_picture_and_finds_the_same(tmp_path, opened, kind):
    data = write_list(tmp_path / "data")
    source = data if kind == "list" else data.parent
    damaged(subject(data.parent / "broken", 2))
    cold = read_data(source, validation=0.3)
    count = len(opened)
    first = read_data(source, validation=0.3, cache=tmp_path / "cache")
    bad = sum(name in opened[count:] for name in ("half.jpg", "text.png", "small.png"))
    assert len(opened) == 2 * count and (kind == "list" or bad == 3)
    opened.clear()
    second = read_data(source, validation=0.3, cache=tmp_path / "cache")
    assert cold == first == second
    assert not set(opened) & {"0.jpg", "1.jpg", "2.jpg"}, "only pictures with a problem are looked at again"
    other = read_data(source, validation=0.5, seed=3, pairs_per_target=1, cache=tmp_path / "cache")
    assert other == read_data(source, validation=0.5, seed=3, pairs_per_target=1)


def test_what_changed_is_read_again_and_nothing_else(tmp_path, opened):
    source, cache = write_list(tmp_path), tmp_path / "cache"
    before = read_data(source, validation=0, cache=cache)
    opened.clear()
    painted((96, 64)).save(tmp_path / "subject-03" / "1.jpg")
    after = read_data(source, validation=0, cache=cache)
    assert opened == ["1.jpg"] and after.training[3].target_size == (96, 64)
    assert after.fingerprint != before.fingerprint and after == read_data(source, validation=0)

    opened.clear()
    subject(tmp_path / "new")
    with open(source, "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(entry("new/0.jpg", "new/2.jpg")))
    assert len(read_data(source, validation=0, cache=cache).training) == 13 and sorted(opened) == ["0.jpg", "2.jpg"]

    (tmp_path / "new" / "2.jpg").rename(tmp_path / "aside.jpg")
    gone = read_data(source, validation=0, cache=cache)
    assert len(gone.training) == 12 and "2.jpg does not exist" in gone.problems[0]
    (tmp_path / "aside.jpg").rename(tmp_path / "new" / "2.jpg")
    assert len(read_data(source, validation=0, cache=cache).training) == 13


def test_a_caption_that_changed_is_read_again(tmp_path, opened):
    subjects(tmp_path / "data", 3)
    read_data(tmp_path / "data", validation=0, cache=tmp_path / "cache")
    opened.clear()
    (tmp_path / "data" / "subject-01" / "0.txt").write_text("another caption", encoding="utf-8")
    found = read_data(tmp_path / "data", validation=0, cache=tmp_path / "cache")
    assert "another caption" in {example.prompt for example in found.training} and not opened


def test_an_interrupted_start_keeps_what_it_read(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(index_module, "BLOCK", 2)
    monkeypatch.setattr(index_module, "THREADS", 1)
    source, calls = write_list(tmp_path), []

    def interrupt(text):
        calls.append(text)
        if len(calls) == 4:  # behind the list, the files' times, and two blocks of headers
            raise Interrupt

    with pytest.raises(Interrupt):
        read_data(source, cache=tmp_path / "cache", say=interrupt)
    opened.clear()
    found = read_data(source, cache=tmp_path / "cache")
    assert len(opened) == 24 - 2 * 2
    assert found == read_data(source)


@pytest.mark.parametrize("content", [b"", b"no index", None])
def test_a_damaged_index_is_made_anew(tmp_path, content):
    source, cache = write_list(tmp_path), tmp_path / "cache"
    found = read_data(source, cache=cache)
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:-40] if content is None else content)
    assert read_data(source, cache=cache) == found == read_data(source, cache=cache)


def test_an_index_that_cannot_be_written_is_said_and_stops_nothing(tmp_path):
    source, said = write_list(tmp_path), []
    (tmp_path / "cache").write_bytes(b"a file where a folder is to be")
    found = read_data(source, cache=tmp_path / "cache", say=said.append)
    assert found == read_data(source) and any("cannot be kept" in line for line in said)


def test_headers_alone_give_the_sizes_as_shown(tmp_path, monkeypatch):
    """Also where a PNG has its orientation behind its pixels."""
    exif = painted().getexif()
    exif[ORIENTATION] = 6
    for suffix in ("jpg", "png", "webp"):
        painted().save(tmp_path / f"plain.{suffix}")
        painted().save(tmp_path / f"turned.{suffix}", exif=exif)
    data = (tmp_path / "turned.png").read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    last = data.rindex(b"IEND") - 4
    (tmp_path / "behind.png").write_bytes(data[:start] + data[end:last] + data[start:end] + data[last:])
    decoded = []
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self) or Image.Image.getdata)
    with whole_pictures():
        for path in (*tmp_path.glob("plain.*"), *tmp_path.glob("turned.*")):
            assert shown_size(path, whole=False) == ((48, 64) if path.stem == "turned" else (64, 48))
    assert not decoded
    monkeypatch.undo()
    with whole_pictures():
        assert shown_size(tmp_path / "behind.png", whole=False) == shown_size(tmp_path / "behind.png") == (48, 64)


def test_of_many_pictures_headers_are_read_and_damage_is_found_when_they_are_drawn(tmp_path, monkeypatch):
    source = write_list(tmp_path)
    half = (tmp_path / "subject-02" / "1.jpg").read_bytes()
    (tmp_path / "subject-02" / "1.jpg").write_bytes(half[: len(half) * 2 // 3])
    whole = read_data(source, validation=0)
    assert len(whole.training) == 11 and "cannot be read" in whole.problems[0]
    monkeypatch.setattr(index_module, "DECODED", 5)
    found = read_data(source, validation=0)
    assert len(found.training) == 12 and not found.problems
    problems = [found.training.damage(row) for row in range(12)]
    assert [row for row, problem in enumerate(problems) if problem] == [2] and "1.jpg cannot be read" in problems[2]


def test_the_fingerprint_is_that_of_0_1_0(tmp_path):
    """So that a resumed run does not say that its data have changed."""
    source = write_list(tmp_path)
    found, lines = read_data(source, validation=0.3), []
    for side in ("training", "validation"):
        for example in getattr(found, side):
            lines.append(f"{side}\0{example.subject}\0{example.prompt}")
            for path in (example.target, *example.references):
                status = path.stat()
                lines.append(f"{path.relative_to(tmp_path).as_posix()}\0{status.st_size}\0{status.st_mtime_ns}")
    assert found.fingerprint == hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_order_is_that_of_0_1_0(batch_size):
    """Written as it was then, with lists: resumed runs see the same batches."""
    draw = random.Random(1)
    keys = [(draw.choice("abc"), draw.randrange(3)) for _ in range(200)]
    groups = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    order = Order(keys, batch_size, seed=7)
    for epoch in range(2):
        random_numbers, batches = generator(7, 100, epoch), []
        for group in groups.values():
            mixed = [group[i] for i in torch.randperm(len(group), generator=random_numbers).tolist()]
            batches += [mixed[i : i + batch_size] for i in range(0, len(mixed), batch_size)]
        expected = [batches[i] for i in torch.randperm(len(batches), generator=random_numbers).tolist()]
        assert [order.at(epoch * len(order) + i) for i in range(len(order))] == expected
    for row in (0, 57, 199):
        same = [number for number, key in enumerate(keys) if key == keys[row]]
        assert order.next(row) == same[(same.index(row) + 1) % len(same)]


def test_sizes_in_columns_are_those_of_each_example():
    draw = random.Random(2)
    rows = [[(draw.choice((1, 2)), draw.choice((1, 3))) for _ in range(draw.randrange(1, 4))] for _ in range(300)]
    targets, references = [row[0] for row in rows], [size for row in rows for size in row[1:]]
    ends = numpy.cumsum([len(row) - 1 for row in rows])
    double = [snapped(numpy.array(sizes), lambda w, h: (2 * w, 2 * h)) for sizes in (targets, references)]
    sizes = Sizes(*double, ends)
    expected = [tuple((2 * w, 2 * h) for w, h in row) for row in rows]
    assert list(sizes) == expected and len(set(sizes.keys().tolist())) == len(set(expected))
    assert len(set(zip(sizes.keys().tolist(), expected))) == len(set(expected))
    assert sizes.largest() == max(expected, key=lambda row: sum(w * h for w, h in row))


def test_a_list_is_read_in_parts(tmp_path, monkeypatch):
    """Whatever is at a part's end; and with json's own errors."""
    values = [{"prompt": "ü\u2028\U0001f98a" * n, "n": [n, -1.5e3, None, "]},["]} for n in range(40)]
    monkeypatch.setattr(list_files, "CHUNK", 7)
    path = tmp_path / "list.json"
    for text in (
        json.dumps(values),
        json.dumps(values, ensure_ascii=False, indent=2),
        "[]",
        " [ ] ",
        "[1]",
        "[1 , 23]\n",
    ):
        path.write_text(text, encoding="utf-8")
        assert [value for _, value in DataReader()._values(path)] == json.loads(text)
    for text in ("[1, 2", "[1, 2]]", "[1 2]", "[1,]", "[,1]", "{}", "[1] 2", '["a', "", "12"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(list_files.DataError) as error:
            list(DataReader()._values(path))
        with pytest.raises(list_files.DataError) as whole:
            list_files.read_json_list(path)
        assert str(error.value) == str(whole.value)


def test_copied_data_are_not_taken_for_the_first(tmp_path):
    source = write_list(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for number, path in enumerate((source, tmp_path / "b" / "list.jsonl", source)):
        found = read_data(path, validation=0, cache=tmp_path / "cache")
        assert {example.target.parent.parent for example in found.training} == {path.parent}, number
