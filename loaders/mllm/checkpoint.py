"""Hugging Face folders: config, weight headers, keys and tokenizer, all checked before any weight is read."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...common.dtypes import UNQUANTIZED
from ...dla.features import MLLMInfo
from .. import weight_folders
from ..weight_folders import QUANTIZED, TOGETHER, Headers
from .base import MLLMError
from .families import FAMILIES, FOLDER_FAMILIES, MLLMFamily


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder whose model type is supported, cleaned. Raises MLLMError."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise MLLMError(
            f"{folder} is not a folder, expected a Hugging Face folder with config.json, tokenizer and *.safetensors. A"
            " single-file text encoder goes through the host's CLIP loader and MLLM from CLIP."
        )
    if not path.is_file():
        raise MLLMError(f"{folder} has no config.json, expected a whole Hugging Face folder. Download it again.")
    try:
        config = weight_folders.read_config(folder)
    except ValueError as error:
        raise MLLMError(f"{error}. Download it again.") from None
    found = config.get("model_type")
    if found not in FOLDER_FAMILIES:
        hint = " Take the repository whose name ends in -hf." if found == "internvl_chat" else ""
        raise MLLMError(f"{path}: model_type is {found!r:.60}, expected one of {', '.join(FOLDER_FAMILIES)}.{hint}")
    return config


def read_info(folder: Path) -> MLLMInfo:
    """Which MLLM a Hugging Face folder holds, from its config.json alone. Raises MLLMError."""
    config = read_config(folder)
    text = config.get("text_config", config)  # Qwen2.5-VL as published keeps these at the top
    for field in ("num_hidden_layers", "hidden_size"):
        if type(text.get(field)) is not int:
            raise MLLMError(f"{folder / 'config.json'}: {field} is {text.get(field)!r:.60}, expected a whole number.")
    try:
        return FAMILIES[config["model_type"]].info(folder.name, text["num_hidden_layers"], text["hidden_size"])
    except ValueError as error:  # sizes that no MLLM has
        raise MLLMError(f"{folder / 'config.json'}: {error} Download the folder again.") from None


EMBEDDING = "language_model.embed_tokens.weight"


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


def check_keys(
    headers: Headers, expected: dict[str, tuple], ignored: tuple[str, ...] = (), tied: bool = False
) -> dict[str, str]:
    """The backbone's name of each key of the checkpoint that is used.

    Args:
        headers: Of the checkpoint's keys.
        expected: Shapes of the backbone's keys.
        ignored: Beginnings of unused ones.
        tied: Whether the embedding may be given as the head alone, which has the same weights.

    Raises:
        MLLMError: A key is missing, unknown, of another shape, there twice, or quantised.
    """
    names = {key: name for key in headers if (name := rename(key)) and not name.startswith(ignored)}
    if tied and EMBEDDING not in names.values():
        names |= {key: EMBEDDING for key in headers if re.fullmatch(r"(\w+\.)*lm_head\.weight", key)}
    if key := next((key for key, name in names.items() if name not in expected and QUANTIZED.search(key)), None):
        raise MLLMError(
            f"{headers[key][0]}: key {key!r} is of quantised weights. Quantised repositories (FP8, AWQ, GPTQ,"
            " bitsandbytes, compressed-tensors) are not read: take the original one; weight_dtype makes it fp8 while"
            " loading."
        )
    found: dict[str, str] = {}
    for key, name in names.items():
        path, header = headers[key]
        if name not in expected:
            raise MLLMError(f"{path}: unknown key {key!r} {header.shape}. {TOGETHER}")
        if header.shape != expected[name]:
            raise MLLMError(
                f"{path}: {key!r} has shape {header.shape}, expected {expected[name]} by config.json. {TOGETHER}"
            )
        if header.dtype not in UNQUANTIZED:
            raise MLLMError(
                f"{path}: {key!r} is {header.dtype}, expected one of {', '.join(UNQUANTIZED)}. Take the"
                " unquantised repository; weight_dtype makes it fp8 while loading."
            )
        if name in found:
            raise MLLMError(f"{path}: {key!r} and {found[name]!r} are the same weights, expected one. Download again.")
        found[name] = key
    missing = [name for name in expected if name not in found]
    if missing:
        files = ", ".join(sorted({path.name for path, _ in headers.values()}))
        where = next(iter(headers.values()))[0].parent if headers else ""
        raise MLLMError(
            f"{where}: {files or 'the files'} lack {len(missing)} of {len(expected)} keys, first {missing[0]!r},"
            f" expected shape {expected[missing[0]]}. Download all shards."
        )
    return names


def read_tokenizer(folder: Path, config: dict, family: MLLMFamily) -> tuple[Callable[[str], list[int]], int]:
    """The folder's tokenizer (a text to its ids), and the id of the image placeholder. Raises MLLMError.

    tokenizer.json is read by the `tokenizers` library itself: transformers reads it differently between its releases.
    """
    fast = folder / "tokenizer.json"
    try:
        weight_folders.check_tokenizer(folder)
    except ValueError as error:
        raise MLLMError(str(error)) from None
    if fast.is_file():
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(fast))
        except BaseException as error:  # also its own PanicException
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise MLLMError(f"{fast} is damaged ({error!s:.200}). Download it again.") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()

        def tokenize(text: str) -> list[int]:
            try:
                return tokenizer.encode(text, add_special_tokens=False).ids
            except BaseException as error:  # as above: a worker of the host would end by it
                if isinstance(error, (KeyboardInterrupt, SystemExit)):
                    raise
                raise MLLMError(f"{fast} does not split this prompt ({error!s:.200}). Download it again.") from error

    else:
        from transformers import Qwen2Tokenizer  # and no class that a file names

        try:
            slow = Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:
            raise MLLMError(f"{folder}: its tokenizer is damaged ({error!s:.200}). Download it again.") from error

        def tokenize(text: str) -> list[int]:
            return slow(text, add_special_tokens=False)["input_ids"]

    placeholder, expected = family.placeholder, config.get("image_token_id", config.get("image_token_index"))
    for token in filter(None, (placeholder, family.start, *family.markers)):
        ids = tokenize(token)
        if len(ids) != 1 or (token == placeholder and expected is not None and ids[0] != expected):
            want = expected if token == placeholder else "one id"
            raise MLLMError(
                f"{folder}: the tokenizer reads {token} as {ids!s:.60}, expected {want!s:.60} by config.json. Tokenizer"
                " and model do not belong together: download both from one repository."
            )
    return tokenize, tokenize(placeholder)[0]
