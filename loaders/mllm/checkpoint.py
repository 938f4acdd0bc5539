"""Hugging Face folders: config, weight headers, keys and tokenizer, all checked before any weight is read."""

import json
import re
from collections.abc import Callable
from pathlib import Path, PureWindowsPath

from ...common.dtypes import UNQUANTIZED
from ...common.safetensors_header import SafetensorsError, TensorHeader, read_header
from ...dla.features import MLLMInfo
from .base import MLLMError
from .families import FAMILIES, FOLDER_FAMILIES, MLLMFamily

Headers = dict[str, tuple[Path, TensorHeader]]  # of every key: its file, its dtype and shape


def read_config(folder: Path) -> dict:
    """config.json of a Hugging Face folder whose model type is supported. Raises MLLMError."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise MLLMError(
            f"{folder} is not a folder, expected a Hugging Face folder with config.json, tokenizer and *.safetensors. A"
            " single-file text encoder goes through the host's CLIP loader and MLLM from CLIP."
        )
    if not path.is_file():
        raise MLLMError(f"{folder} has no config.json, expected a whole Hugging Face folder. Download it again.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MLLMError(f"{path} is not JSON ({error}). Download it again.") from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found not in FOLDER_FAMILIES:
        hint = " Take the repository whose name ends in -hf." if found == "internvl_chat" else ""
        raise MLLMError(f"{path}: model_type is {found!r}, expected one of {', '.join(FOLDER_FAMILIES)}.{hint}")
    return config


def read_info(folder: Path) -> MLLMInfo:
    """Which MLLM a Hugging Face folder holds, from its config.json alone. Raises MLLMError."""
    config = read_config(folder)
    text = config.get("text_config", config)  # Qwen2.5-VL as published keeps these at the top
    for field in ("num_hidden_layers", "hidden_size"):
        if not isinstance(text.get(field), int):
            raise MLLMError(f"{folder / 'config.json'}: {field} is {text.get(field)!r}, expected a whole number.")
    return FAMILIES[config["model_type"]].info(folder.name, text["num_hidden_layers"], text["hidden_size"])


def read_headers(folder: Path) -> Headers:
    """Header of every key, from model.safetensors or the shards of its index. Raises MLLMError for incomplete files."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():  # first, as transformers does: an index beside it is of other files
        files = [folder / "model.safetensors"]
    elif index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise MLLMError(f"{index} is damaged ({error!r}). Download it again.") from error
        if outside := [name for name in names if not isinstance(name, str) or PureWindowsPath(name).name != name]:
            raise MLLMError(f"{index} names {outside[0]!r}, expected files in its own folder. Download it again.")
        files = [folder / name for name in names]
        for path in files:
            if not path.is_file():
                raise MLLMError(f"{path} is missing: {index.name} lists it, one of {len(files)} files. Download it.")
    else:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
                raise MLLMError(
                    f"{folder} has weights only as pickles (.bin), which can run code and are not loaded. Take the"
                    " repository's safetensors revision, or convert with transformers' save_pretrained."
                )
            raise MLLMError(f"{folder} has no *.safetensors. Download the weights (all shards) into it.")
        if len(files) > 1:
            raise MLLMError(f"{folder} has {len(files)} *.safetensors but no {index.name}. Download the index too.")
    headers: Headers = {}
    for path in files:
        try:
            headers |= {key: (path, header) for key, header in read_header(path).tensors.items()}
        except SafetensorsError as error:
            raise MLLMError(str(error)) from None
    return headers


def rename(key: str) -> str | None:
    """The backbone's key for a checkpoint's, None for what the backbone lacks (heads, audio, old RoPE buffers).

    Three layouts exist: "model.layers", "visual" (Qwen2.5-VL as published); "language_model.model", "vision_tower"
    (InternVL as published); "model.language_model", "model.visual" (Qwen3-VL, and what transformers saves since 4.52).
    """
    if re.match(r"(model\.)?(language_model\.)?(lm_head|mtp|audio_tower|embed_audio)\.", key) or key.endswith(
        "rotary_emb.inv_freq"
    ):
        return None
    key = re.sub(r"^model\.(?=(language_model|visual|vision_tower|multi_modal_projector|embed_vision)\.)", "", key)
    key = re.sub(r"^language_model\.model\.", "language_model.", key)
    return re.sub(r"^model\.(?=(embed_tokens|layers|norm)\.)", "language_model.", key)


def check_keys(headers: Headers, expected: dict[str, tuple], ignored: tuple[str, ...] = ()) -> list[str]:
    """The checkpoint's keys that are used; `expected`: shapes of the backbone's; `ignored`: beginnings of unused ones.

    Raises MLLMError for a key that is missing, unknown, of another shape, or quantised.
    """
    found, used = {}, []
    for key, (path, header) in headers.items():
        name = rename(key)
        if name is None or name.startswith(ignored):
            continue
        if name not in expected:
            hint = "Weights and config.json do not belong together: download both from one repository."
            if re.search(r"scale|qweight|qzeros|absmax", key):
                hint = "Quantised repositories (FP8, AWQ, GPTQ) are not read: take the original one."
            raise MLLMError(f"{path}: unknown key {key!r} {header.shape}. {hint}")
        if header.shape != expected[name]:
            raise MLLMError(
                f"{path}: {key!r} has shape {header.shape}, expected {expected[name]} by config.json. Weights"
                " and config.json do not belong together: download both from one repository."
            )
        if header.dtype not in UNQUANTIZED:
            raise MLLMError(
                f"{path}: {key!r} is {header.dtype}, expected one of {', '.join(UNQUANTIZED)}. Take the"
                " unquantised repository; weight_dtype makes it fp8 while loading."
            )
        found[name] = key
        used.append(key)
    missing = [name for name in expected if name not in found]
    if missing:
        files = ", ".join(sorted({path.name for path, _ in headers.values()}))
        where = next(iter(headers.values()))[0].parent if headers else ""
        raise MLLMError(
            f"{where}: {files} lack {len(missing)} of {len(expected)} keys, first {missing[0]!r}, expected shape"
            f" {expected[missing[0]]}. Download all shards."
        )
    return used


def read_tokenizer(folder: Path, config: dict, family: MLLMFamily) -> tuple[Callable[[str], list[int]], int]:
    """The folder's tokenizer (a text to its ids), and the id of the image placeholder. Raises MLLMError.

    tokenizer.json is read by the `tokenizers` library itself: transformers reads it differently between its releases.
    """
    fast = folder / "tokenizer.json"
    if fast.is_file():
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(fast))
        except Exception as error:
            raise MLLMError(f"{fast} is damaged ({error}). Download it again.") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()

        def tokenize(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids

    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)

        def tokenize(text: str) -> list[int]:
            return slow(text, add_special_tokens=False)["input_ids"]

    else:
        raise MLLMError(
            f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt. Download them."
        )
    placeholder, expected = family.placeholder, config.get("image_token_id", config.get("image_token_index"))
    for token in filter(None, (placeholder, family.start, *family.markers)):
        ids = tokenize(token)
        if len(ids) != 1 or (token == placeholder and expected is not None and ids[0] != expected):
            want = expected if token == placeholder else "one id"
            raise MLLMError(
                f"{folder}: the tokenizer reads {token} as {ids}, expected {want} by config.json. Tokenizer and model"
                " do not belong together: download both from one repository."
            )
    return tokenize, tokenize(placeholder)[0]
