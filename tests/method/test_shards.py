"""WebDataset shards as data: read in place, as the folders they were made of, and refused where they are not plain."""

import io
import json
import struct
import tarfile

import pytest
import torch
from subject_dla.common.files import DataError
from subject_dla.common.picture_files import file_version, load_picture
from subject_dla.common.tar_files import TarMember, tar_members
from subject_dla.tests.method.test_training_data import painted, subject, subjects
from subject_dla.training.data.dataset import read_data
from subject_dla.training.data.sources import find_shards


def jpeg(seed=0, size=(64, 48)):
    data = io.BytesIO()
    painted(size, seed).save(data, "JPEG", quality=95)
    return data.getvalue()


def write_tar(path, members, **options):
    """A .tar of (name, bytes), written as WebDataset's TarWriter does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key, prompt="a fox", references=1, seed=0, **more):
    members = [(f"{key}.jpg", jpeg(seed)), (f"{key}.txt", prompt.encode())] if prompt else [(f"{key}.jpg", jpeg(seed))]
    members += [(f"{key}.ref{n}.jpg", jpeg(seed + n + 1, (48, 64))) for n in range(references)]
    return members + [(f"{key}.{extension}", data) for extension, data in more.items()]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_with_references_of_their_own(tmp_path, tar_format):
    long = "g" * 150 + "/ü-0003"
    write_tar(tmp_path / "s" / "a-000000.tar", sample("0001") + sample("0002", "an owl", 2, seed=5), format=tar_format)
    more = sample(
        long if tar_format != tarfile.USTAR_FORMAT else "g/0003", "", 1, seed=9, json=b'{"caption": "a hare"}'
    )
    more += sample("0004", "", 1, json=json.dumps({"prompt": "a crow", "subject": "crow"}).encode())
    write_tar(tmp_path / "s" / "a-000001.tar", [("__meta__.json", b"{}"), *more], format=tar_format)
    found = read_data(tmp_path / "s", validation=0)
    assert [e.prompt for e in found.training] == ["a fox", "an owl", "a hare", "a crow"] and not found.problems
    assert [len(e.references) for e in found.training] == [1, 2, 1, 1] and found.training[3].subject == "crow"
    example = found.training[1]
    assert example.target_size == (64, 48) and set(example.reference_sizes) == {(48, 64)}
    for number, (file, size) in enumerate([(example.target, (64, 48)), *((r, (48, 64)) for r in example.references)]):
        (tmp_path / "picture.jpg").write_bytes(jpeg(5 + number, size))
        assert torch.equal(load_picture(file), load_picture(tmp_path / "picture.jpg"))
    assert len({file_version(f) for e in found.training for f in (e.target, *e.references)}) == 9


def facts(found):
    return [(e.subject, e.prompt, e.target.name, *(r.name for r in e.references)) for e in found.training]


def test_files_appended_to_a_shard_move_no_other_picture(tmp_path):
    """`tar -r` writes a newer file behind the others; and a pattern may name a shard twice."""
    a, b, c = (sample(key, f"a {key}", seed=10 * n) for n, key in enumerate("abc"))
    write_tar(tmp_path / "s.tar", [*a, *b, *a, *c])
    found = read_data(tmp_path / "s.tar", validation=0)
    assert facts(found) == [(k, f"a {k}", f"s.tar/{k}.jpg", f"s.tar/{k}.ref0.jpg") for k in "abc"]
    assert found.problems == ("s.tar a: is there twice, expected all files of a key one behind the other",)
    for example, (name, data) in zip(found.training, (a[0], b[0], c[0])):
        (tmp_path / name).write_bytes(data)
        assert torch.equal(load_picture(example.target), load_picture(tmp_path / name))
    assert facts(read_data(tmp_path / "{s,s}.tar", validation=0)) == facts(found)


def test_names_as_tar_and_macos_write_them(tmp_path):
    """tar -C FOLDER . names files ./NAME, which is no subject's folder; ._NAME beside a file is no sample's."""
    flat = [(f"./{name}", data) for key in "ab" for name, data in sample(key, references=0)]
    write_tar(tmp_path / "flat" / "0.tar", flat)
    with pytest.raises(DataError, match="a: has no references"):
        read_data(tmp_path / "flat", validation=0)
    folders = [(f"./fox/{name}", data) for key in "ab" for name, data in sample(key, references=0)]
    write_tar(tmp_path / "fox" / "0.tar", folders)
    assert facts(read_data(tmp_path / "fox", validation=0)) == [
        ("fox", "a fox", f"0.tar/./fox/{one}.jpg", f"0.tar/./fox/{other}.jpg") for one, other in ("ab", "ba")
    ]
    twins = [member for name, data in sample("a") for member in ((f"._{name}", b"\0\5\26\7"), (name, data))]
    write_tar(tmp_path / "mac" / "0.tar", twins)
    found = read_data(tmp_path / "mac", validation=0)
    assert facts(found) == [("a", "a fox", "0.tar/a.jpg", "0.tar/a.ref0.jpg")] and not found.problems


def test_a_folder_of_subjects_with_a_tar_is_still_that_folder(tmp_path):
    """As before there were shards; what is left out is said."""
    subjects(tmp_path / "data", 3)
    before = facts(read_data(tmp_path / "data", validation=0))
    write_tar(tmp_path / "data" / "backup.tar", sample("old"))
    found = read_data(tmp_path / "data", validation=0)
    assert facts(found) == before and [line.split(":")[0] for line in found.problems] == ["backup.tar"]
    (tmp_path / "data" / "backup.tar").rename(tmp_path / "backup.tar")
    (tmp_path / "data" / "subject-00").rename(tmp_path / "data" / "subject.tar")
    assert len(facts(read_data(tmp_path / "data", validation=0))) == len(before)


def test_shards_of_a_folder_of_subjects_are_that_folder(tmp_path):
    """Split, pairs and captions: only the paths differ."""
    subjects(tmp_path / "data", 6)
    subject(tmp_path / "data" / "silent", 2, captions=0)
    names = sorted(path.relative_to(tmp_path / "data").as_posix() for path in (tmp_path / "data").rglob("*.*"))
    members = [(name, (tmp_path / "data" / name).read_bytes()) for name in names]
    half = next(n for n, (name, _) in enumerate(members) if name.startswith("subject-03"))
    for number, part in enumerate((members[:half], members[half:])):
        write_tar(tmp_path / "shards" / f"{number}.tar", part)

    def facts(examples):
        return [
            (e.subject, e.prompt, e.target.name.split("/")[-1], [r.name.split("/")[-1] for r in e.references])
            for e in examples
        ]

    for seed in range(3):
        folder = read_data(tmp_path / "data", validation=0.3, seed=seed, pairs_per_target=1)
        shards = read_data(tmp_path / "shards", validation=0.3, seed=seed, pairs_per_target=1)
        assert sorted(facts(folder.training)) == sorted(facts(shards.training))
        assert sorted(facts(folder.validation)) == sorted(facts(shards.validation))
        assert len(shards.problems) == len(folder.problems) == 1


def test_the_index_of_shards_is_kept_and_follows_them(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", sample("1") + sample("2", seed=4))
    first = read_data(path, validation=0, cache=tmp_path / "cache")
    version = file_version(first.training[0].target)
    with monkeypatch.context() as patch:
        patch.setattr(TarMember, "open", None)
        assert read_data(path, validation=0, cache=tmp_path / "cache") == first
    write_tar(path, sample("1") + sample("2", "another caption", seed=7) + sample("3"))
    second = read_data(path, validation=0, cache=tmp_path / "cache")
    assert second == read_data(path, validation=0) and len(second.training) == 3
    assert file_version(second.training[0].target) != version, "other keys in the caches"


def test_how_shards_are_named(tmp_path):
    for number in (8, 9, 10):
        write_tar(tmp_path / "d" / f"s-{number:03d}.tar", sample(str(number)))
    assert find_shards(tmp_path / "d") == (tmp_path / "d", ["s-008.tar", "s-009.tar", "s-010.tar"])
    assert find_shards(tmp_path / "d" / "s-{008..010}.tar")[1] == ["s-008.tar", "s-009.tar", "s-010.tar"]
    assert find_shards(tmp_path / "{d,d}" / "s-0{09,10}.tar")[1] == ["d/s-009.tar", "d/s-010.tar"] * 2
    assert find_shards(tmp_path / "d" / "s-009.tar") == (tmp_path / "d", ["s-009.tar"])
    assert len(read_data(tmp_path / "d" / "s-{008..009}.tar", validation=0).training) == 2
    with pytest.raises(DataError, match=r"1 of 4 shards are not there, the first is s-011.tar"):
        read_data(tmp_path / "d" / "s-{008..011}.tar")
    with pytest.raises(DataError, match="1 of 1 shards are not there"):
        read_data(tmp_path / "none.tar")
    with pytest.raises(DataError, match="expected at most 1,000,000"):
        read_data(tmp_path / "s-{0..99999999999}.tar")


BAD = {  # samples that are left out, by the words of their problem
    "has no references": [("1.jpg", jpeg()), ("1.txt", b"a fox")],
    "has 0 pictures": [("1.txt", b"a fox"), ("1.ref0.jpg", jpeg())],
    "has 2 pictures": sample("1", png=jpeg()),
    "no caption": sample("1", ""),
    "expected text": sample("1", "", json=b'{"prompt": 3}'),
    "with list, expected an object": sample("1", json=b"[]"),
    "Expecting": sample("1", json=b"{"),
    "codec can't decode": [("1.jpg", jpeg()), ("1.txt", b"\xff\xfe\xff"), ("1.ref0.jpg", jpeg())],
    "max_references": sample("1", references=5),
    "extension twice": sample("1") + [("1.txt", b"again")],
    "bytes, expected at most": [("1.jpg", jpeg()), ("1.txt", b"a" * 2**21), ("1.ref0.jpg", jpeg())],
    "cannot be read": [("1.jpg", jpeg()[:300]), ("1.txt", b"a fox"), ("1.ref0.jpg", jpeg())],
}


@pytest.mark.parametrize("words", BAD)
def test_samples_that_are_left_out(tmp_path, words):
    found = read_data(write_tar(tmp_path / "a.tar", BAD[words] + sample("2", seed=3)), validation=0)
    assert len(found.training) == 1 and len(found.problems) == 1
    assert words in found.problems[0] and "a.tar" in found.problems[0]


def special(kind, **values):
    info = tarfile.TarInfo("2.jpg")
    info.type = kind
    for name, value in values.items():
        setattr(info, name, value)
    return info


def header(size, kind=b"0", name=b"2.jpg"):
    """A member's header with a size that Python would not write."""
    block = bytearray(tarfile.TarInfo(name.decode()).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size if isinstance(size, bytes) else b"\x80" + struct.pack(">3xQ", size)
    block[156:157] = kind
    block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 8 * 32)
    return bytes(block)


HOSTILE = {
    "is a link": [special(tarfile.SYMTYPE, linkname="/etc/passwd")],
    "is a link,": [special(tarfile.LNKTYPE, linkname="1.jpg")],
    "is a device or pipe": [special(tarfile.FIFOTYPE)],
    "is no plain name": [special(tarfile.REGTYPE, name="../2.jpg")],
    "is no plain name,": [special(tarfile.REGTYPE, name="/etc/passwd")],
    "is no plain name, expected": [special(tarfile.REGTYPE, name="a/../../2.jpg")],
    "truncated or damaged": header(2**40),
    "a header is said to have": header(2**40, b"x"),
    "a header is said to": header(2**40, b"L"),
    "cannot be read as a": header(b"\xff" * 12, b"x"),
    "truncated or": header(b"\xff" * 12),
    "at byte": b"\1" * 1024,
}


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_shards_are_refused(tmp_path, words):
    """Nothing but plain files with plain names, wherever a header leads."""
    path = write_tar(tmp_path / "in" / "a.tar", sample("1"))
    if isinstance(HOSTILE[words], bytes):
        data = path.read_bytes()
        with tarfile.open(path) as tar:
            last = tar.getmembers()[-1]
        end = last.offset_data + -(-last.size // 512) * 512
        path.write_bytes(data[:end] + HOSTILE[words] + bytes(10240))
    else:
        with tarfile.open(path, "a") as tar:
            for info in HOSTILE[words]:
                tar.addfile(info)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=rf"a\.tar.*{words.strip(',')}"):
        read_data(path, cache=tmp_path / "cache")
    assert set(tmp_path.rglob("*")) == before, "nothing is written"


def test_cut_and_packed_shards_are_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample("1") + sample("2"))
    data = path.read_bytes()
    ends = [member.offset + member.size for member in tar_members(path)]
    for cut in (0, 100, 512, 700, ends[2], ends[2] + -ends[2] % 512, ends[-1], ends[-1] + -ends[-1] % 512):
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match=r"a\.tar.*(truncated|cannot be read as a \.tar)"):
            read_data(path)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(special(tarfile.REGTYPE))
    with pytest.raises(DataError, match="expected a whole and uncompressed one"):
        read_data(path)
    with pytest.raises(DataError, match="nothing to train on"):
        read_data(write_tar(tmp_path / "empty.tar", []))


def test_members_are_read_within_their_bounds(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"0123456789"), ("b.txt", b"other")])
    first, second = tar_members(path)
    assert first.read_bytes() == b"0123456789" and second.read_bytes() == b"other"
    with first.open() as file:
        assert file.read(4) == b"0123" and file.seek(-2, io.SEEK_END) == 8 and file.read() == b"89"
        file.seek(50)
        assert file.read() == b""
