"""How much device memory training takes. Computed from the models' structure, not measured on a GPU.

What autograd keeps is counted map by map from the host's blocks, for weights that are frozen and context tokens that
want gradients; tests compare the count with what autograd really saves in one-layer models of full width, and the sum
with the allocator's peak on a CPU. Assumed:

- attention keeps queries, keys, values and output (flash, memory efficient);
- RMS norms are fused, as newer PyTorch has them on CUDA; else their inputs are kept in fp32, up to a quarter more
  activations without checkpointing;
- trained weights, their gradients and AdamW's moments are fp32, and the optimiser's step has no temporaries of its own
  (AdamW with fused=True; its foreach form takes 4 bytes more per trained parameter);
- data parallel, gradients are in the buffers that are sent; sharded, all that is trained is gathered for a pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from ...common.markdown import markdown
from ...dla.aggregator import MAX_CHUNK_BYTES, DualLayerAggregator
from ...dla.config import DLAConfig
from ...dla.features import MLLMInfo
from ...dla.pooling import HEAD_SCORED_CHUNK_BYTES, token_bytes
from ...loaders.backbones import TRAINED, Backbone, DiTSizes, MLLMSizes
from ..recipe import Recipe

GIB = 2**30
# CUDA context, the kernels' own buffers and what the allocator cannot use: our guess.
RESERVE = 3 * GIB // 2
# Share of a card's nominal memory that can be had: cards with error correction have up to 6 % less.
USABLE = 0.94
CARDS = (24, 48, 80)
# Bytes per trained parameter: two moments, in fp32 or in 8 bits with two fp32 scales for each 256 values.
# Paged ones may move them to the host's memory when there is need; they are counted as if they stayed.
OPTIMIZERS = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256, "paged_adamw8bit": 2 + 8 / 256}
OPTIMIZER_NAMES = {"adamw": "AdamW", "adamw8bit": "8-bit AdamW"}
STORAGES = {2: "bf16", 1: "fp8"}  # of the frozen DiT's weights, by bytes
Settings = tuple[int, str, bool]  # bytes of a weight, optimizer, checkpointing


@dataclass(frozen=True)
class Block:
    """What blocks of one kind keep for the backward pass. Channels are per token."""

    count: int
    tokens: int
    reached: int  # tokens whose gradients are wanted before attention, too
    before: int  # channels kept up to attention
    after: int  # channels kept from attention on: queries, keys, values, output, and what follows
    gradients: int  # channels of gradients that live at a time in its backward pass
    attention: tuple[tuple[int, int], ...]  # (in, out) of attention's linear maps, where a LoRA sits
    mlp: tuple[tuple[int, int], ...]
    streams: int  # 2: image and context tokens each have maps of their own
    lora_inputs: int  # channels that are kept for a LoRA alone: its maps' inputs

    def saved(self, rank: int = 0) -> int:
        """Numbers kept by each, of activations."""
        lora = (self.lora_inputs + rank * len(self.attention)) * self.tokens if rank else 0
        return self.before * (self.tokens if rank else self.reached) + self.after * self.tokens + lora

    def weights(self) -> int:
        """Number of weights in the linear maps that gradients go through."""
        return self.streams * sum(i * o for i, o in self.attention + self.mlp)

    def lora(self, rank: int) -> int:
        """Parameters of a LoRA in each."""
        return self.streams * sum(rank * (i + o) for i, o in self.attention)


def blocks(dit: DiTSizes, context: int, image: int, reference: int, lora: bool) -> list[Block]:
    """All blocks that gradients reach, for so many context, image and reference tokens."""
    d, m, k, tokens = dit.width, dit.mlp, dit.keys, context + image + reference
    if dit.streams == 1:
        # norm, query and key norms; q, k, v, output, other norms; SwiGLU keeps both maps' outputs and SiLU's
        kind = dict(before=2 * d + k, after=4 * d + (dit.norms - 1) * d + 3 * m, gradients=3 * m + 2 * d)
        kind["gradients"] += m * dit.gated  # of both halves and of the whole
        kind |= dict(attention=((d, d), (d, k), (d, k), (d, d)), mlp=((d, m), (d, m), (m, d)), streams=1)
        kind["lora_inputs"] = d + d * dit.pieces  # the outputs of several attention calls, joined
        out = [Block(dit.refiners, context, context, **kind), Block(dit.blocks, tokens, tokens, **kind)]
        if lora:  # else image and reference refiners have nothing to learn behind them
            out += [Block(dit.refiners, n, n, **kind) for n in (image, reference) if n]
        return out
    # norm, q, k and (fused, FLUX) v; q, k, v, output, norm, GELU's input, or both maps' outputs and SiLU's
    first, acted = (2 * m, m) if dit.gated else (m, 0)
    kind = dict(after=4 * d + d + first + acted, gradients=2 * first + 2 * d, streams=2, lora_inputs=d)
    kind |= dict(mlp=((d, first), (m, d)))
    if dit.fused_qkv:
        kind |= dict(before=d + 3 * d, attention=((d, 3 * d), (d, d)))
    else:
        kind |= dict(before=d + 2 * d, attention=((d, d),) * 4)
    # in the first block, image tokens meet the context only in attention
    out = [Block(1, tokens, context, **kind), Block(dit.blocks - 1, tokens, tokens, **kind)]
    if dit.single:  # norm, then one map makes q, k, v and the MLP's; values are not copied
        wide = dict(before=d + 3 * d + first, after=3 * d + acted, streams=1, lora_inputs=2 * d + m)
        wide |= dict(gradients=m + 2 * first + 4 * d, mlp=())
        out.append(Block(dit.single, tokens, tokens, attention=((d, 3 * d + first), (d + m, d)), **wide))
    return out


def activations(dit: DiTSizes, context: int, image: int, reference: int, rank: int = 0) -> int:
    """Numbers (not bytes) that autograd keeps of one sample in the whole DiT without checkpointing."""
    # the final norm's input; rotary embeddings: four numbers per pair of a head's channels, kept once
    tokens = context + image + reference
    ends = (dit.width + 2 * dit.head) * tokens
    return ends + sum(b.count * b.saved(rank) for b in blocks(dit, context, image, reference, rank > 0))


def token_counts(backbone: Backbone, size: tuple[int, int], references: int, reference_side: int) -> tuple[int, int]:
    """Image tokens and reference tokens, for a target of (width, height) px and square references."""
    (wide, high), token = size, backbone.token_side
    return (wide // token) * (high // token), references * (reference_side // token) ** 2


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device at the peak of a training step, by part."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def trained(self) -> int:
        """Bytes of what is trained, which stay on the device while the MLLM encodes."""
        return sum(self.parts[name] for name in ("DLA", "LoRA", "gradients", "optimiser"))

    @property
    def passing(self) -> int:
        """Bytes that come and go with a pass, beside the DiT and what is trained."""
        return self.total - self.parts["DiT weights"] - self.trained - RESERVE


def estimate(
    backbone: Backbone,
    *,
    sizes: DiTSizes | None = None,  # of the DiT; None = of the family's release
    resolution: int | tuple[int, int] = 1024,  # side of a square, or (width, height), px
    references: int = 1,
    reference_side: int = 512,  # of each, squares, px
    context_tokens: int = 512,  # prompt and image tokens of the MLLM
    dla: DLAConfig | None = None,  # None = a new one of the family's MLLM
    lora_rank: int = 0,  # 0 = no LoRA
    weight_bytes: int = 2,  # of the frozen DiT's storage: 2 = bf16, 1 = fp8
    compute_bytes: int = 2,  # of its arithmetic
    optimizer: str = "adamw",  # one of OPTIMIZERS
    batch_size: int = 1,
    accumulate: int = 1,  # passes whose gradients make one step
    checkpointing: bool = True,  # whether blocks are computed again in the backward pass
    shards: int = 1,  # processes over which what is trained is spread; 1 = each has all of it
) -> Estimate:
    """Memory of a training step on one device, of one process.

    The VAE and the MLLM are not on it then: their outputs are cached, or the host offloads them, see `encoding`. Raises
    ValueError for a family that is not trained and for an unknown optimizer.
    """
    if backbone.training is None:
        raise ValueError(f"DiT family is {backbone.name!r}, expected one of {', '.join(b.name for b in TRAINED)}.")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer is {optimizer!r}, expected one of {', '.join(OPTIMIZERS)}.")
    dit = sizes or backbone.training.sizes
    wide, high = resolution if isinstance(resolution, tuple) else (resolution, resolution)
    image, reference = token_counts(backbone, (wide, high), references, reference_side)
    if dla is None:
        mllm, width = backbone.training.mllm, backbone.training.context_width or backbone.context_width
        dla = Recipe().dla_config(MLLMInfo("", "", mllm.layers, mllm.width), width, backbone.name)
    layers, mllm_width = dla.mllm.layers, dla.mllm.width
    dla_parameters = sum(p.numel() for p in DualLayerAggregator(dla, device="meta").parameters())

    kinds = [b for b in blocks(dit, context_tokens, image, reference, lora_rank > 0) if b.count > 0]
    lora = sum(b.count * b.lora(lora_rank) for b in kinds)
    trained = dla_parameters + lora

    def cast(b: Block) -> int:  # weights in another dtype than the arithmetic's are cast, and autograd keeps the result
        frozen = b.weights() if weight_bytes != compute_bytes else 0
        return (frozen + (b.lora(lora_rank) if compute_bytes != 4 and shards == 1 else 0)) * compute_bytes

    size = batch_size * compute_bytes
    whole = {b: b.saved(lora_rank) * size + cast(b) for b in kinds}
    if checkpointing:  # each block's inputs; then one block is computed again
        ends = (dit.width + 2 * dit.head) * (context_tokens + image + reference)
        kept = size * (ends + sum(b.count * b.tokens * dit.width for b in kinds))
        again = max(whole[b] for b in kinds)
    else:
        kept = size * activations(dit, context_tokens, image, reference, lora_rank)
        kept += sum(b.count * cast(b) for b in kinds)
        again = 0
    features = batch_size * context_tokens * (layers + 1) * mllm_width * compute_bytes
    gathered = 0
    if shards > 1:  # weights and gradients for a pass, a LoRA's in the arithmetic's dtype; sums over passes are in fp32
        gathered = 8 * dla_parameters + lora * (compute_bytes + max(compute_bytes, 4 * (accumulate > 1)))
        gathered += 4 * max(dla_parameters, *(b.lora(lora_rank) // len(b.attention) for b in kinds))  # one is averaged
    # of the DLA's pooling: forward results and their gradients of one chunk of tokens, see dla.pooling.chunk_length
    heads, by_heads = dla.heads, dla.scores == "heads"
    each = token_bytes(len(dla.pooled_layers), mllm_width, heads, compute_bytes, by_heads)
    most = HEAD_SCORED_CHUNK_BYTES if by_heads else MAX_CHUNK_BYTES
    pooling = 2 * min(most, batch_size * context_tokens * each) if dla.modalities != "last" else 0
    return Estimate(
        {
            "DiT weights": dit.parameters * weight_bytes,
            # and a copy in the arithmetic's dtype
            "DLA": dla_parameters * 4 // shards + dla_parameters * (compute_bytes if compute_bytes != 4 else 0),
            "LoRA": lora * 4 // shards,
            "gradients": trained * 4 // shards,
            "optimiser": round(trained * OPTIMIZERS[optimizer] / shards),
            "gathered for a pass": gathered,
            "features": features,
            "activations": kept,
            "one block again": again,
            "gradients in a block": size * max(b.gradients * b.tokens for b in kinds),
            "DLA's pooling": pooling,
            "reserve": RESERVE,
        }
    )


def encoding(mllm: MLLMSizes, step: Estimate, weight_bytes: int = 2) -> int:
    """Bytes while the MLLM encodes, between steps: it and what is trained, with the DiT offloaded."""
    return mllm.parameters * weight_bytes + step.trained + step.parts["features"] + RESERVE


def fits(
    families: Sequence[Backbone] = TRAINED,
    resolutions: Sequence[int] = (512, 1024),
    ranks: Sequence[int] = (0, 16, 512),
) -> str:
    """Two markdown tables: GiB of a step with / without checkpointing, and what fits on cards of 24, 48 and 80 GB.

    Batch 1, one reference of 512 px, 512 context tokens. "MLLM encodes": GiB while the MLLM (bf16) encodes between
    steps, with AdamW's moments beside it; where its features are cached, that is over before training. The second table
    names the settings nearest to full precision, then without checkpointing. Computed, not measured on a GPU.
    """
    storages = [f"{w}, {o}" for w, o in product(STORAGES.values(), OPTIMIZER_NAMES.values())]
    sizes = [["DiT", "trained", "px", *storages, "MLLM encodes"]]
    cards = [["DiT", "trained", "px", *(f"{card} GB" for card in CARDS)]]
    for backbone, rank, resolution in product(families, ranks, resolutions):
        head = [backbone.training.release, f"DLA, LoRA {rank}" if rank else "DLA", str(resolution)]
        steps = steps_of(backbone, resolution, rank)
        cells = [
            " / ".join(f"{steps[weight, optimizer, again].total / GIB:.0f}" for again in (True, False))
            for weight, optimizer in product(STORAGES, OPTIMIZER_NAMES)
        ]
        encodes = encoding(backbone.training.mllm, steps[2, "adamw", True])
        sizes.append([*head, *cells, f"{encodes / GIB:.0f}"])
        fitting = [(card, first_that_fits(steps, card)) for card in CARDS]
        mllm = backbone.training.mllm
        cards.append(
            [*head, *("no" if key is None else in_words(key, steps[key], mllm, card) for card, key in fitting)]
        )
    return f"{markdown(sizes)}\n\n{markdown(cards)}\n"


def steps_of(backbone: Backbone, resolution: int, rank: int) -> dict[Settings, Estimate]:
    """Memory of a step by its settings, those nearest to full precision first, then without checkpointing."""
    step = partial(estimate, backbone, resolution=resolution, lora_rank=rank)
    return {
        (weight, optimizer, again): step(weight_bytes=weight, optimizer=optimizer, checkpointing=again)
        for weight, optimizer, again in product(STORAGES, OPTIMIZER_NAMES, (False, True))
    }


def first_that_fits(steps: dict[Settings, Estimate], card: int) -> Settings | None:
    """The first settings that fit a card of so many GB; None where none do."""
    return next((settings for settings, step in steps.items() if step.total <= card * GIB * USABLE), None)


def in_words(settings: Settings, step: Estimate, mllm: MLLMSizes, card: int) -> str:
    """Settings for people, with what the MLLM then needs."""
    weight, optimizer, again = settings
    words = [STORAGES[weight], OPTIMIZER_NAMES[optimizer], *(["checkpointing"] if again else [])]
    words += ["features cached"] if encoding(mllm, step) > card * GIB * USABLE else []
    return ", ".join(words)
