"""The record of one DiT family: all by which this pack treats families differently."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

TOKEN_ORDER = ("context", "image", "reference")  # FLUX.1's, the most frequent one

Grid = tuple[int, int, int]  # frames, rows and columns of tokens


class Part(NamedTuple):
    """Tokens in a row among the keys of joint attention."""

    group: str  # of TOKEN_ORDER, or "other"
    tokens: int  # those beyond the grid's are padding
    grid: Grid = (0, 0, 0)  # of the image or a reference
    reference: int = 0  # which one
    joint_only: bool = False  # not in the attention of `contextless_blocks`


@dataclass(frozen=True)
class DiTSizes:
    """Sizes of a diffusion transformer, in the terms of the host's classes."""

    width: int
    mlp: int  # hidden width of the blocks' MLP
    keys: int  # width of the keys; less than `width` where heads share them
    blocks: int  # FLUX: the double blocks
    parameters: int
    single: int = 0  # FLUX's single blocks
    refiners: int = 0  # OmniGen2's, of each of three kinds
    head: int = 128  # channels of one attention head
    streams: int = 2  # 2: image and context tokens each have maps of their own; 1: one block for all, a SwiGLU MLP
    norms: int = 2  # 1 stream: of a block's tokens, those of queries and keys not counted
    gated: bool = False  # a SwiGLU MLP whose first two maps are one; else GELU, or with 1 stream a SwiGLU of three maps
    fused_qkv: bool = False  # one map makes queries, keys and values
    pieces: bool = False  # context, each reference and the image have attention calls of their own, over what is before


@dataclass(frozen=True)
class MLLMSizes:
    """Sizes of an MLLM: decoder layers, width, and parameters without the head that predicts tokens."""

    name: str
    layers: int
    width: int
    parameters: int


@dataclass(frozen=True)
class Training:
    """What training through a family needs to know; the sizes are those of its release."""

    release: str
    sizes: DiTSizes
    measure: Callable[[Any], DiTSizes]  # the sizes of a loaded model, from the host's module
    mllm: MLLMSizes  # what the family is trained with
    blocks: tuple[str, ...]  # module lists that hold the transformer blocks, those without joint attention too
    lora_targets: str  # regular expression of the names of attention's linear maps
    context_width: int = 0  # of the release, channels; 0 = the family's


@dataclass(frozen=True)
class Release:
    """Weights of a family that were trained with a placement of their own, which at most the file's name says."""

    title: str  # for people, and a choice of placement in saved workflows
    file_name: str  # regular expression, searched in a file's name in lower case with "-" for "_"
    placements: tuple[str, ...]  # that it reads as trained; the choice sets the first


@dataclass(frozen=True)
class Backbone:
    """One DiT family as the host runs it. The tests compare each record with the host's own classes.

    Source: the host's model_detection, model_base and ldm folders, read at 0.3.64, 0.3.75 and 0.33.0.
    """

    name: str  # in DLA checkpoints, recipes and training checkpoints
    title: str  # for people
    config: Mapping[str, Any]  # entries of the host's `unet_config` that the family has
    host_class: str  # in comfy.model_base; for loaders of other packs that leave the config empty
    keys: tuple[str, ...]  # state dict keys that a file of the family has
    absent_keys: tuple[str, ...] = ()  # and those that it has not
    rows: Mapping[str, int] = field(default_factory=dict)  # of weights, where the keys are another family's, too
    context_layer: str = "txt_in"  # path of the linear map that reads the context tokens
    stacked_by: str = ""  # of the map over the layers of the MLLM that a context token holds; "" = one layer or fused
    context_width: int = 0  # of the release, channels
    token_order: tuple[str, ...] = TOKEN_ORDER  # of the groups among the keys of joint attention
    # of a family whose token order does not say it all: from its module, the number of context tokens, the grids of the
    # image and each reference, and the shapes of the model's other inputs without their batch (numbers as they are)
    token_parts: Callable[[Any, int, Grid, list[Grid], Mapping[str, Any]], list[Part]] | None = None
    references_in_context: bool = False  # at `image_slots`; attention has a call for each piece, over what is before it
    joint_blocks: tuple[str, ...] = ("double_blocks", "single_blocks")  # module lists; a block has one joint attention
    contextless_blocks: tuple[str, ...] = ()  # whose blocks have, with references, one of these and the image alone
    latent_channels: int = 16
    latent_dimensions: int = 2  # 3: with frames, (b, c, 1, h, w)
    latent_downscale: int = 8  # px per latent element and side
    patch_size: int = 2  # latent elements per token and side
    frames_apart: bool = False  # each frame of a reference latent is a reference of its own to the model
    reference_side: int = 0  # px; the sides of references are whole numbers of it; 0: of tokens
    placements: tuple[str, ...] = ()  # the `reference_latents_method`s that its newest host reads
    default_placement: str | None = None  # None: the model's own
    unnamed_placement: str | None = None  # the one that the host's class takes every name for that is not in its source
    needs_placement: bool = False  # reads references only where a placement is set
    releases: tuple[Release, ...] = ()  # whose placement may differ from the default
    most_references: int | None = None
    counts_context: bool = False  # reads its number of context tokens, one for the batch, from `attention_mask`
    pads_context: bool = False  # the host pads it on the left, so that a token's position depends on their number
    takes_guidance: bool = False  # distilled guidance
    context_off_tokens: int = 1  # left of a context that is off, their keys skipped; 0 where the host takes none
    training: Training | None = field(default=None, compare=False)  # None: not trained here

    @property
    def token_side(self) -> int:
        """Pixels per token and side, of the picture and of references."""
        return self.latent_downscale * self.patch_size

    @property
    def reference_grid(self) -> int:
        """Pixels of which a reference's sides are whole multiples."""
        return self.reference_side or self.token_side

    def has_keys(self, shapes: Mapping[str, tuple[int, ...]], prefix: str = "") -> bool:
        """Whether a state dict with these keys, and shapes of their tensors, may be of this family."""
        found, strange = ([prefix + key in shapes for key in some] for some in (self.keys, self.absent_keys))
        fits = all(tuple(shapes.get(prefix + key, ()))[:1] == (rows,) for key, rows in self.rows.items())
        return all(found) and not any(strange) and fits

    def has_config(self, config: Mapping[str, Any]) -> bool:
        """Whether the host's `unet_config` is of this family."""
        return all(config.get(key) == value for key, value in self.config.items())
