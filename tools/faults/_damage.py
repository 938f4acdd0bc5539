"""Damages files in every way that a download, a disk or a stranger does.

Each `Damage` writes a damaged form of one good file to another path. `damages(file)` are those that fit its kind;
`in_folder` damages one file of a model folder whose others stay as they are.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

MARK = "faults-code-ran"  # what hostile code would leave behind, in the folder for temporary files
DEEP, LONG = 100_000, 50 * 10**6  # levels of nested JSON, bytes of a text
GIGABYTE = 10**9


class Damage(NamedTuple):
    """One way to damage a file.

    Attributes:
        name: For the report.
        write: Called with the good file and the path to write.
        may_pass: Whether a reader may take the result, because nothing that counts is lost or nothing can show it.
    """

    name: str
    write: Callable[[Path, Path], object]
    may_pass: bool = False


def damages(file: Path, seed: int = 0) -> Iterator[Damage]:
    """Every damage for a file of this kind (.safetensors, .json, others), drawn by `seed` where it is drawn."""
    yield from OF_ANY
    if file.suffix == ".safetensors":
        yield from of_safetensors(file, seed)
    elif file.suffix == ".json":
        yield from of_json(json.loads(file.read_text("utf-8")))
    else:
        yield from _flips(file, seed, 0, file.stat().st_size, "byte")


def in_folder(folder: Path, name: str, out: Path, seed: int = 0) -> Iterator[tuple[Damage, Path, Path]]:
    """(damage, a copy of a model's folder, the damaged file in it), made one after the other in `out`."""
    for number, damage in enumerate(damages(folder / name, seed)):
        copy = out / f"{folder.name}-{number}"
        shutil.copytree(folder, copy)
        (copy / name).unlink()
        damage.write(folder / name, copy / name)
        yield damage, copy, copy / name
        shutil.rmtree(copy)


# Of any file.


def _part(share: float) -> Callable[[Path, Path], object]:
    def write(good: Path, bad: Path) -> None:
        data = good.read_bytes()
        bad.write_bytes(data[: min(int(share * len(data)), len(data) - 1)])

    return write


def _bytes(data: Callable[[], bytes]) -> Callable[[Path, Path], object]:
    return lambda good, bad: bad.write_bytes(data())


class _Call:
    """Pickles as a call that leaves MARK behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        import tempfile

        return os.mkdir, (os.path.join(tempfile.gettempdir(), MARK),)


def malicious_pickle() -> bytes:
    """A pickle that makes the folder MARK where it is read with `pickle.load`."""
    return pickle.dumps({"weight": _Call()}, protocol=2)


def malicious_pt() -> bytes:
    """The same as torch.save writes it: a zip archive with `data.pkl`."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("archive/data.pkl", malicious_pickle())
        archive.writestr("archive/version", "3\n")
    return held.getvalue()


def code_ran() -> bool:
    """Whether a malicious pickle was run since the last call."""
    import tempfile

    with suppress(FileNotFoundError):
        os.rmdir(os.path.join(tempfile.gettempdir(), MARK))
        return True
    return False


def zip_bomb(size: int = 2 * GIGABYTE) -> bytes:
    """A zip archive of a few MB or less that unpacks to `size` zero bytes."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("weights.bin", "w") as entry:
        for _ in range(size // 10**7):
            entry.write(bytes(10**7))
    return held.getvalue()


def hostile_tar(names: tuple[str, ...] = ("../outside.png", "/tmp/outside.png")) -> bytes:  # noqa: S108 (never made)
    """A .tar whose entries lie outside of where it is unpacked, and links to such."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"data"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            entry = tarfile.TarInfo(f"link-{kind.decode()}.png")
            entry.type, entry.linkname = kind, "../../etc/passwd"
            archive.addfile(entry)
    return held.getvalue()


# For which Pillow would start Ghostscript, whatever the file's name.
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n%%Page: 1 1\nshowpage\n%%EOF\n"


def _gguf() -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 10**6, 10**6) + bytes(100)


OF_ANY = (
    Damage("empty", _bytes(lambda: b"")),
    *(Damage(f"cut at {share:.0%}", _part(share)) for share in (0.001, 0.1, 0.5, 0.9)),
    Damage("last byte lost", _part(1.0)),
    Damage("zeros", lambda good, bad: bad.write_bytes(bytes(good.stat().st_size))),
    Damage("noise", lambda good, bad: bad.write_bytes(random.Random(0).randbytes(max(64, good.stat().st_size)))),
    Damage("Git LFS pointer", _bytes(lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")),
    Damage("web page", _bytes(lambda: b"<!DOCTYPE html><html><body>log in</body></html>")),
    Damage("malicious pickle", _bytes(malicious_pickle)),
    Damage("malicious .pt", _bytes(malicious_pt)),
    Damage("zip bomb", _bytes(lambda: zip_bomb(GIGABYTE // 10))),
    Damage("GGUF", _bytes(_gguf)),
    Damage("EPS", _bytes(lambda: EPS)),
    Damage("folder", lambda good, bad: bad.mkdir()),
    Damage("named pipe", lambda good, bad: os.mkfifo(bad)),
    Damage("dangling link", lambda good, bad: bad.symlink_to(bad.with_name("nothing-here"))),
    Damage("link to itself", lambda good, bad: bad.symlink_to(bad)),
    Damage("device", lambda good, bad: bad.symlink_to("/dev/zero")),
)


def unreadable(good: Path, bad: Path) -> None:
    """A copy that its owner may not read; nothing keeps root from it (`os.geteuid() == 0`)."""
    shutil.copyfile(good, bad)
    bad.chmod(0)


def _flips(file: Path, seed: int, start: int, end: int, what: str, may_pass: bool = True) -> Iterator[Damage]:
    """A flipped bit at three places from `start` to before `end`."""
    draw = random.Random(seed)
    for number in range(3 if end > start else 0):
        place, bit = draw.randrange(start, end), draw.randrange(8)

        def write(good: Path, bad: Path, place: int = place, bit: int = bit) -> None:
            data = bytearray(good.read_bytes())
            data[place] ^= 1 << bit
            bad.write_bytes(data)

        yield Damage(f"flipped bit in {what} {number}", write, may_pass)


# Of .safetensors: a length of 8 bytes, that many bytes of JSON, the data.


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a .safetensors file."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    """A .safetensors file of a header (as it is, where it is bytes) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


Change = Callable[[dict[str, Any], bytes], "tuple[dict[str, Any] | bytes, bytes]"]


def _header(change: Change) -> Callable[[Path, Path], object]:
    return lambda good, bad: bad.write_bytes(put_together(*change(*parts(good))))


def _entry(key: str, **values: Any) -> Callable[[Path, Path], object]:
    """With values of one tensor's header replaced."""
    return _header(lambda header, data: ({**header, key: {**header[key], **values}}, data))


def _metadata(values: Callable[[dict[str, str]], Any]) -> Callable[[Path, Path], object]:
    """With other metadata."""
    change = values
    return _header(lambda header, data: ({**header, "__metadata__": change(header.get("__metadata__") or {})}, data))


def _fill(key: str, value: float, share: float = 1.0) -> Callable[[Path, Path], object]:
    """With a value in the first `share` of a tensor's numbers."""
    import torch
    from safetensors.torch import load_file, save_file

    def write(good: Path, bad: Path) -> None:
        tensors, metadata = load_file(good), parts(good)[0].get("__metadata__")
        flat = tensors[key].flatten().clone()
        flat[: max(1, int(share * flat.numel()))] = torch.tensor(value).to(flat.dtype)
        save_file({**tensors, key: flat.view(tensors[key].shape)}, bad, metadata)

    return write


def _cast(dtype: str, scale: float = 1.0) -> Callable[[Path, Path], object]:
    """With every tensor in another dtype of PyTorch's."""
    import torch
    from safetensors.torch import load_file, save_file

    def write(good: Path, bad: Path) -> None:
        tensors = {key: (value.float() * scale).to(getattr(torch, dtype)) for key, value in load_file(good).items()}
        save_file(tensors, bad, parts(good)[0].get("__metadata__"))

    return write


def _tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path, Path], object]:
    """With other tensors."""
    from safetensors.torch import load_file, save_file

    return lambda good, bad: save_file(change(load_file(good)), bad, parts(good)[0].get("__metadata__"))


def of_safetensors(file: Path, seed: int = 0) -> Iterator[Damage]:
    """Damages of a .safetensors file's header, metadata and tensors."""
    import torch

    header, data = parts(file)
    length = len(file.read_bytes()) - len(data)
    keys = [key for key in header if key != "__metadata__"]
    floats = [key for key in keys if header[key]["dtype"] in ("F64", "F32", "F16", "BF16")]
    matrices = [key for key in floats if len(header[key]["shape"]) > 1] or floats
    yield from _flips(file, seed, 0, 8, "length", may_pass=False)
    yield from _flips(file, seed + 1, 8, length, "header")
    if data:
        yield from _flips(file, seed + 2, length, length + len(data), "data")
    yield Damage("header is a list", _header(lambda h, d: (b"[1, 2]", d)))
    yield Damage("header is no JSON", _header(lambda h, d: (b"{" + b"x" * 200, d)))
    yield Damage("header is nested deeply", _header(lambda h, d: (b'{"a":' * DEEP + b"1" + b"}" * DEEP, d)))
    yield Damage("header length of 2^63", lambda g, b: b.write_bytes(struct.pack("<Q", 2**63) + g.read_bytes()[8:]))
    yield Damage("header is UTF-16", _header(lambda h, d: (json.dumps(h).encode("utf-16"), d)))
    yield Damage("no tensors", _header(lambda h, d: ({k: v for k, v in h.items() if k == "__metadata__"}, b"")))
    yield Damage("bytes too many", lambda g, b: b.write_bytes(g.read_bytes() + b"more"))
    yield Damage("metadata is a list", _metadata(lambda m: [1]))
    yield Damage("metadata is a number", _metadata(lambda m: 7))
    yield Damage("metadata has no strings", _metadata(lambda m: {**m, "config": {"a": 1}, "format": 7}))
    yield Damage("metadata lost", _header(lambda h, d: ({k: v for k, v in h.items() if k != "__metadata__"}, d)), True)
    deep, long = "[" * DEEP + "]" * DEEP, "x" * LONG
    metadata = header.get("__metadata__") or {}
    yield Damage("metadata nested deeply", _metadata(lambda m: {**m, **dict.fromkeys(m, deep)}), not metadata)
    yield Damage("metadata of 50 MB", _metadata(lambda m: {**m, "more": long}), True)
    yield Damage("metadata no JSON", _metadata(lambda m: {**m, **dict.fromkeys(m, "{'no': JSON")}), not metadata)
    for name, text in metadata.items():
        with suppress(ValueError):
            for damage in of_json(json.loads(text)):
                yield _in_metadata(name, damage)
    if keys:
        first = keys[0]
        shape = header[first]["shape"]
        yield Damage("unknown dtype", _entry(first, dtype="F999"))
        yield Damage("dtype is a number", _entry(first, dtype=7))
        yield Damage("declared I8", _entry(first, dtype="I8"))
        yield Damage("declared shape of 2^62", _entry(first, shape=[2**62, 4]))
        yield Damage("declared shape below zero", _entry(first, shape=[-1 * n for n in shape] or [-1]))
        yield Damage("declared shape of text", _entry(first, shape="large"))
        yield Damage("declared offsets of 2^62", _entry(first, data_offsets=[0, 2**62]))
        yield Damage("declared offsets below zero", _entry(first, data_offsets=[-8, 0]))
        yield Damage("declared offsets of text", _entry(first, data_offsets=["a", "b"]))
        yield Damage("overlapping offsets", _header(lambda h, d: ({**h, "copy": h[first]}, d)))
        yield Damage("an entry is null", _header(lambda h, d: ({**h, first: None}, d)))
        yield Damage("first tensor lost", _tensors(lambda t: {key: t[key] for key in sorted(t)[1:]}))
        yield Damage("last tensor lost", _tensors(lambda t: {key: t[key] for key in sorted(t)[:-1]}))
        nothing = {"layers.9999998.weight": torch.zeros(0, 10**9)}  # which proves neither so many layers nor the width
        yield Damage("tensor of nothing", _tensors(lambda t: {**t, **nothing}), True)
        yield Damage("tensor too many", _tensors(lambda t: {**t, "other.weight": torch.zeros(4)}), True)
        yield Damage("keys of another", _tensors(lambda t: {f"other.{key}": value for key, value in t.items()}))
    for key in [*dict.fromkeys([*matrices[:1], *floats[-1:]])]:
        yield Damage(f"NaN in {key}", _fill(key, float("nan")))
        yield Damage(f"one NaN in {key}", _fill(key, float("nan"), 0.0))
        yield Damage(f"infinity in {key}", _fill(key, float("inf"), 0.0))
        yield Damage(f"other shape of {key}", _tensors(lambda t, k=key: {**t, k: t[k].new_zeros(3, 5)}))
        yield Damage(f"no shape of {key}", _tensors(lambda t, k=key: {**t, k: t[k].new_zeros(())}))
        yield Damage(f"nothing in {key}", _tensors(lambda t, k=key: {**t, k: t[k].new_zeros(0, 5)}))
        yield Damage(f"integers in {key}", _tensors(lambda t, k=key: {**t, k: t[k].mul(100).to(torch.int8)}))
        yield Damage(f"complex {key}", _tensors(lambda t, k=key: {**t, k: t[k].to(torch.complex64)}))
        yield Damage(f"bool {key}", _tensors(lambda t, k=key: {**t, k: t[k] > 0}))
    if floats:
        yield Damage("all integers", _cast("int8", 100.0))
        yield Damage("all fp8 without scales", _cast("float8_e4m3fn"), True)
        yield Damage("all fp64", _cast("float64"), True)
        large = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [len(data), len(data) + 4 * 10**12]}

        def huge(good: Path, bad: Path) -> None:
            """Terabytes declared, and there, as a hole in the file."""
            bad.write_bytes(put_together({**header, "huge.weight": large}, data))
            with suppress(OSError):
                os.truncate(bad, bad.stat().st_size + 4 * 10**12)

        yield Damage("a tensor of 4 TB", huge, True)


def _in_metadata(name: str, damage: Damage) -> Damage:
    """A damage of JSON, of the JSON text in one entry of the metadata."""

    def write(good: Path, bad: Path) -> None:
        header, data = parts(good)
        source, target = bad.with_name("metadata-good"), bad.with_name("metadata-bad")
        source.write_text(header["__metadata__"][name], "utf-8")
        damage.write(source, target)
        text = target.read_bytes().decode("utf-8", "replace")
        header["__metadata__"][name] = text
        bad.write_bytes(put_together(header, data))
        source.unlink()
        target.unlink()

    return Damage(f"metadata {name}: {damage.name}", write, damage.may_pass)


# Of JSON.

WRONG = {  # what is put in place of a value
    "null": None, "-1": -1, "0": 0, "1e9": 10**9, "1e308": 1e308, "NaN": float("nan"), "text": "text", "list": [1, [2]],
    "object": {"a": 1}, "true": True, "long text": "x" * 10**6,
}  # fmt: skip
HOSTILE = {
    "auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"},
    "_attn_implementation": "owner/repo",
    "attn_implementation": "owner/repo",
    "custom_pipeline": "owner/repo",
    "quantization_config": {"quant_method": "owner/repo"},
    "num_labels": 10**8,
    # of a tokenizer.json: a text is doubled 40 times, or a regular expression gives up
    "normalizer": {
        "type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
    },
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(.*)*(.*)*x$"}, "behavior": "Isolated", "invert": False},
}  # fmt: skip


def of_json(value: Any) -> Iterator[Damage]:
    """Damages of a JSON file that holds `value`; where it is an object, of each of its entries."""

    def holds(other: Any) -> Callable[[Path, Path], object]:
        return lambda good, bad: bad.write_text(json.dumps(other), "utf-8")

    yield Damage("JSON nested deeply", _bytes(lambda: b"[" * DEEP + b"]" * DEEP))
    yield Damage("JSON objects nested deeply", _bytes(lambda: b'{"a":' * DEEP + b"1" + b"}" * DEEP))
    yield Damage("JSON of 50 MB", _bytes(lambda: b'["' + b"x" * LONG + b'"]'))
    yield Damage("JSON number of a million digits", _bytes(lambda: b'{"a": ' + b"9" * 10**6 + b"}"))
    yield Damage("JSON is no UTF-8", _bytes(lambda: b'{"a": "\xff\xfe"}'))
    for name, other in {"null": None, "a number": 7, "text": "text", "a list": [], "a list of numbers": [1, 2]}.items():
        yield Damage(f"JSON is {name}", holds(other))
    if not isinstance(value, dict):
        return
    yield Damage("JSON is an empty object", holds({}), True)
    for key, hostile in HOSTILE.items():
        yield Damage(f"{key} added", holds({**value, key: hostile}), True)
    yield Damage("every key twice", lambda g, b: b.write_text(_twice(value), "utf-8"), True)
    for key in value:
        yield Damage(f"without {key}", holds({name: v for name, v in value.items() if name != key}), True)
        for name, wrong in WRONG.items():
            if type(wrong) is not type(value[key]) or wrong != value[key]:
                yield Damage(f"{key} is {name}", holds({**value, key: wrong}), True)


def _twice(value: dict[str, Any]) -> str:
    """Every key a second time, with nothing in it."""
    return json.dumps(value)[:-1] + "".join(f", {json.dumps(key)}: null" for key in value) + "}"
