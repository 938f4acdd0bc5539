"""The one reader of safetensors headers, against the library's own; the table of dtypes."""

import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from subject_dla.common.dtypes import DTYPES, FILE_DTYPES, UNQUANTIZED
from subject_dla.common.safetensors_header import SafetensorsError, read_header


@pytest.mark.parametrize("metadata", [None, {"config": '{"a": 1}'}])
def test_header_and_dtypes_are_the_librarys(tmp_path, metadata):
    path = tmp_path / "a.safetensors"
    tensors = {name: torch.ones(2, 3).to(dtype) for name, dtype in FILE_DTYPES.items()}
    save_file({**tensors, "scalar": torch.tensor(1.0), "none": torch.zeros(0, 4)}, path, metadata)
    header = read_header(path)
    with safe_open(path, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}
        expected = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
        assert header.metadata == (file.metadata() or {})
    assert {key: (tensor.dtype, tensor.shape) for key, tensor in header.tensors.items()} == expected
    assert all(header.tensors[name].dtype == name for name in FILE_DTYPES)
    assert set(DTYPES.values()) <= set(FILE_DTYPES.values()) and set(UNQUANTIZED) == {"F32", "F16", "BF16"}


# The damages of tests/method/test_checkpoint.py, where a DLA is such a file, are not repeated here.
@pytest.mark.parametrize(("content", "problem"), [
    (None, "does not exist"),
    (b"", "is empty .0 bytes"),
    (b"<!DOCTYPE html>", "is a web page"),
    (b"\x89PNG\r\n\x1a\n", "is a PNG picture, expected a .safetensors file"),
    (b"\xff\xd8\xff\xe0" + bytes(9), "is a JPEG picture, expected"),
    (b"RIFF\0\0\0\0WEBPVP8", "is a WebP picture or a sound, expected"),
    (b"\x07noise", "is not a .safetensors file: it begins with b'.*noise.*Download or save it again"),
    (struct.pack("<Q", 90) + b'{"a": ', "is cut off inside its header: 14 bytes, at least 98 expected"),
    (struct.pack("<Q", 12) + b'{"a": [1,2]}', "has a damaged .safetensors header"),
    (struct.pack("<Q", 10**5) + b'{"a":'.ljust(10**5, b"["), "has a damaged .safetensors header"),
    (struct.pack("<Q", 21) + b'{"__metadata__": "x"}', "has a damaged .safetensors header"),
    (struct.pack("<Q", 54) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
     "is cut off: 62 bytes, expected 66"),
])  # fmt: skip
def test_what_is_no_safetensors_file_is_named_with_what_was_found(tmp_path, content, problem):
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SafetensorsError, match=f"a.safetensors {problem}") as error:
        read_header(path)
    assert str(error.value) == f"{path} {error.value.problem}"
