"""What a DLA is built from, and what it belongs to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .features import MLLMInfo, is_whole

POOLINGS = ("softmax", "linear")
SCORES = ("heads", "states")
MODALITIES = ("dual", "shared", "last")
TEMPLATES = ("auto", "keep", "drop")
FORMAT_VERSION = 1
OF_0_1_0 = {"before_norm": False, "scores": "states"}  # entries that 0.1.0 lacks, and what it does


@dataclass(frozen=True)
class DLAConfig:
    """Everything needed to build a DLA and to know what it belongs to; stored as JSON in its file."""

    mllm: MLLMInfo  # the MLLM whose features it was trained on
    context_width: int  # channels of the DiT's context tokens
    dit: str = ""  # DiT family, a name in loaders/backbones such as "flux"; "" = any of that context width
    pooling: str = "softmax"  # "softmax" or "linear", see LayerwiseAttentionPooling
    # of softmax, else "states": "heads", see HeadScoredPooling, or "states" behind the attention, as in 0.1.0
    scores: str = "heads"
    modalities: str = "dual"  # "dual" | "shared" (one pooling for all tokens) | "last" (no pooling: the last layer)
    heads: int = 8
    blocks: int | None = None  # over the layer axis; None = 1 for softmax, 2 for linear
    refiner_blocks: int = 0  # bidirectional, over the token axis; UniFusion has 2
    layer_subset: tuple[int, ...] | None = None  # layer numbers pooled, ascending; None = all, 0..L
    before_norm: bool = False  # the last layer is pooled before the final norm, as number L + 1 in the place of L
    template: str = "auto"  # "auto" | "keep" | "drop" the template tokens, see kept_tokens
    vit_blend: float = 0.0  # share of layer 0 (the ViT's features) at image tokens
    provenance: dict[str, Any] = field(default_factory=dict, hash=False)  # training settings, free JSON
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        def expect(valid: bool, name: str, expected: str) -> None:
            if not valid:
                raise ValueError(f"DLA config: {name} is {getattr(self, name)!r:.100}, expected {expected}.")

        expect(self.format_version == FORMAT_VERSION, "format_version", f"{FORMAT_VERSION}; a newer pack may read it")
        expect(isinstance(self.mllm, MLLMInfo), "mllm", "an MLLMInfo")
        expect(is_whole(self.context_width, 1, 65536), "context_width", "a whole number from 1 to 65536")
        expect(isinstance(self.dit, str) and len(self.dit) < 256, "dit", 'a family name such as "flux", or "" for any')
        expect(self.pooling in POOLINGS, "pooling", f"one of {', '.join(POOLINGS)}")
        expect(self.scores in SCORES, "scores", f"one of {', '.join(SCORES)}")
        expect(self.modalities in MODALITIES, "modalities", f"one of {', '.join(MODALITIES)}")
        if self.pooling != "softmax" or self.modalities == "last":  # nothing is scored: a file that 0.1.0 reads
            object.__setattr__(self, "scores", OF_0_1_0["scores"])
        if self.blocks is None:
            object.__setattr__(self, "blocks", 1 if self.pooling == "softmax" else 2)
        expect(is_whole(self.blocks, 1, 64), "blocks", "a whole number from 1 to 64")
        expect(is_whole(self.refiner_blocks, 0, 64), "refiner_blocks", "a whole number from 0 to 64")
        divides = is_whole(self.heads, 1, self.mllm.width) and self.mllm.width % self.heads == 0
        expect(divides, "heads", f"a divisor of the MLLM's width {self.mllm.width}")
        expect(isinstance(self.before_norm, bool), "before_norm", "true or false")
        if (subset := self.layer_subset) is not None:
            valid = isinstance(subset, (tuple, list)) and len(subset) > 0
            valid = valid and all(is_whole(layer, 0, self._top) for layer in subset)
            valid = valid and list(subset) == sorted(set(subset))
            expect(valid, "layer_subset", f"ascending layer numbers from 0 to {self._top}")
            object.__setattr__(self, "layer_subset", tuple(subset))
        expect(self.template in TEMPLATES, "template", f"one of {', '.join(TEMPLATES)}")
        share = isinstance(self.vit_blend, (int, float)) and 0 <= self.vit_blend <= 1
        expect(share, "vit_blend", "a number from 0 to 1")
        expect(isinstance(self.provenance, dict), "provenance", "a JSON object")

    @property
    def pooled_layers(self) -> tuple[int, ...]:
        """Layer numbers that are pooled, ascending. A new DLA is exactly the highest of them."""
        if self.layer_subset is not None:
            return self.layer_subset if self.modalities != "last" else self.layer_subset[-1:]
        return (self._top,) if self.modalities == "last" else (*range(self.mllm.layers), self._top)

    @property
    def _top(self) -> int:
        return self.mllm.layers + self.before_norm

    @property
    def required_layers(self) -> tuple[int, ...]:
        """Layer numbers that the features must hold for this DLA (the pooled ones, and layer 0 for a ViT blend)."""
        return tuple(sorted({*self.pooled_layers, *((0,) if self.vit_blend else ())}))

    def check_mllm(self, info: MLLMInfo) -> None:
        """Raises ValueError unless features of `info` are what this DLA was trained on; names may differ."""
        for name in ("family", "layers", "width"):
            if getattr(info, name) != getattr(self.mllm, name):
                raise ValueError(
                    f"This DLA belongs to {self.mllm}, the features come from {info}: {name} "
                    f"{getattr(info, name)}, expected {getattr(self.mllm, name)}. Load {self.mllm.name} as the MLLM, "
                    f"or a DLA trained on {info.name}, or train one."
                )

    def to_dict(self) -> dict[str, Any]:
        """The config in plain JSON types."""
        # 0.1.0 reads what it can do
        return {name: value for name, value in asdict(self).items() if (name, value) not in OF_0_1_0.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DLAConfig:
        """The inverse of to_dict. Raises ValueError that names an unknown, missing or bad entry."""
        known, values = {f.name for f in fields(cls)}, dict(values)
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"DLA config: unknown entry {unknown[0]!r:.100}, expected only {', '.join(sorted(known))}."
            )
        for name in ("mllm", "context_width"):
            if name not in values:
                raise ValueError(f"DLA config: entry {name!r} is missing.")
        mllm = values["mllm"]
        if not isinstance(mllm, dict):
            raise ValueError(
                f"DLA config: mllm is {mllm!r:.100}, expected an object with name, family, layers and width."
            )
        known = {f.name for f in fields(MLLMInfo)}
        if wrong := sorted({"name", "family", "layers", "width"} - set(mllm)) or sorted(set(mllm) - known):
            raise ValueError(
                f"DLA config: mllm entry {wrong[0]!r:.100} is {'unknown' if wrong[0] in mllm else 'missing'}."
            )
        return cls(**{**OF_0_1_0, **values, "mllm": MLLMInfo(**mllm)})
