"""Dual Layer Aggregator: hidden states of all layers in, one context embedding per token out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .features import Features, MLLMInfo, Modality
from .pooling import LayerwiseAttentionPooling, TorchOperations, TransformerBlock, chunk_length

POOLINGS = ("softmax", "linear")
MODALITIES = ("dual", "shared", "last")
TEMPLATES = ("auto", "keep", "drop")
FORMAT_VERSION = 1
MAX_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class DLAConfig:
    """Everything needed to build a DLA and to know what it belongs to. Stored as JSON in the checkpoint."""

    mllm: MLLMInfo  # the MLLM whose features it was trained on
    context_width: int  # width of the DiT's context tokens
    dit: str = ""  # "flux" | "qwen_image" | "omnigen2" | "flux2" | "" = any of that context width
    pooling: str = "softmax"  # reading (a) "softmax" or (b) "linear" (UniFusion)
    modalities: str = "dual"  # "dual" | "shared" (one pooling for all tokens) | "last" (no pooling: the last layer)
    heads: int = 8
    blocks: int | None = None  # over the layer axis; None = 1 for softmax, 2 for linear
    refiner_blocks: int = 0  # bidirectional, over the token axis; UniFusion has 2
    layer_subset: tuple[int, ...] | None = None  # layer numbers pooled, ascending; None = all, 0..L
    template: str = "auto"  # what becomes of template tokens, see kept_tokens
    vit_blend: float = 0.0  # share of layer 0 (the ViT's features) at image tokens
    provenance: dict[str, Any] = field(default_factory=dict, hash=False)  # training settings, free JSON
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        def expect(ok: bool, name: str, expected: str):
            if not ok:
                raise ValueError(f"DLA config: {name} is {getattr(self, name)!r}, expected {expected}.")

        def whole(value, low, high):
            return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

        expect(self.format_version == FORMAT_VERSION, "format_version", f"{FORMAT_VERSION}; a newer pack may read it")
        expect(isinstance(self.mllm, MLLMInfo), "mllm", "an MLLMInfo")
        expect(whole(self.context_width, 1, 65536), "context_width", "a whole number from 1 to 65536")
        expect(isinstance(self.dit, str), "dit", 'a family name such as "flux", or "" for any')
        expect(self.pooling in POOLINGS, "pooling", f"one of {', '.join(POOLINGS)}")
        expect(self.modalities in MODALITIES, "modalities", f"one of {', '.join(MODALITIES)}")
        if self.blocks is None:
            object.__setattr__(self, "blocks", 1 if self.pooling == "softmax" else 2)
        expect(whole(self.blocks, 1, 64), "blocks", "a whole number from 1 to 64")
        expect(whole(self.refiner_blocks, 0, 64), "refiner_blocks", "a whole number from 0 to 64")
        expect(
            whole(self.heads, 1, self.mllm.width) and self.mllm.width % self.heads == 0,
            "heads",
            f"a divisor of the MLLM's width {self.mllm.width}",
        )
        if self.layer_subset is not None:
            expect(
                isinstance(self.layer_subset, (tuple, list))
                and len(self.layer_subset) > 0
                and all(whole(layer, 0, self.mllm.layers) for layer in self.layer_subset)
                and list(self.layer_subset) == sorted(set(self.layer_subset)),
                "layer_subset",
                f"ascending layer numbers from 0 to {self.mllm.layers}",
            )
            object.__setattr__(self, "layer_subset", tuple(self.layer_subset))
        expect(self.template in TEMPLATES, "template", f"one of {', '.join(TEMPLATES)}")
        expect(
            isinstance(self.vit_blend, (int, float)) and 0 <= self.vit_blend <= 1, "vit_blend", "a number from 0 to 1"
        )
        expect(isinstance(self.provenance, dict), "provenance", "a JSON object")

    @property
    def pooled_layers(self) -> tuple[int, ...]:
        """Layer numbers that are pooled, ascending. A new DLA is exactly the highest of them."""
        if self.layer_subset is not None:
            return self.layer_subset if self.modalities != "last" else self.layer_subset[-1:]
        return (self.mllm.layers,) if self.modalities == "last" else tuple(range(self.mllm.layers + 1))

    @property
    def required_layers(self) -> tuple[int, ...]:
        """Layer numbers that the features must hold for this DLA (the pooled ones, and layer 0 for a ViT blend)."""
        return tuple(sorted({*self.pooled_layers, *((0,) if self.vit_blend else ())}))

    def check_mllm(self, info: MLLMInfo):
        """Raises ValueError unless features of `info` are what this DLA was trained on. Names may differ."""
        for name in ("family", "layers", "width"):
            if getattr(info, name) != getattr(self.mllm, name):
                raise ValueError(
                    f"This DLA belongs to {_name(self.mllm)}, the features come from {_name(info)}: {name} "
                    f"{getattr(info, name)}, expected {getattr(self.mllm, name)}. Load {self.mllm.name} as the MLLM, "
                    f"or a DLA trained on {info.name}, or train one."
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DLAConfig":
        """The inverse of to_dict. Raises ValueError naming an unknown, missing or bad entry."""
        known, values = {f.name for f in fields(cls)}, dict(values)
        if unknown := sorted(set(values) - known):
            raise ValueError(f"DLA config: unknown entry {unknown[0]!r}, expected only {', '.join(sorted(known))}.")
        for name in ("mllm", "context_width"):
            if name not in values:
                raise ValueError(f"DLA config: entry {name!r} is missing.")
        mllm = values["mllm"]
        if not isinstance(mllm, dict):
            raise ValueError(f"DLA config: mllm is {mllm!r}, expected an object with name, family, layers and width.")
        known = {f.name for f in fields(MLLMInfo)}
        if wrong := sorted({"name", "family", "layers", "width"} - set(mllm)) or sorted(set(mllm) - known):
            raise ValueError(f"DLA config: mllm entry {wrong[0]!r} is {'unknown' if wrong[0] in mllm else 'missing'}.")
        return cls(**{**values, "mllm": MLLMInfo(**mllm)})


@dataclass(frozen=True, eq=False)
class Context:
    """Context tokens for a DiT, compacted: dropped tokens are gone, shorter prompts are padded on the right."""

    tokens: Tensor  # (B, T', C_context), zeros at padding
    attention_mask: Tensor  # (B, T') bool, False = padding
    modality: Tensor  # (B, T') uint8, Modality; TEMPLATE at padding
    image_index: Tensor  # (B, T') int16, -1 for tokens that belong to no reference image

    def row(self, index: int) -> "Context":
        """One prompt of the batch, without padding."""
        keep = self.attention_mask[index]
        rows = (self.tokens, self.attention_mask, self.modality, self.image_index)
        return Context(*(value[index : index + 1, keep] for value in rows))


class DualLayerAggregator(nn.Module):
    """Pools the layers of every token, text and image tokens each with a pooling of their own, and maps the result to
    the DiT's context width. Kept template tokens count as text.

    New (not loaded) it is exactly the last layer: bit for bit where the widths are equal, else zero padded or cut.

    operations: where the Linear leaves come from; ComfyUI's `comfy.ops.manual_cast`, or None for our own. Leaves from
        elsewhere are left as they are, to be loaded.
    compute_dtype: dtype of the linear maps; None = that of the weights.
    """

    compute_dtype: torch.dtype | None = None

    def __init__(self, config: DLAConfig, *, device=None, dtype=None, operations=None):
        super().__init__()
        self.config = config
        width, leaves = config.mllm.width, operations or TorchOperations
        settings = dict(device=device, dtype=dtype, operations=leaves)
        names = {"dual": ("text", "image"), "shared": ("shared",), "last": ()}[config.modalities]
        self.pooling = nn.ModuleDict(
            {
                name: LayerwiseAttentionPooling(
                    width,
                    len(config.pooled_layers),
                    pooling=config.pooling,
                    heads=config.heads,
                    blocks=config.blocks,
                    **settings,
                )
                for name in names
            }
        )
        self.refiner = nn.ModuleList(
            TransformerBlock(width, config.heads, mlp=True, **settings) for _ in range(config.refiner_blocks)
        )
        self.project = None
        if config.context_width != width:
            self.project = leaves.Linear(width, config.context_width, bias=False, device=device, dtype=dtype)
        if operations in (None, TorchOperations, nn):
            self.start_as_last_layer()

    def start_as_last_layer(self):
        """Make the module exactly the last pooled layer."""
        for pooling in self.pooling.values():
            pooling.start_as_last_layer()
        for block in self.refiner:
            block.start_as_identity()
        if self.project is not None:
            nn.init.eye_(self.project.weight)

    def forward(
        self,
        features: Features,
        keep: Tensor | None = None,
        *,
        vit_blend: float = 0.0,
        device: torch.device | None = None,
        max_chunk_bytes: int = MAX_CHUNK_BYTES,
    ) -> Tensor:
        """Features -> context tokens (B, T, context_width) in the features' dtype, zeros at tokens not kept.

        keep: (B, T) bool, tokens to work on; None = all but padding.
        vit_blend: share of layer 0 at image tokens; 0 = the config's.
        device: where to compute, chunk by chunk; None = where the weights are. The result stays there.
        max_chunk_bytes: bound on the intermediate results of the pooling. The result does not depend on it. With
            gradients and more than one chunk, each chunk is computed again in the backward pass to keep to it.
        Raises ValueError if the features are another MLLM's or lack a layer.
        """
        keep = features.attention_mask if keep is None else keep
        device = self._device(features, device)
        hidden, dtype = features.hidden_states, self._dtype(features)
        batch, _, tokens, width = hidden.shape
        vit_blend = vit_blend or self.config.vit_blend

        found, pooled = [], []
        for pooling, index, states in self._chunks(features, keep, device, max_chunk_bytes):
            if pooling is None:
                result = states[:, -1].float()
            elif torch.is_grad_enabled() and states.shape[0] < int(keep.sum()):
                result = checkpoint(pooling, states, dtype, use_reentrant=False)
            else:
                result = pooling(states, dtype)
            found.append(index)
            pooled.append(result)
        x = torch.zeros(batch * tokens, width, device=device).index_copy(0, torch.cat(found), torch.cat(pooled))
        x = rearrange(x, "(b t) c -> b t c", b=batch)

        if vit_blend:
            image = (keep & (features.modality == Modality.IMAGE)).to(device)[..., None]
            x = torch.where(image, torch.lerp(x, features.layer(0).to(x), vit_blend), x)
        keep = keep.to(device)
        for block in self.refiner:
            x = block(x, dtype, None if bool(keep.all()) else keep[:, None, None, :])
        if self.project is not None:
            # not normalised, hence not in fp16, whose largest number is 65504
            x = self.project(x.to(torch.float32 if dtype == torch.float16 else dtype)).float()
        if hidden.dtype == torch.float16:
            x = x.clamp(-65504, 65504)
        return x.to(hidden.dtype).masked_fill(~keep[..., None], 0)

    @torch.no_grad()
    def layer_weights(
        self,
        features: Features,
        keep: Tensor | None = None,
        *,
        device: torch.device | None = None,
        max_chunk_bytes: int = MAX_CHUNK_BYTES,
    ) -> Tensor:
        """How much each pooled layer weighs in each token: (B, T, len(config.pooled_layers)) fp32, which sums to 1 over
        layers for softmax pooling, to anything for linear pooling; zeros at tokens not kept. The attention over layers
        that goes before mixes them too; these are the weights of the sum at the end."""
        keep = features.attention_mask if keep is None else keep
        device = self._device(features, device)
        batch, _, tokens, _ = features.hidden_states.shape
        weights = torch.zeros(batch * tokens, len(self.config.pooled_layers), device=device)
        for pooling, index, states in self._chunks(features, keep, device, max_chunk_bytes):
            weights[index] = 1.0 if pooling is None else pooling.weigh(states, self._dtype(features))[1]
        return rearrange(weights, "(b t) m -> b t m", b=batch)

    def _chunks(self, features: Features, keep: Tensor, device: torch.device, max_bytes: int):
        """Yields (pooling or None, positions (n,) in the flat (B T), their layer states (n, M, C)), all on `device`."""
        self.config.check_mllm(features.info)
        layers = self.config.pooled_layers
        for layer in layers:
            features.layer(layer)  # raises if missing
        hidden, tokens = features.hidden_states, features.hidden_states.shape[2]
        entries = torch.tensor([features.layers.index(layer) for layer in layers], device=hidden.device)
        image = features.modality == Modality.IMAGE
        groups = {"text": keep & ~image, "image": keep & image, "shared": keep}
        step = chunk_length(len(layers), hidden.shape[3], self.config.heads, self._dtype(features), max_bytes)
        for name, pooling in self.pooling.items() or [("shared", None)]:
            for index in groups[name].flatten().nonzero().squeeze(1).to(hidden.device).split(step):
                if len(index):  # split gives one empty part for an empty group
                    states = hidden[(index // tokens)[:, None], entries, (index % tokens)[:, None]]
                    yield pooling, index.to(device), states.to(device)

    def _dtype(self, features: Features) -> torch.dtype:
        weight = next(self.parameters(), features.hidden_states)
        return self.compute_dtype or weight.dtype

    def _device(self, features: Features, device: torch.device | None) -> torch.device:
        weight = next(self.parameters(), features.hidden_states)
        return torch.device(device) if device is not None else weight.device


def kept_tokens(features: Features, template: str = "auto") -> Tensor:
    """(B, T) bool: the tokens that are passed on to the DiT.

    template: "auto" = as the MLLM's stock model does, i.e. "keep", or, where info.drop_leading_template, without what
        comes before the user's turn (features.prefix, or else the leading template tokens but for the one marker in
        front of an image); "keep" = all but padding; "drop" = no template token at all (UniFusion).
    A prompt of which nothing is left (an empty negative) keeps its last token, since a DiT cannot do without context.
    Raises ValueError for another template.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template is {template!r}, expected one of {', '.join(TEMPLATES)}.")
    mask, is_template = features.attention_mask, features.modality == Modality.TEMPLATE
    if template == "keep" or template == "auto" and not features.info.drop_leading_template:
        return mask
    if template == "drop":
        keep = mask & ~is_template
    else:
        prefix = features.prefix if features.prefix is not None else _leading_template(features)
        positions = torch.arange(mask.shape[1], device=mask.device)
        keep = mask & (positions >= torch.tensor(prefix, device=mask.device)[:, None])
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)
    empty = ~keep.any(dim=1)
    keep[empty, last[empty]] = True
    return keep


def aggregate(
    features: Features,
    dla: DualLayerAggregator | None = None,
    *,
    template: str | None = "auto",
    vit_blend: float | None = 0.0,
    device: torch.device | None = None,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
) -> Context:
    """Features -> context tokens for a DiT, in the features' dtype, on the device that computed them.

    dla: None = the MLLM's last layer as it is, which on Qwen-Image is the stock conditioning.
    template: see kept_tokens; "auto" or None = the DLA's setting, which may itself be "auto".
    vit_blend: share of layer 0 (the ViT's features) at image tokens; 0 or None = the DLA's setting.
    Raises ValueError if DLA and features do not belong together, or if the result is not finite.
    """
    if dla is None:
        config = DLAConfig(mllm=features.info, context_width=features.info.width, modalities="last", heads=1)
        dla = DualLayerAggregator(config)
    if template in (None, "auto"):
        template = dla.config.template
    if vit_blend is not None and not 0 <= vit_blend <= 1:
        raise ValueError(f"vit_blend is {vit_blend}, expected a number from 0 to 1.")
    keep = kept_tokens(features, template)
    tokens = dla(features, keep, vit_blend=vit_blend or 0.0, device=device, max_chunk_bytes=max_chunk_bytes)
    if not bool(tokens.isfinite().all()):
        raise ValueError(
            f"The context tokens are not finite. The features of {features.info.name} hold NaN or infinity, as an MLLM "
            "run in fp16 may produce: load it with weight dtype bf16 or fp32."
        )

    length = int(keep.sum(dim=1).max())
    order = (~keep).int().argsort(dim=1, stable=True)[:, :length]  # kept tokens first, in their order

    def compact(value: Tensor, padding: int) -> Tensor:
        value, index = value.to(tokens.device), order.to(tokens.device)
        return value.gather(1, index).masked_fill(~mask, padding)

    mask = keep.gather(1, order).to(tokens.device)
    return Context(
        tokens=tokens.gather(1, order.to(tokens.device)[..., None].expand(-1, -1, tokens.shape[2])),
        attention_mask=mask,
        modality=compact(features.modality, int(Modality.TEMPLATE)),
        image_index=compact(features.image_index, -1),
    )


def _leading_template(features: Features) -> list[int]:
    """Per prompt, the position of the first token of the user's turn, as far as modalities tell."""
    prefix = []
    for modality, mask in zip(features.modality.tolist(), features.attention_mask.tolist()):
        given = [i for i, kind in enumerate(modality) if mask[i] and kind != Modality.TEMPLATE]
        first = given[0] if given else len(modality)
        if given and modality[first] == Modality.IMAGE and first > 0 and mask[first - 1]:
            first -= 1  # e.g. <|vision_start|>, which belongs to the image
        prefix.append(first)
    return prefix


def _name(info: MLLMInfo) -> str:
    return f"{info.name} ({info.family}, {info.layers} layers, width {info.width})"
