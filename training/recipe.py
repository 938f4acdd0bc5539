"""A training run's settings: sections of plain values, from TOML or from the node, each checked when it is read.

What the paper leaves open is an option here; its help says where the default is the paper's, by its tables as
a third party transcribed them; else it is our choice, see docs/training.md.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..common.files import path_problem
from ..dla.config import MODALITIES, POOLINGS, SCORES, TEMPLATES, DLAConfig
from ..dla.features import MLLMInfo
from ..loaders.backbones import TRAINED, titles
from .flow import TIMES, WEIGHTINGS

OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
SCHEDULES = ("constant", "cosine")
DTYPES = ("fp32", "bf16", "fp16")
PRECISIONS = ("none", "bf16")
BACKSLASH = (
    "In TOML a backslash in double quotes begins an escape, such as \\n for a new line. Write a Windows path as "
    '\'C:\\data\\cats\', "C:/data/cats" or "C:\\\\data\\\\cats".'
)
LONGEST = 2**15  # characters of TOML: dotted keys take time and memory by the square; every setting once has 8,000
STEPS = {1: 25_000, 2: 10_000}  # the paper's


class RecipeError(ValueError):
    """A setting that cannot be used: which one, what was found, what is expected."""


def option(default: Any, help: str, *, low=None, high=None, among: tuple = ()):
    """Makes a field with its meaning and its bounds."""
    keywords = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": help, "low": low, "high": high, "among": among}, **keywords)


@dataclass(frozen=True)
class Models:
    """File names as the host lists them. A node has sockets instead."""

    diffusion_model: str = option("", f"{titles(TRAINED)}; under models/diffusion_models")
    weight_dtype: str = option("default", "storage of the DiT's weights", among=("default", "fp8_e4m3fn", "fp8_e5m2"))
    vae: str = option("", "under models/vae")
    mllm: str = option("", "a Hugging Face folder under models/mllm")
    mllm_weight_dtype: str = option(
        "default", "storage of the MLLM's", among=("default", "bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2", "fp32")
    )
    text_encoder: str = option("", "in place of mllm: the host's text encoder, under models/text_encoders")
    text_encoder_type: str = option("qwen_image", "its type in the host's Load CLIP; see MLLM from CLIP")
    clip: str = option("", "FLUX.1: CLIP-L under models/text_encoders, for the pooled vector; empty = zeros")
    t5: str = option("", "FLUX.1: the T5 that the host loads beside it")


@dataclass(frozen=True)
class Aggregator:
    """A new DLA. Ignored where training starts from one (run.start_dla)."""

    pooling: str = option("softmax", "softmax = the paper's, linear = UniFusion's", among=POOLINGS)
    scores: str = option("heads", "of softmax: from attention's heads, or states behind it as 0.1.0", among=SCORES)
    modalities: str = option("dual", "dual = the paper's, shared = one pooling, last = none", among=MODALITIES)
    heads: int = option(0, "attention heads over layers; 0 = one for every 128 channels", low=0, high=4096)
    blocks: int = option(0, "attention blocks over layers; 0 = 1 for softmax, 2 for linear", low=0, high=64)
    refiner_blocks: int = option(0, "blocks over tokens behind the pooling; UniFusion has 2", low=0, high=64)
    layer_subset: list = option([], "layer numbers to pool; empty = all")
    before_norm: bool = option(False, "the last layer before its norm, as Qwen-Image 2.1 reads it; from text_encoder")
    template: str = option("auto", "what becomes of template tokens", among=TEMPLATES)
    vit_blend: float = option(0.0, "share of layer 0 at image tokens", low=0, high=1)


@dataclass(frozen=True)
class Adapter:
    """A LoRA on the DiT."""

    rank: int = option(0, "LoRA on the DiT's attention; 0 = none. The paper has 512", low=0, high=4096)
    alpha: float = option(0.0, "its scale is alpha / rank; 0 = rank", low=0, high=65536)
    learning_rate: float = option(1e-4, "the LoRA's own", low=0, high=1)


@dataclass(frozen=True)
class Data:
    """Examples, and how they are encoded."""

    source: str = option("", "a folder of subjects, a UNO-style .json or .jsonl list, or .tar shards")
    validation: float = option(0.1, "share of subjects held out", low=0, high=0.9)
    validation_source: str = option("", "held-out examples from a source of their own instead")
    resolution: int = option(512, "side in px of the square that has the targets' area", low=64, high=4096)
    reference_size: int = option(0, "longest side of a reference in px; 0 = the DiT family's default", low=0, high=4096)
    mllm_image_size: int = option(0, "side in px at which the MLLM sees a reference; 0 = its default", low=0, high=4096)
    mllm_images: bool = option(True, "the MLLM reads prompt and references together; false = the prompt alone")
    max_references: int = option(4, "most references of one example", low=1, high=10)
    pairs_per_target: int = option(4, "folders: how many references each target is paired with in turn", low=1, high=64)
    cache_features: bool = option(False, "keep the MLLM's features on disk; the run logs their size before it begins")
    encode_ahead: int = option(16, "examples encoded while the MLLM is on the device", low=1, high=65536)


@dataclass(frozen=True)
class Training:
    """Training stage, optimizer and loss."""

    stage: int = option(1, "1 = MLLM tokens alone; 2 = MLLM and VAE tokens", low=1, high=2)
    steps: int = option(0, "optimiser steps; 0 = the paper's 25,000 and 10,000", low=0, high=10_000_000)
    batch_size: int = option(1, "examples in one pass through the DiT", low=1, high=4096)
    accumulate: int = option(1, "passes whose gradients make one step", low=1, high=4096)
    learning_rate: float = option(1e-4, "the DLA's", low=0, high=1)
    gate_rate: float = option(
        10.0, "factor on it for softmax pooling's gate and scores, which start at 0", low=0, high=1e4
    )
    warmup: int = option(100, "steps over which the rates rise from 0", low=0, high=1_000_000)
    schedule: str = option("constant", "of the rates after that; cosine ends at 0", among=SCHEDULES)
    optimizer: str = option("adamw", "the 8-bit ones need the package bitsandbytes", among=OPTIMIZERS)
    weight_decay: float = option(0.01, "not on gate, scores and layer weights", low=0, high=1)
    clip_norm: float = option(1.0, "largest norm of all gradients together; 0 = no limit", low=0, high=1e6)
    mllm_only: float = option(0.35, "stage 2: share of passes without VAE tokens", low=0, high=1)
    vae_only: float = option(0.2, "stage 2 with a LoRA: share of passes without MLLM tokens", low=0, high=1)
    drop_prompt: float = option(
        0.1, "share of examples with an empty prompt and no pictures for the MLLM, for CFG", low=0, high=1
    )
    times: str = option("logit_normal", "distribution of flow times before the shift", among=TIMES)
    shift: float = option(0.0, "t -> s t / (1 + (s - 1) t); 0 = the DiT's own", low=0, high=1000)
    weighting: str = option("none", "of the loss over flow time", among=WEIGHTINGS)
    guidance: float = option(1.0, "guidance of FLUX.1-dev and FLUX.2-dev while training, as UNO", low=0, high=100)
    checkpointing: bool = option(True, "compute each block again in the backward pass, for memory")
    mixed_precision: str = option(
        "none", "bf16: products in bf16 whatever the weights' type; for processors that have them", among=PRECISIONS
    )
    seed: int = option(0, "of everything random", low=0, high=2**63 - 1)


@dataclass(frozen=True)
class Run:
    """Names, files, validation and samples."""

    name: str = option("my-dla", "of the run's folder, the DLA and the LoRA")
    start_dla: str = option("", "start from this DLA, under models/dla (stage 2: stage 1's)")
    start_lora: str = option("", "start from this LoRA, under models/loras, of the same rank")
    save_every: int = option(500, "steps between checkpoints; 0 = at the end alone", low=0)
    keep: int = option(2, "how many of the newest checkpoints are kept", low=1, high=1000)
    validate_every: int = option(500, "steps between validations; 0 = never", low=0)
    validation_examples: int = option(16, "held-out examples that are validated on", low=1, high=100_000)
    sample_every: int = option(500, "steps between sample pictures; 0 = never", low=0)
    samples: int = option(2, "how many examples", low=1, high=16)
    sample_steps: int = option(20, "sampler steps of one", low=1, high=1000)
    sample_cfg: float = option(2.5, "CFG of one; the paper's", low=0, high=100)
    dtype: str = option("bf16", "of the weights in the finished files; checkpoints are fp32", among=DTYPES)


@dataclass(frozen=True)
class Recipe:
    """All settings of a run."""

    models: Models = Models()
    dla: Aggregator = Aggregator()
    lora: Adapter = Adapter()
    data: Data = Data()
    training: Training = Training()
    run: Run = Run()

    def __post_init__(self):
        for section in fields(self):
            for item in fields(getattr(self, section.name)):
                _check(section.name, item, getattr(getattr(self, section.name), item.name))
        name = self.run.name
        plain = name.isprintable() and not set(name) & set('\\/:*?"<>|') and name == name.strip(" .")
        if not name or not plain or len(name) > 100 or path_problem(name):
            raise RecipeError(
                f"run.name is {name!r:.200}, expected a file name such as 'my-dla': without folders, without dots or "
                "blanks at its ends, at most 100 letters and 200 bytes, none that Windows keeps for devices (CON, NUL)."
            )
        if self.training.mllm_only + self.training.vae_only > 1:
            raise RecipeError(
                f"training.mllm_only {self.training.mllm_only} and training.vae_only {self.training.vae_only} are "
                "shares of the same passes, expected a sum of at most 1."
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.training.steps or STEPS[self.training.stage]

    @property
    def shares(self) -> dict[str, float]:
        """Share of the passes by condition ("mllm", "vae", "both")."""
        if self.training.stage == 1:
            return {"mllm": 1.0}
        vae = self.training.vae_only if self.lora.rank else 0.0  # without a LoRA such a pass trains nothing
        return {"mllm": self.training.mllm_only, "vae": vae, "both": 1 - self.training.mllm_only - vae}

    def dla_config(self, mllm: MLLMInfo, context_width: int, family: str) -> DLAConfig:
        """Returns the config of a new DLA. Raises RecipeError where the settings do not fit the MLLM."""
        values = asdict(self.dla)
        values["heads"] = values["heads"] or (mllm.width // 128 if mllm.width % 128 == 0 else 1)
        values["blocks"] = values["blocks"] or None
        values["layer_subset"] = tuple(values["layer_subset"]) or None
        try:
            return DLAConfig(mllm=mllm, context_width=context_width, dit=family, **values)
        except ValueError as error:
            raise RecipeError(f"[dla] {error}") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Reads nested dictionaries, as TOML gives them. Raises RecipeError for an unknown or bad entry."""
        sections = {}
        known = {f.name: f.default for f in fields(cls)}
        for name, entries in values.items():
            if name not in known:
                raise RecipeError(f"Recipe: unknown section [{name}], expected {', '.join(f'[{k}]' for k in known)}.")
            if not isinstance(entries, dict):
                raise RecipeError(f"Recipe: {name} is {entries!r:.80}, expected a section [{name}] with settings.")
            kind, names = type(known[name]), [f.name for f in fields(known[name])]
            if unknown := sorted(set(entries) - set(names)):
                raise RecipeError(f"[{name}] has no {unknown[0]!r}, expected {', '.join(names)}.")
            sections[name] = kind(**entries)
        return cls(**sections)

    @classmethod
    def from_widgets(cls, source: Path, name: str, options: str, values: dict[str, Any]) -> Recipe:
        """Reads a node's inputs: `values` by their names in any section, overridden by `options`, which is TOML."""
        sections: dict[str, dict] = {"data": {"source": str(source)}, "run": {"name": name}}
        for section in fields(cls):
            others = {"learning_rate"} if section.name == "lora" else set()
            here = {f.name for f in fields(section.default)} & set(values) - others
            sections.setdefault(section.name, {}).update({key: values[key] for key in here})
        for section, entries in read_toml(options, "options").items():
            if section == "models" or not isinstance(entries, dict) or section not in sections:
                raise RecipeError(
                    f"options: {section!r} is no setting of a run here, expected lines such as training.warmup = 50, "
                    f"of the sections {', '.join(k for k in sections if k != 'models')}."
                )
            if section == "data" and {"source", "validation_source"} & set(entries):
                raise RecipeError(
                    "options: data.source is the input `data` here; hold out with data.validation instead."
                )
            sections[section].update(entries)
        return cls.from_dict(sections)

    def to_dict(self) -> dict[str, Any]:
        """Returns what `from_dict` reads."""
        return asdict(self)


def read_toml(text: str, path: str = "recipe") -> dict[str, Any]:
    """Parses a TOML text into nested dictionaries. Raises RecipeError with `path`."""
    if not text.strip():
        return {}  # on Python 3.10 too
    if len(text) > LONGEST:
        raise RecipeError(f"{path}: has {len(text):,} characters, expected at most {LONGEST:,} of TOML.")
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib
        except ImportError:
            raise RecipeError(f"{path}: reading TOML needs Python 3.11 or newer, or the package tomli.") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        number = next(iter(re.findall(r"line (\d+)", str(error))), "0")
        lines = ["", *text.splitlines(), ""]
        hint = f" {BACKSLASH}" if re.search(r'"[^"]*\\', lines[min(int(number), len(lines) - 1)]) else ""
        raise RecipeError(f"{path}: not TOML ({error}).{hint}") from None
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise RecipeError(f"{path}: not TOML that can be read ({error}).") from None


def template() -> str:
    """Returns every setting with its default and its meaning, as TOML."""
    lines = []
    for section in fields(Recipe):
        lines.append(f"[{section.name}]")
        for item in fields(section.default):
            text = json.dumps(getattr(section.default, item.name))  # as TOML writes it, too
            among = f" ({', '.join(item.metadata['among'])})" if item.metadata["among"] else ""
            lines.append(f"{item.name} = {text}  # {item.metadata['help']}{among}")
        lines.append("")
    return "\n".join(lines)


def _check(section: str, item, value: Any) -> None:
    default = item.default if item.default_factory is field().default_factory else item.default_factory()
    kind, bounds = type(default), item.metadata
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}[kind]
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if fits and kind is str and item.name != "name" and any(ord(letter) < 32 for letter in value):
        raise RecipeError(f"{section}.{item.name} is {value!r:.200}, which has control characters. {BACKSLASH}")
    if fits and bounds["among"]:
        expected, fits = f"one of {', '.join(bounds['among'])}", value in bounds["among"]
    if fits and bounds["low"] is not None:
        top = bounds["high"] if bounds["high"] is not None else float("inf")
        expected += f" from {bounds['low']:g}" + (f" to {top:g}" if top < float("inf") else " up")
        fits = bounds["low"] <= value <= top
    if not fits:
        large = isinstance(value, int) and value.bit_length() > 128  # Python writes no thousands of digits
        found = f"a number of {value.bit_length():,} bits" if large else repr(value)
        raise RecipeError(f"{section}.{item.name} is {found}, expected {expected} ({bounds['help']}).")
