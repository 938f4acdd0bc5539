"""Hugging Face folders from elsewhere: config.json and headers, checked against each other before anything is built."""

import math
import os
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path, PureWindowsPath
from typing import Any

import torch

from ..common.dtypes import UNQUANTIZED
from ..common.files import DataError, file_problem, read_bytes
from ..common.safetensors_header import TensorHeader, read_header
from ..common.untrusted_json import JSONError, parse_json, read_json

Headers = dict[str, tuple[Path, TensorHeader]]  # of every key: its file, its dtype and shape

TEXTS = 256 * 2**20  # bytes of a tokenizer's file at most; Gemma's has 33 MB
# What a config.json may not choose: code, attention (it may name a repository of code), other folders.
CHOSEN_HERE = ("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
               "_attn_implementation_autoset", "_name_or_path", "experts_implementation", "_experts_implementation",
               "quantization_config", "compression_config", "kernel_config",
               # and what the library's classes would answer in another form, or of which they make as many entries
               "num_labels", "id2label", "label2id", "return_dict", "torchscript")  # fmt: skip
DTYPES = ("torch_dtype", "dtype")
TOGETHER = "Weights and config.json do not belong together: download both from one repository."
QUANTIZED = re.compile(r"scale|qweight|qzeros|absmax|quant_|g_idx|SCB|weight_(format|packed|shape|zero_point)")
LAYERS = re.compile(r"(num_hidden_layers|num_layers|depth)$")
# what sizes a weight or a buffer
SIZES = re.compile(
    r"(hidden_size\w*|intermediate_size|vocab_size\w*|_dim|_heads|_channels|in_chans|patch_size|merge_size|image_size"
    r"|pooling_kernel_size|num_position_embeddings|num_register_tokens)$"
)
MAY_BE_0 = re.compile(r"register|per_layer_input|global|mtp")
# the largest finite number's bits without its sign
LAST_FINITE = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7B}
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # the files of one
TOKENIZER_PATHS = ("vocab_file", "merges_file", "tokenizer_file")  # in tokenizer_config.json
MOST_LONGER = 64  # times that a tokenizer may make a text longer before it splits it
MOST_LAYERS = 1024  # as in dla/features.py:MLLMInfo
HARMLESS_LAYERS, HARMLESS = 128, 4096  # sizes that take no time or memory worth speaking of, whatever they are of
_checked: set[bytes] = set()  # digests of tokenizer.json files without a fault


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, without what a file from elsewhere may not choose.

    Raises:
        DataError: It is no usable config, or a file beside it is no regular one: libraries would open it and wait.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".txt", ".model", ".safetensors", ".jinja") and not path.name.startswith("."):
            if problem := file_problem(path):
                raise DataError(f"{path} {problem} Download it again.")
            if path.suffix != ".safetensors" and path.stat().st_size > TEXTS:
                raise DataError(f"{path} has {path.stat().st_size:,} bytes, expected at most {TEXTS:,}.")
    config = read_json(folder / "config.json")
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part, {}), dict):
            raise DataError(f"{folder / 'config.json'}: {part} is {config[part]!r:.60}, expected an object.")
    return _cleaned(config)


def check_tokenizer(folder: Path) -> None:
    """Raises DataError for a folder without a tokenizer (transformers 5 makes an empty one), or with a hostile one."""
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZERS):
        raise DataError(
            f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt. Download them."
        )
    path = folder / "tokenizer_config.json"
    values = read_json(path) if path.is_file() else {}
    for name in TOKENIZER_PATHS:  # transformers 4 opens what they name
        value = values.get(name)
        if isinstance(value, str) and os.path.exists(value) and Path(value).resolve().parent != folder.resolve():
            raise DataError(f"{path}: {name} is {value!r:.100}, expected a file of its own folder. Remove that line.")
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    data = read_bytes(file, TEXTS)
    if (digest := sha256(data).digest()) in _checked:
        return  # the published ones have 11 MB, which takes longer to parse than all else here
    try:
        found = parse_json(data, longest=TEXTS)
    except JSONError as error:
        raise DataError(f"{file} {error}") from None
    longer = _longer([found.get(part) for part in ("normalizer", "pre_tokenizer")])
    if longer > MOST_LONGER:
        raise DataError(
            f"{file} makes a text up to {longer:.3g} times as long, expected at most {MOST_LONGER} times. Download it "
            "again."
        )
    _checked.add(digest)


def _cleaned(value: Any) -> Any:
    """A config, or a part of it, without CHOSEN_HERE, and with dtypes as torch names them."""
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _cleaned(item) for key, item in value.items() if key not in (*CHOSEN_HERE, *DTYPES)}
    for key in DTYPES:
        name = str(value.get(key)).removeprefix("torch.")
        if isinstance(getattr(torch, name, None), torch.dtype) and getattr(torch, name).is_floating_point:
            found[key] = name  # else the weights' own, see with_dtype
    return found


def with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A config that says a dtype: its own, or this one of its weights, as transformers reads "auto"."""
    return config if any(key in config for key in DTYPES) else config | {"torch_dtype": str(dtype).split(".")[1]}


def read_headers(folder: Path) -> Headers:
    """Header of every key, from model.safetensors or the shards of its index. Raises DataError, SafetensorsError."""
    index, places = folder / "model.safetensors.index.json", {}
    if (folder / "model.safetensors").is_file():  # first, as transformers does: an index beside it is of other files
        files = [folder / "model.safetensors"]
    elif index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise DataError(f"{index}: weight_map is {places!r:.60}, expected files by keys. Download it again.")
        for name in places.values():
            if not isinstance(name, str) or PureWindowsPath(name).name != name or not name.endswith(".safetensors"):
                raise DataError(
                    f"{index} names {name!r:.60}, expected .safetensors files in its own folder. Download it again."
                )
        files = [folder / name for name in sorted(set(places.values()))]
        for path in files:
            if not path.is_file():
                raise DataError(f"{path} is missing: {index.name} lists it, one of {len(files)} files. Download it.")
    else:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
                raise DataError(
                    f"{folder} has weights only as pickles (.bin), which can run code and are not loaded. Take the"
                    " repository's safetensors revision, or convert with transformers' save_pretrained."
                )
            raise DataError(f"{folder} has no *.safetensors. Download the weights (all shards) into it.")
        if len(files) > 1:
            raise DataError(f"{folder} has {len(files)} *.safetensors but no {index.name}. Download the index too.")
    headers: Headers = {}
    for path in files:
        for key, header in read_header(path).tensors.items():
            if places.get(key, path.name) == path.name:
                headers[key] = (path, header)
    if not headers:
        raise DataError(f"{files[0]} holds no tensors. Download it again.")
    return headers


def check_sizes(config: dict[str, Any], headers: Headers, where: Path, positions: bool = False) -> None:
    """Compares a config's sizes with the weights' before anything of these sizes is built.

    It finds those that would take time or memory without end, and what is no size at all; shapes are compared later.

    Args:
        config: As `read_config` gives it.
        headers: Of the weights.
        where: The config's file, for messages.
        positions: Whether max_position_embeddings is a table's size too, as in CLIP.

    Raises:
        DataError: A size is no whole number from 1 on, or far larger than anything in the weights.
    """
    held = {key: header.shape for key, (_, header) in headers.items() if 0 not in header.shape}  # which prove nothing
    layers = len({number for key in held for number in re.findall(r"\.(\d{1,7})(?=\.)", key)})
    widest = max((size for shape in held.values() for size in shape), default=0)
    for name, value in _fields(config):
        last = name.rpartition(".")[2]
        if LAYERS.search(last):
            largest, found = max(min(layers, MOST_LAYERS), HARMLESS_LAYERS), f"the weights have {layers} layers"
        elif SIZES.search(last) or (positions and last == "max_position_embeddings"):
            largest, found = max(widest, HARMLESS), f"no weight is wider than {widest:,}"
        elif last.endswith(("_act", "_activation")):
            if not isinstance(value, str):
                raise DataError(f"{where}: {name} is {value!r:.60}, expected the name of a function. {TOGETHER}")
            continue
        elif last == "partial_rotary_factor" or last.endswith(("_eps", "_theta")):
            most = 1.0 if last != "rope_theta" else math.inf
            if value is not None and (type(value) not in (int, float) or not 0 < value <= most):
                raise DataError(f"{where}: {name} is {value!r:.60}, expected a number above 0, at most {most:g}.")
            continue
        else:
            continue
        least = int(not MAY_BE_0.search(last))
        for size in value if isinstance(value, list) else [value]:
            if size is not None and (type(size) is not int or not least <= size <= largest):
                raise DataError(
                    f"{where}: {name} is {size!r:.60}, expected a whole number from {least:,} to {largest:,}: {found}."
                    f" {TOGETHER}"
                )
    for part in (config, config.get("text_config"), config.get("vision_config")):  # a table of positions
        given = (part.get("image_size"), part.get("patch_size")) if part else ()
        sides: list[Any] = [value[0] if isinstance(value, list) and value else value for value in given]
        if all(sides) and sides and (count := (sides[0] // sides[1]) ** 2) > max(widest, HARMLESS):
            raise DataError(
                f"{where}: image_size is {sides[0]} and patch_size {sides[1]}, {count:,} patches, expected at most "
                f"{max(widest, HARMLESS):,}: no weight is wider than {widest:,}. {TOGETHER}"
            )


def _fields(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The names, behind those of the parts that hold them, and values of a config and its parts."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.") if name != "audio_config" else ()  # which is not built
        yield prefix + name, value


def _longer(part: Any) -> float:
    """How many times as long a part of a tokenizer.json may make a text."""
    if isinstance(part, list):
        return math.prod(map(_longer, part))
    if not isinstance(part, dict):
        return 1.0
    kind, own = part.get("type"), 1.0
    if kind in ("Replace", "Prepend"):
        own += len(str(part.get("content", part.get("prepend"))))
    elif kind == "ByteLevel":  # a letter of two bytes becomes two of two
        own = 2.0
    elif kind == "Precompiled":  # a table that no MLLM here has
        own = math.inf
    return own * math.prod(_longer(part.get(name)) for name in ("normalizers", "pretokenizers"))


def check_finite(path: Path | str, tensors: dict[str, torch.Tensor]) -> None:
    """Raises DataError for weights that are NaN or infinite, which would be a picture of noise, or a black one."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor):
            raise DataError(f"{path}: {key!r} holds values that are NaN or infinite. Download it again.")


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.dtype in LAST_FINITE:  # of which torch has no least and greatest; numpy is twice as fast here
        return int((tensor.view(torch.uint8).numpy(force=True) & 0x7F).max()) <= LAST_FINITE[tensor.dtype]
    return all(bool(end.isfinite()) for end in tensor.aminmax())  # one pass without a copy: NaN passes through both


def check_plain(headers: Headers) -> None:
    """Raises DataError for weights that are no floating-point numbers of 16 or 32 bits."""
    for key, (path, header) in headers.items():
        if header.dtype not in UNQUANTIZED and not key.endswith("position_ids"):
            raise DataError(
                f"{path}: {key!r} is {header.dtype}, expected one of {', '.join(UNQUANTIZED)}. Take the unquantised "
                "repository."
            )
