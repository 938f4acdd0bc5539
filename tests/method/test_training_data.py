"""What a run learns from: damaged pictures and lists, the split, buckets, and the order of the micro-batches."""

import json
import os
import random
import warnings
from collections import Counter

import pytest
import torch
from PIL import Image, ImageFile
from subject_dla.common.images import ImageError
from subject_dla.common.list_files import DataError
from subject_dla.common.picture_files import load_picture
from subject_dla.training.data.buckets import RATIOS, Order, bucket
from subject_dla.training.data.dataset import read_data

SIZE = (64, 48)


def painted(size=SIZE, seed=0):
    """Smooth, so that JPEG keeps it, and not symmetric."""
    noise = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    pixels = torch.nn.functional.interpolate(noise, size[::-1], mode="bilinear")[0].movedim(0, -1)
    return Image.fromarray((pixels.numpy() * 255).astype("uint8"))


def subject(home, pictures=3, captions=9, suffix=".jpg"):
    home.mkdir(parents=True, exist_ok=True)
    seed = sum(ord(c) * (i + 1) for i, c in enumerate(home.name))
    for number in range(pictures):
        painted(seed=seed + number).save(home / f"{number}{suffix}", quality=95)
        if number < captions:
            (home / f"{number}.txt").write_text(f"{home.name} seen from {number}", encoding="utf-8")
    return home


def subjects(root, count, first=0):
    for number in range(first, first + count):
        subject(root / f"subject-{number:02d}")
    return root


def names(examples):
    return {example.subject for example in examples}


def test_pictures_come_as_they_are_shown(tmp_path):
    def loaded(image, name, **options):
        image.save(tmp_path / name, **options)
        return load_picture(tmp_path / name)

    plain = torch.frombuffer(bytearray(painted().tobytes()), dtype=torch.uint8).reshape(48, 64, 3) / 255
    torch.testing.assert_close(loaded(painted(), "plain.png"), plain)
    turned = painted().getexif()
    turned[0x0112] = 6  # shown after a quarter turn clockwise
    torch.testing.assert_close(loaded(painted(), "turned.png", exif=turned), plain.rot90(-1, (0, 1)))

    alpha = painted().convert("RGBA")
    alpha.putalpha(51)
    torch.testing.assert_close(loaded(alpha, "alpha.png"), 0.2 * plain + 0.8, atol=1.01 / 255, rtol=0)
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([9, 9, 9, 0, 0, 255])
    assert (loaded(palette, "palette.png", transparency=1) == 1).all()

    steps = torch.arange(2048).reshape(32, 64) * 32  # 0 to 65504
    grey = loaded(Image.fromarray(steps.numpy().astype("uint16")), "deep.png")
    torch.testing.assert_close(grey[..., 0], steps / 65535, atol=0.51 / 255, rtol=0)
    assert (grey == grey[..., :1]).all()
    dark = Image.fromarray(torch.full((32, 32), 200).numpy().astype("uint16"))  # nearly black, no 8 bit picture
    assert loaded(dark, "dark.png").max() <= 1 / 255

    red = loaded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "cmyk.jpg", quality=100)
    torch.testing.assert_close(red[5, 5], torch.tensor([1.0, 0, 0]), atol=0.03, rtol=0)
    for name in ("grey.webp", "grey.jpg", "grey.jpeg"):
        assert loaded(painted().convert("L"), name).shape == (48, 64, 3)
    assert set(loaded(painted().convert("1"), "bits.png").unique().tolist()) <= {0.0, 1.0}


def damaged(folder):
    """Pictures that cannot be used, by the word that their problem must hold."""
    files = {"empty.jpg": (b"", "0 bytes"), "text.png": (b"<html>not found</html>", "cannot identify")}
    for suffix in ("jpg", "png", "webp"):
        painted((640, 480)).save(whole := folder / f"whole.{suffix}", **{"quality": 95} if suffix == "jpg" else {})
        data = whole.read_bytes()
        files[f"half.{suffix}"] = (data[: len(data) // 2], "cannot be read")
        files[f"header.{suffix}"] = (data[:40], "cannot be read")
        whole.unlink()
    half = files["half.png"][0]
    files["zeros.png"] = (half[:60] + bytes(30) + half[90:], "cannot be read")
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    painted((20, 64)).save(folder / "small.png")
    painted((28, 6000)).save(folder / "slim.png")
    return {name: word for name, (_, word) in files.items()} | {"small.png": "20 x 64", "slim.png": "200:1"}


@pytest.mark.parametrize("lenient", [False, True])
def test_damaged_pictures_are_named_and_left_out_also_where_pillow_is_told_to_fill_them(tmp_path, monkeypatch, lenient):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    home = subject(tmp_path / "data" / "fox")
    words = damaged(home)
    for name in words:
        (home / name).with_suffix(".txt").write_text("a caption", encoding="utf-8")
    data = read_data(tmp_path / "data", validation=0)
    assert len(data.training) == 3 * 2 and len(data.problems) == len(words)
    for name, word in words.items():
        assert any(name in problem and word in problem for problem in data.problems), (name, data.problems)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient
    for name in set(words) - {"small.png", "slim.png"}:
        with pytest.raises(ImageError, match=name):
            load_picture(home / name)


def test_whatever_is_accepted_can_be_loaded_later(tmp_path):
    """Random damage to headers, EXIF and data of every kind of file: what passes must not stop the run."""
    draw, exif = random.Random(0), painted().getexif()
    exif[0x0112] = 8
    accepted = refused = 0
    for suffix in ("jpg", "png", "webp"):
        path = tmp_path / f"whole.{suffix}"
        painted().save(path, exif=exif)
        whole = path.read_bytes()
        for trial in range(120):
            data = bytearray(whole)
            for _ in range(draw.choice((1, 3, 10))):
                data[draw.randrange(min(len(data), draw.choice((80, 10_000))))] = draw.randrange(256)
            home = tmp_path / suffix / str(trial)
            home.mkdir(parents=True)
            (home / f"a.{suffix}").write_bytes(data)
            (home / "a.txt").write_text("damaged", encoding="utf-8")
            (home / f"b.{suffix}").write_bytes(whole)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = read_data(tmp_path / suffix, validation=0)
            refused += len({problem.split(":")[0] for problem in data.problems if "/a." in problem})
            for example in data.training:
                assert load_picture(example.target).shape == (*example.target_size[::-1], 3)
                accepted += 1
    assert accepted > 20 and refused > 20


def test_folder_of_subjects(tmp_path):
    subject(tmp_path / "fox", 4, captions=2)
    subject(tmp_path / "owl", 2, captions=1, suffix=".PNG")
    subject(tmp_path / "lonely", 1)
    subject(tmp_path / "silent", 3, captions=0)
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "fox" / "3.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "fox" / "2.txt").write_text(" \n", encoding="utf-8")
    data = read_data(tmp_path, validation=0, pairs_per_target=2)
    found = Counter((e.subject, e.target.name) for e in data.training)
    assert found == {("fox", "0.jpg"): 2, ("fox", "1.jpg"): 2, ("owl", "0.PNG"): 1}
    for example in data.training:
        (reference,) = example.references
        assert reference != example.target and reference.parent == example.target.parent
        assert example.target_size == example.reference_sizes[0] == SIZE
        assert example.prompt == f"{example.subject} seen from {example.target.stem}"
    causes = ["lonely: 1 picture", "silent: caption", "empty: 0 picture", "3.txt: UTF-8", "2.txt: empty"]
    for words in (cause.split(": ") for cause in causes):
        assert sum(all(word in problem for word in words) for problem in data.problems) == 1, (words, data.problems)
    assert len(data.problems) == 5
    pairs = [(e.target, e.references) for e in read_data(tmp_path, validation=0, seed=1).training]
    assert len(set(pairs)) == len(pairs)


def test_pictures_right_in_the_folder_are_one_subject_split_by_target(tmp_path):
    subject(tmp_path / "my cat", 6)
    data = read_data(tmp_path / "my cat", validation=0.3)
    assert names(data.training) == names(data.validation) == {"my cat"}
    assert not {e.target for e in data.training} & {e.target for e in data.validation}


def test_longest_names_and_names_that_are_no_utf8(tmp_path):
    home = subject(tmp_path / ("s" * 255))
    painted(seed=9).save(home / f"{'n' * 251}.png")
    (home / f"{'n' * 251}.txt").write_text("a long name", encoding="utf-8")
    painted(seed=8).save(home / os.fsdecode(b"\xff\xfe\n.png"), "PNG")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / os.fsdecode(b"\xff\n.jpg")).write_bytes(b"broken")
    data = read_data(tmp_path, validation=0.1)
    examples = (*data.training, *data.validation)
    assert any(e.prompt == "a long name" for e in examples) and any("\n" in e.references[0].name for e in examples)
    for problem in data.problems:  # each stays one line that can be printed
        assert problem.isprintable() and problem.encode("utf-8")


def test_nothing_usable_says_how_many_problems_and_the_first_three(tmp_path):
    for number in range(5):
        subject(tmp_path / f"lonely-{number}", 1)
    with pytest.raises(DataError, match=r"5 problem") as error:
        read_data(tmp_path)
    assert str(error.value).count("\n- ") == 3 and "lonely-0" in str(error.value)


def entry(reference="a/0.jpg", target="a/1.jpg", **more):
    return {"prompt": "a fox", "image_paths": [reference], "image_tgt_path": target, **more}


def read_entries(folder, entries, **options):
    (folder / "list.json").write_text(json.dumps(entries), encoding="utf-8")
    return read_data(folder / "list.json", **{"validation": 0, **options})


GOOD = [
    entry(),
    {"prompt": "one path", "image_path": "a/0.jpg", "target": "a/2.jpg"},
    {"prompt": "null is not there", "image_paths": None, "image_path": "a/1.jpg", "target_path": "a/2.jpg"},
    {"prompt": "both\u2028lines", "image_paths": ["a/0.jpg", "./b//0.jpg"], "image_tgt_path": "b\\1.jpg",
     "subject": "ab"},
]  # fmt: skip
BAD = {  # by the words that their problem must hold
    "NoneType": [None], "int": [17], "list": [["a"]], "prompt is 3": [entry(prompt=3)],
    "prompt is None": [{"image_paths": ["a/0.jpg"], "image_tgt_path": "a/1.jpg"}],
    "expected text": [entry(prompt=" \n "), entry(prompt="\ud800")], "subject is 5": [entry(subject=5)],
    "image_paths is None": [{"prompt": "p"}], "image_paths is []": [entry(image_paths=[])],
    "image_paths is {": [entry(image_paths={"a": 1})],
    "image_paths is": [entry(image_paths=["a/0.jpg", 5]), entry("a/\ud800.jpg")],
    "image_tgt_path is None": [{"prompt": "p", "image_paths": ["a/0.jpg"]}], "image_tgt_path is 7": [entry(target=7)],
    "leads out": [
        entry("../out.jpg"), entry("a/../../out.jpg"), entry("a\\..\\..\\out.jpg"), entry(target="/etc/passwd"),
        entry(target="C:\\x.jpg"), entry(target="."),
    ],
    "cannot be read": [entry(target="a"), entry("a/\0.jpg"), entry("n" * 5000)], "does not exist": [entry("a/9.jpg")],
    "broken.jpg cannot be read": [entry("a/broken.jpg"), entry("a/broken.jpg", "a/2.jpg")],
    "max_references": [entry(image_paths=["a/0.jpg"] * 3)],
}  # fmt: skip
UNREADABLE = (b'{"prompt": "p", "image_pa', b"\xff\xfe\xff", b'{"prompt": "\xe9"}', b"[" * 100_000)  # as lines


@pytest.fixture
def lists(tmp_path):
    subject(tmp_path / "a")
    subject(tmp_path / "b")
    painted().save(tmp_path.parent / "out.jpg")
    (tmp_path / "a" / "broken.jpg").write_bytes((tmp_path / "a" / "0.jpg").read_bytes()[:300])
    return tmp_path


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_lists_with_every_kind_of_damage(lists, suffix):
    lines = [json.dumps(good, ensure_ascii=False).encode() for good in GOOD]
    bad = {json.dumps(value).encode(): word for word, values in BAD.items() for value in values}
    text, first = b"[" + b",".join([*lines, *bad]) + b"]", len(GOOD) + 1
    if suffix == ".jsonl":
        bad |= dict.fromkeys(UNREADABLE, "not JSON")
        text, first = b"\r\n".join([*lines, b"", *bad, b""]), len(GOOD) + 2
    path = (lists / "list").with_suffix(suffix)
    path.write_bytes(b"\xef\xbb\xbf" + text)
    data = read_data(path, validation=0, max_references=2)
    assert [e.prompt for e in data.training] == [good["prompt"] for good in GOOD]
    assert [e.subject for e in data.training] == ["a/0", "a/0", "a/1", "ab"]
    assert [len(e.references) for e in data.training] == [1, 1, 1, 2]
    assert data.training[3].target == data.training[3].references[1].parent / "1.jpg"
    assert len(data.problems) == len(bad)
    for number, word in enumerate(bad.values(), first):
        (found,) = [problem for problem in data.problems if f"entry {number}:" in problem]
        assert word in found and len(found) <= 400 and found.isprintable()


def test_split_is_by_subject_and_stays_when_subjects_come(tmp_path):
    subjects(tmp_path, 20)
    before = [read_data(tmp_path, validation=0.3, seed=seed) for seed in range(6)]
    for data in before:
        assert data.training and data.validation and not names(data.training) & names(data.validation)
        assert len(names(data.training) | names(data.validation)) == 20
    assert before[0] == read_data(tmp_path, validation=0.3)
    assert len({frozenset(names(data.validation)) for data in before}) == 6
    assert 4 < sum(len(names(data.validation)) for data in before) / 6 < 8  # 0.3 of 20
    subjects(tmp_path, 4, first=20)
    for seed, data in enumerate(before):
        after = read_data(tmp_path, validation=0.3, seed=seed)
        assert names(after.validation) >= names(data.validation) and names(after.training) >= names(data.training)
        assert after.fingerprint != data.fingerprint


@pytest.mark.parametrize("share, count", [(0.001, 2), (0.9, 2), (0.001, 5), (0.9, 5)])
def test_at_least_one_subject_on_each_side(tmp_path, share, count):
    subjects(tmp_path, count)
    for seed in range(8):
        data = read_data(tmp_path, validation=share, seed=seed)
        assert data.training and data.validation
    assert not read_data(tmp_path, validation=0.0).validation


def test_subjects_that_share_pictures_lie_on_one_side(lists):
    """As in UNO's lists, where each picture of a pair is the other's reference once."""
    entries = []
    for number in range(8):
        subject(lists / str(number), 2)
        left, right = f"{number}/0.jpg", f"{number}/1.jpg"
        entries += [entry(left, right), entry(right, left)]
    data = read_entries(lists, entries, validation=0.4)
    sides = [{path for e in side for path in (e.target, *e.references)} for side in (data.training, data.validation)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_a_picture_that_most_share_does_not_hold_most_out(lists):
    """A background, say: the subjects that it ties together are trained on, or split where they are all."""
    subject(lists / "ground", 1)
    entries = []
    for number in range(12):
        subject(lists / str(number), 2)
        references = [f"{number}/0.jpg"] + ["ground/0.jpg"] * (number > 0)
        entries.append(entry(target=f"{number}/1.jpg", image_paths=references))
    for count, held in ((12, {"0/0"}), (11, None)):
        for seed in range(6):
            data = read_entries(lists, entries[-count:], validation=0.1, seed=seed)
            assert not names(data.validation) & names(data.training)
            assert names(data.validation) == held or held is None and 1 <= len(names(data.validation)) < 6


def test_links_that_lead_out_of_a_lists_folder_are_refused(lists, tmp_path_factory):
    away = subject(tmp_path_factory.mktemp("away") / "private", 1)
    (lists / "picture.jpg").symlink_to(away / "0.jpg")
    (lists / "folder").symlink_to(away, target_is_directory=True)
    (lists / "inside.jpg").symlink_to(lists / "b" / "0.jpg")
    (lists / "loop.jpg").symlink_to(lists / "loop.jpg")
    entries = [entry(name) for name in ("picture.jpg", "folder/0.jpg", "inside.jpg", "loop.jpg")]
    link = lists.parent / "link"  # the list's own folder may be reached by one
    link.unlink(missing_ok=True)
    link.symlink_to(lists, target_is_directory=True)
    for home in (lists, link):
        data = read_entries(home, [*entries, entry(target="folder/0.jpg")])
        assert [e.references[0].name for e in data.training] == ["inside.jpg"]
        found = [(problem[:17], "leads out" in problem) for problem in data.problems]
        expected = [(f"list.json entry {n}", n != 4) for n in (1, 2, 5, 4)]
        assert sorted(found) == sorted(expected)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_picture(lists):
    os.mkfifo(lists / "pipe.jpg")
    data = read_entries(lists, [entry(), entry("pipe.jpg")])
    assert len(data.training) == 1 and "pipe.jpg cannot be read as a picture (it is no file)" in data.problems[0]


def test_held_out_examples_of_their_own_are_none_that_are_trained_on(tmp_path):
    subjects(tmp_path / "training", 3)
    held = subjects(tmp_path / "held", 1, first=9)
    (held / "again").symlink_to(tmp_path / "training" / "subject-00", target_is_directory=True)
    data = read_data(tmp_path / "training", validation=held)
    assert names(data.validation) == {"subject-09"} and len(data.problems) == 6
    assert all("again/" in problem and "cannot be held out" in problem for problem in data.problems)
    (held / "again").unlink()
    subjects(held, 1, first=10)
    data = read_data(tmp_path / "training", validation=held)
    assert (len(names(data.training)), names(data.validation)) == (3, {"subject-09", "subject-10"})
    (tmp_path / "nothing").mkdir()
    for source, words in (("training", "nothing to hold out"), ("nothing", "nothing")):
        with pytest.raises(DataError, match=words):
            read_data(tmp_path / "training", validation=tmp_path / source)


def test_fingerprint_follows_prompts_files_split_and_order(lists):
    def fingerprint(entries=GOOD[:2], **options):
        return read_entries(lists, entries, **options).fingerprint

    first = fingerprint()
    os.utime(lists / "b" / "0.jpg", ns=(1, 1))  # of no example
    assert fingerprint() == first
    changed = ([entry(prompt="an owl"), GOOD[1]], [entry("a/1.jpg", "a/0.jpg"), GOOD[1]])
    seen = {first, fingerprint(GOOD[1::-1]), fingerprint(validation=0.5), *map(fingerprint, changed)}
    os.utime(lists / "a" / "0.jpg", ns=(1, 1))
    assert len(seen | {fingerprint()}) == 6


@pytest.mark.parametrize("side, grid", [(1024, 16), (512, 16), (256, 32), (64, 16)])
def test_buckets_keep_area_and_ratio(side, grid):
    found = {bucket(w, h, side, grid) for w in range(100, 2000, 37) for h in range(100, 2000, 41)}
    assert len(found) <= 2 * len(RATIOS) - 1 and {(h, w) for w, h in found} == found and (side, side) in found
    for width, height in found:
        assert width % grid == height % grid == 0 and abs(width * height / side**2 - 1) < 4 * grid / side
    if side >= 512:
        for width, height in ((1000, 1000), (1500, 1000), (800, 1000), (1000, 2000), (1234, 987)):
            w, h = bucket(width, height, side, grid)
            assert abs(torch.tensor(w / h / (width / height)).log()) < 0.13
    assert bucket(10_000, 10, side, grid) == bucket(2, 1, side, grid)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_order_covers_each_index_once_an_epoch_and_never_mixes_keys(batch_size):
    keys = [("tall", i % 3) if i % 5 else "wide" for i in range(41)]
    order = Order(keys, batch_size, seed=3)
    epochs = []
    for epoch in range(3):
        batches = [order.at(place) for place in range(epoch * len(order), (epoch + 1) * len(order))]
        assert all(len({keys[i] for i in batch}) == 1 and 1 <= len(batch) <= batch_size for batch in batches)
        assert sorted(i for batch in batches for i in batch) == list(range(41))
        epochs.append(batches)
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_is_a_function_of_seed_and_position_alone():
    keys = [i % 2 for i in range(10)]
    places = list(range(25))
    torch.manual_seed(1)
    straight = [Order(keys, 2, seed=5).at(place) for place in places]
    torch.manual_seed(2)
    one = Order(keys, 2, seed=5)
    assert [one.at(place) for place in reversed(places)] == straight[::-1]
    assert [Order(keys, 2, seed=6).at(place) for place in places] != straight
