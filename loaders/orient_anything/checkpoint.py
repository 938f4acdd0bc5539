"""Orient Anything V1 files, small, base or large, with 180 or 360 rotation bins: all of it read from the shapes.

V2 is not read: see web/docs/SubjectLoadOrientation.md for why.
"""

import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...common.dtypes import FILE_DTYPES
from ...common.safetensors_header import SafetensorsError, read_header, signature
from .network import BACKBONE, HEAD, SIZES, published_shapes, rotation_bins

TRAINING_ONLY = ("num_batches_tracked", "mask_token")  # training's; may be missing
OF_TORCH = (b"PK\x03\x04", b"\x80\x02")  # how torch's own files begin: zip, and pickle before 1.6


class OrientationCheckpointError(ValueError):
    """A file that is no usable Orient Anything V1: file, key, what was found, what was expected, and the way out."""

    def __init__(self, path: str | Path, problem: str):
        super().__init__(f"Orientation file '{Path(path).name}': {problem}")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pt or .safetensors under their published keys, on the CPU.

    All keys, shapes, dtypes and values are checked; pickled code is refused, never run. Raises
    OrientationCheckpointError where the file is no usable Orient Anything V1.
    """
    if not path.is_file():
        raise OrientationCheckpointError(path, "is not there or is a folder, expected one .pt or .safetensors file.")
    state = _read_pickle(path) if path.suffix.lower() == ".pt" else _read_safetensors(path)
    for key, value in state.items():
        if value.is_floating_point() and not bool((found := value.float().isfinite()).all()):  # in fp32 it computes
            count = int((~found).sum())
            raise OrientationCheckpointError(
                path, f"{key} has {count} of {value.numel()} values that are NaN or infinite. Download it again."
            )
    return state


def _read_pickle(path: Path) -> dict[str, Tensor]:
    fail = partial(OrientationCheckpointError, path)
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise fail("is empty (0 bytes). Download it again.")
    if not start.lstrip().startswith(OF_TORCH) and (kind := signature(start)):
        raise fail(f"is {kind}, expected a .pt file. Download it again.")
    if zipfile.is_zipfile(path):  # torch stores without compression: compressed, gigabytes take a few MB
        try:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            raise fail(f"is a damaged zip archive ({error!s:.160}). Download it again.") from None
        if unpacked > path.stat().st_size:
            raise fail(
                f"unpacks to {unpacked:,} bytes from {path.stat().st_size:,}, expected a .pt file, which is not "
                "compressed. Download the published file."
            )
    if _shares_tuples(path):
        raise fail("holds tuples in tuples, whose use as a key takes for ever. Download the published file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise fail(
            "holds more than tensors, expected a state dict; code in a file is never run "
            f"({str(error).splitlines()[0]:.160}). Download the published file, or save its tensors alone."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise fail(f"cannot be read ({text:.160}). Download it again.") from None
    if not isinstance(state, Mapping) or not state:
        raise fail(f"holds {type(state).__name__}, expected a state dict of tensors. Download it again.")
    strange = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if strange:
        key, value = strange[0], state[strange[0]]
        raise fail(
            f"holds {type(value).__name__} under {key!r}, expected tensors alone. Save the state dict itself, not a "
            "training checkpoint around it."
        )
    _check_keys(path, {key: (tuple(value.shape), value.dtype) for key, value in state.items()})
    return {key: value.clone().contiguous() for key, value in state.items()}  # tensors of a .pt may share memory


def _shares_tuples(path: Path) -> bool:
    """Whether a pickle takes a tuple a second time: sixty times in each other have 2^60 values to hash."""
    try:
        with ExitStack() as stack:
            if zipfile.is_zipfile(path):
                archive = stack.enter_context(zipfile.ZipFile(path))
                names = [name for name in archive.namelist() if name.endswith("data.pkl")]
                files, pickles = [stack.enter_context(archive.open(name)) for name in names], 1
            else:  # before PyTorch 1.6: a magic number, the version, the system, the state dict, the storages' names
                files, pickles = [stack.enter_context(open(path, "rb"))], 5
            return any(_shares_tuple(file) for file in files for _ in range(pickles))
    except (ValueError, OSError, zipfile.BadZipFile, NotImplementedError, EOFError):  # it is refused further on
        return False


def _shares_tuple(file: IO[bytes]) -> bool:
    """The same of the next pickle in an open file."""
    tuples, top = set(), False  # the tuples that are kept, and whether the top of the stack is one
    for code, value, _ in pickletools.genops(file):
        if "PUT" in code.name and top:
            tuples.add(value)
        elif "GET" in code.name and value in tuples:
            return True
        elif "PUT" not in code.name:
            top = "TUPLE" in code.name
    return False


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = read_header(path).tensors
    except SafetensorsError as error:
        raise OrientationCheckpointError(path, f"cannot be read: it {error.problem}") from None
    _check_keys(path, {key: (tensor.shape, FILE_DTYPES.get(tensor.dtype)) for key, tensor in tensors.items()})
    return load_file(path)


def _check_keys(path: Path, found: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]) -> None:
    """Raises unless keys, shapes and dtypes are those of one of the published layouts."""
    fail = partial(OrientationCheckpointError, path)
    cls, first = BACKBONE + "embeddings.cls_token", HEAD + "net1.0.weight"
    if cls not in found or first not in found or not found[cls][0] or len(found[first][0]) != 2:
        raise fail(f"is no Orient Anything V1: {_what_is_it(found)}")
    width, out = found[cls][0][-1], found[first][0][0]
    if width not in SIZES:
        known = ", ".join(f"{width} ({name})" for width, (name, _) in SIZES.items())
        raise fail(f"{cls} is {width} wide, expected {known}. Take one of the published files.")
    try:
        rotation_bins(out)
    except ValueError as error:
        raise fail(f"{first}: {error} Take one of the published files.") from None
    size, layers = SIZES[width]
    expected = published_shapes(width, layers, out)
    missing = [key for key in expected if key not in found and not key.endswith(TRAINING_ONLY)]
    extra = [key for key in found if key not in expected]
    what = f"Orient Anything V1 {size} ({layers} layers)"
    if missing:
        also = f" It has {extra[0]!r} instead: it was written by other code." if extra else ""
        raise fail(f"{len(missing)} key(s) of {what} are missing, such as {missing[0]!r}.{also} Download it again.")
    if extra:
        raise fail(f"{len(extra)} key(s) do not belong to {what}, such as {extra[0]!r}. Download it again.")
    for key, (shape, dtype) in found.items():
        if shape != expected[key]:
            raise fail(f"{key} has shape {list(shape)}, expected {list(expected[key])} for {what}. Download it again.")
        floating = dtype is not None and dtype.is_floating_point and dtype.itemsize > 1
        if not floating and not key.endswith(TRAINING_ONLY):
            raise fail(f"{key} does not hold floating-point numbers. Download it again.")


def _what_is_it(keys: Mapping) -> str:
    """A guess at what a file without Orient Anything's keys is, and what to do."""
    if any(key.startswith("vggt.") for key in keys):
        return "it is Orient Anything V2, another network. Take a V1 file, small, base or large."
    if any("lora" in key.lower() for key in keys):
        return "it looks like a LoRA. Put it into models/loras."
    if any(key.startswith("encoder.layer.") or key.startswith("blocks.") for key in keys):
        return "it looks like DINOv2 alone, without the head. Take Orient Anything's own file."
    for prefix in ("module.", "model.", "state_dict."):
        if any(key.startswith(prefix + BACKBONE) for key in keys):
            return f"its keys begin with {prefix!r}, since it was saved from inside another module. Take that off."
    return (
        f"its first key is {next(iter(keys), None)!r}, expected keys under {BACKBONE!r} and {HEAD!r}. Take one of the "
        "published files."
    )
