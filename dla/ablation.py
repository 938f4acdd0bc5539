"""Layer roles: hidden states of chosen layers set to zero, for text or image tokens alone, and sweeps over groups."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .features import Features, Modality

GROUPS = {"early": (0, 9), "middle": (10, 19), "late": (20, 28)}  # the paper's, of an MLLM with 28 layers
PAPER_LAYERS = 28
ACTIONS = ("zero", "keep")
MODALITIES = {"text": Modality.TEXT, "image": Modality.IMAGE}
RANGE = re.compile(r"(\d+)\s*(?:[-–]\s*(\d+))?")


def groups(top: int) -> dict[str, tuple[int, ...]]:
    """The paper's three groups of hidden states for an MLLM whose layer numbers are 0..`top`.

    28 layers give 0-9, 10-19 and 20-28; others the same shares of all states, rounded (our choice). A group that an
    MLLM of one layer leaves empty is left out.
    """

    def scaled(number: int) -> int:
        return int(number * (top + 1) / (PAPER_LAYERS + 1) + 0.5)

    found = {name: tuple(range(scaled(low), scaled(high + 1))) for name, (low, high) in GROUPS.items()}
    return {name: layers for name, layers in found.items() if layers}


def parse_layers(text: str, top: int) -> tuple[int, ...]:
    """Ascending layer numbers of a list such as "0-9, 20-28", "early, 14" or "all".

    early, middle, late: the paper's groups (see `groups`). Raises ValueError that quotes the part it cannot read.
    """
    named = {"all": tuple(range(top + 1)), **groups(top)}
    found = set()
    for part in (part.strip().lower() for part in text.split(",") if part.strip()):
        if part in named:
            found |= set(named[part])
            continue
        match = RANGE.fullmatch(part)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not low <= high <= top:
            raise ValueError(
                f"Layers {part!r} in {text!r}: expected numbers or rising ranges from 0 (the embeddings) to {top} (the"
                f' last layer of this MLLM), such as "0-{top // 2}, {top}", or {", ".join(named)}.'
            )
        found |= set(range(low, high + 1))
    if not found:
        raise ValueError(f'No layers are named in {text!r}: write, e.g., "early" or "0-{top // 2}, {top}".')
    return tuple(sorted(found))


def ablate(features: Features, *, text: Collection[int] = (), image: Collection[int] = ()) -> Features:
    """A copy whose text and image tokens are zero at these layer numbers; template tokens and padding stay as they are.

    Layers that the features do not hold are passed over. Raises ValueError for a number that the MLLM does not have,
    and where layers are given for a modality of which there is no token.
    """
    hidden = features.hidden_states.clone()
    for name, layers in (("text", text), ("image", image)):
        if not layers:
            continue
        if wrong := sorted(set(layers) - set(range(features.info.layers + 1))):
            raise ValueError(
                f"Layer {wrong[0]} is to be zeroed, but {features.info.name} has layers 0 to {features.info.layers}."
            )
        tokens = features.attention_mask & (features.modality == MODALITIES[name])  # (B, T)
        if not bool(tokens.any()):
            raise ValueError(
                f"Layers of the {name} tokens are to be ablated, but these features hold no {name} token. "
                + ("Connect a reference image to Encode Subject, or leave the image tokens untouched."
                   if name == "image" else "Write a prompt, or leave the text tokens untouched.")
            )  # fmt: skip
        top = features.info.layers  # L + 1 is the same layer as L, before the norm
        entries = torch.tensor([min(number, top) in set(layers) for number in features.layers], device=hidden.device)
        gone = entries[None, :, None] & tokens.to(hidden.device)[:, None, :]  # (B, M, T)
        hidden.masked_fill_(gone[..., None], 0)
    return replace(features, hidden_states=hidden)


def ablate_lists(features: Features, **choices: tuple[str, str]) -> Features:
    """As `ablate`, by an action and a list of layers for "text" or "image", e.g. image=("keep", "late").

    Features without a choice are returned as they are. Raises ValueError, see `parse_layers` and `ablate`.
    """
    top = features.info.layers
    zero = {name: zeroed_layers(action, parse_layers(text, top), top) for name, (action, text) in choices.items()}
    return ablate(features, **zero) if zero else features


def zeroed_layers(action: str, layers: Collection[int], top: int) -> tuple[int, ...]:
    """Layer numbers to set to zero: `layers` themselves (action "zero") or all others up to `top` ("keep")."""
    if action not in ACTIONS:
        raise ValueError(f"The ablation is {action!r}, expected one of {', '.join(ACTIONS)}.")
    return tuple(layer for layer in range(top + 1) if (layer in layers) == (action == "zero"))


@dataclass(frozen=True)
class Trial:
    """One entry of a sweep: its label, and the layers of text and image tokens that are set to zero."""

    label: str
    text: tuple[int, ...] = ()
    image: tuple[int, ...] = ()

    def apply(self, features: Features) -> Features:
        """The ablated features; where nothing is zeroed the same object, since it may be large."""
        return ablate(features, text=self.text, image=self.image) if self.text or self.image else features


def sweep(
    top: int,
    parts: Sequence[tuple[int, ...]] = (),
    modalities: Sequence[str] = ("text", "image"),
    actions: Sequence[str] = ACTIONS,
) -> Iterator[Trial]:
    """Untouched first, then one trial for each modality, action (see zeroed_layers) and group of layer numbers.

    `top` is the number of the MLLM's last layer; without `parts`, the groups are the paper's.
    """
    yield Trial("untouched")
    for modality in modalities:
        for action in actions:
            for part in parts or groups(top).values():
                label = f"{modality}: {_describe_runs(part)} {'zeroed' if action == 'zero' else 'kept alone'}"
                yield Trial(label, **{modality: zeroed_layers(action, part, top)})


def _describe_runs(layers: Sequence[int]) -> str:
    """Ascending numbers with every run shortened: "layers 0-9, 20"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    text = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
    return f"layer{'' if len(layers) == 1 else 's'} {text}"
