"""Whatever changes in the data between stop and resume is noticed: by `fingerprint` or `content` of the collection."""

import json
import os
import shutil

import pytest
from subject_dla.tests.method.test_training_data import entry, painted, subjects
from subject_dla.training.data import index
from subject_dla.training.data.dataset import read_data


def keeping_time(path, change):
    """Changes a file, which keeps its size and the time of its content."""
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns


def other_colour(path):
    size = path.stat().st_size
    painted((64, 64), 77).save(path, "BMP")  # a BMP's size is its pixels'
    assert path.stat().st_size == size


def letters(path):
    path.write_text(path.read_text(encoding="utf-8").swapcase(), encoding="utf-8")


def lines(change):
    def write(path):
        found = change(path.read_text(encoding="utf-8").splitlines())
        path.write_text("\n".join(found), encoding="utf-8")

    return write


CHANGES = {
    "picture replaced": lambda root: painted((96, 64)).save(root / "subject-00" / "0.bmp"),
    "picture replaced, same size and time": lambda root: keeping_time(root / "subject-00" / "0.bmp", other_colour),
    "pictures exchanged": lambda root: exchange(root / "subject-00" / "0.bmp", root / "subject-00" / "1.bmp"),
    "caption changed": lambda root: (root / "subject-00" / "0.txt").write_text("another caption"),
    "caption changed, same size and time": lambda root: keeping_time(root / "subject-00" / "0.txt", letters),
    "caption removed": lambda root: (root / "subject-00" / "0.txt").unlink(),
    "picture removed": lambda root: (root / "subject-00" / "1.bmp").unlink(),
    "picture added": lambda root: painted((64, 64)).save(root / "subject-00" / "new.bmp"),
    "subject removed": lambda root: shutil.rmtree(root / "subject-01"),
    "subject added": lambda root: shutil.copytree(root / "subject-01", root / "subject-99"),
    "subject renamed": lambda root: (root / "subject-01").rename(root / "subject-98"),
}
OF_LISTS = {
    "order": lines(lambda found: found[::-1]),
    "entry removed": lines(lambda found: found[1:]),
    "entry twice": lines(lambda found: [*found, found[0]]),
    "prompt": lines(lambda found: [line.replace("a cup", "a mug") for line in found]),
    "same size and time": lambda path: keeping_time(path, lines(lambda f: [x.replace("1.bmp", "0.bmp") for x in f])),
}


def exchange(one, two):
    first = one.read_bytes()
    keeping_time(one, lambda path: path.write_bytes(two.read_bytes()))
    keeping_time(two, lambda path: path.write_bytes(first))


@pytest.fixture
def root(tmp_path):
    subjects(tmp_path / "data", 4)
    for number, path in enumerate(sorted((tmp_path / "data").glob("*/*.jpg"))):
        painted((64, 64), number).save(path.with_suffix(".bmp"))
        path.unlink()
    return tmp_path / "data"


def seen(source, root):
    found = read_data(source, validation=0.3, cache=root.parent / "cache")
    assert found == read_data(source, validation=0.3)  # without a cache
    return found.fingerprint, found.content


@pytest.mark.parametrize("headers_alone", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_folder_is_noticed(root, monkeypatch, change, headers_alone):
    if headers_alone:
        monkeypatch.setattr(index, "DECODED", 1)
    before = seen(root, root)
    assert seen(root, root) == before
    CHANGES[change](root)
    assert seen(root, root) != before


@pytest.mark.parametrize("change", OF_LISTS)
def test_every_change_of_a_list_is_noticed(root, change):
    source = root / "list.jsonl"
    entries = [entry(f"subject-{n:02d}/0.bmp", f"subject-{n:02d}/1.bmp", prompt=f"a cup {n}") for n in range(4)]
    source.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    before = seen(source, root)
    OF_LISTS[change](source)
    assert seen(source, root) != before


def test_another_time_of_change_alone_is_none(root):
    before = seen(root, root)
    for path in root.glob("*/*"):
        path.chmod(0o640)
    assert seen(root, root) == before
