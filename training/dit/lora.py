"""A LoRA on the DiT's attention, trained beside the DLA, in a file that the host's own LoRA loader reads."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...common.files import save_tensors
from ...common.safetensors_header import SafetensorsError, read_header
from ...loaders.backbones import Backbone

# Kohya's, PEFT's, diffusers' and the host's names of one linear map's tensors.
LAYOUT = re.compile(
    r"(?:lora_(?:unet|transformer)_|(?:base_model\.model\.)?(?:model\.)?(?:diffusion_model\.|transformer\.)?)"
    r"(?P<module>\w.*?)\.(?:(?P<a>(?:lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight)|"
    r"(?P<b>(?:lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight)|(?P<alpha>alpha))"
)


class Pair(nn.Module):
    """A (rank, in) and B (out, rank) of one linear map; a module so that they can be sharded together."""

    def __init__(self, a: Tensor, b: Tensor):
        super().__init__()
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)


class LoRA(nn.Module):
    """y + (alpha / rank) B A x at every linear map of the DiT's attention; B starts at zero, so a new one does nothing.

    It reaches the frozen DiT by forward hooks, between `attach` and `detach`. The family's record names these maps; the
    paper's rank is 512, as UNO's; alpha None = the rank; `seed` is that of A's random start.
    """

    def __init__(
        self, diffusion_model: nn.Module, family: Backbone, rank: int, alpha: float | None = None, seed: int = 0
    ):
        super().__init__()
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        targets = family.training.lora_targets
        found = {name: part for name, part in diffusion_model.named_modules() if re.fullmatch(targets, name)}
        if not found:
            raise ValueError(
                f"No attention of {type(diffusion_model).__name__} was found to put a LoRA on (names like "
                f"{targets!r}). Train without one (rank 0), or load the model with ComfyUI's own loader."
            )
        generator = torch.Generator().manual_seed(seed)
        self.pairs, self.parts = nn.ModuleDict(), {}
        for name, part in found.items():
            key = name.replace(".", "/")  # parameter names have no dots
            start = torch.empty(rank, part.in_features).normal_(0, part.in_features**-0.5, generator=generator)
            self.pairs[key] = Pair(start, torch.zeros(part.out_features, rank))
            self.parts[key] = (part,)  # in a tuple: the DiT is no part of this module
        self._hooks = []

    def attach(self) -> None:
        """Adds the LoRA to the DiT's forward."""
        for key, (part,) in self.parts.items():
            self._hooks.append(part.register_forward_hook(self._hook(key)))

    def detach(self) -> None:
        """Leaves the DiT as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _hook(self, key: str):
        def add(_, inputs, output: Tensor) -> Tensor:
            x, pair = inputs[0], self.pairs[key]
            low = nn.functional.linear(x, pair.A.to(x.dtype))
            return output + nn.functional.linear(low, pair.B.to(x.dtype)) * (self.alpha / self.rank)

        return add

    def inside(self, block: nn.Module) -> list[nn.Parameter]:
        """The parameters of the linear maps in `block`."""
        parts = set(block.modules())
        keys = [key for key, (part,) in self.parts.items() if part in parts]
        return [tensor for key in keys for tensor in (self.pairs[key].A, self.pairs[key].B)]

    def in_order(self) -> list[nn.Parameter]:
        """Returns all parameters as checkpoints number them: every A, then every B."""
        return [pair.A for pair in self.pairs.values()] + [pair.B for pair in self.pairs.values()]

    def weights(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Keys as the host's LoRA loader reads them for any model."""
        out = {}
        for key in self.parts:
            name = "diffusion_model." + key.replace("/", ".")
            out[f"{name}.lora_A.weight"] = self.pairs[key].A.detach().to("cpu", dtype).contiguous()
            out[f"{name}.lora_B.weight"] = self.pairs[key].B.detach().to("cpu", dtype).contiguous()
            out[f"{name}.alpha"] = torch.tensor(self.alpha)
        return out

    def save(self, path: Path, dtype: torch.dtype = torch.float32, metadata: dict[str, str] | None = None) -> None:
        """Writes a file atomically."""
        save_tensors(path, self.weights(dtype), metadata)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Takes over a file's weights for the same model and rank.

        Names may be those that `save` writes, PEFT's, Kohya's, or diffusers' where it has the host's modules; without
        alpha it is the rank, as the host takes it. Raises ValueError.
        """
        try:
            read_header(path)
            state = self._named_as_here(path, load_file(path))
        except (SafetensorError, OSError, SafetensorsError, MemoryError) as error:
            raise ValueError(f"LoRA file '{path.name}' cannot be read ({error}). Take another file.") from None
        expected = self.weights()
        for key, value in expected.items():
            found = tuple(state[key].shape) if key in state else "nothing"
            if found != tuple(value.shape):
                raise ValueError(
                    f"LoRA file '{path.name}': {key} is {found}, expected {tuple(value.shape)} for rank {self.rank} on "
                    "this diffusion model. Choose the same model and rank, or start a run under another name."
                )
        if more := [key for key in state if key not in expected]:
            raise ValueError(
                f"LoRA file '{path.name}': has {more[0]:.100} too, and {len(more) - 1} more that a LoRA on attention "
                "has not, so it would be another one without them. Start from none, or from a LoRA trained here."
            )
        for key, value in state.items():
            if not value.is_floating_point() or value.element_size() < 2 and not key.endswith(".alpha"):
                raise ValueError(f"LoRA file '{path.name}': {key} is {value.dtype}, expected fp16, bf16 or fp32.")
            state[key] = value.float()  # in which it is kept: of fp64 it may be infinite
            if not bool(state[key].isfinite().all()):
                raise ValueError(
                    f"LoRA file '{path.name}': {key} has values that are NaN or infinite in fp32, expected others. "
                    "Take another file."
                )
        for key in expected:
            if key.endswith(".alpha") and float(state[key]) != self.alpha:
                raise ValueError(
                    f"LoRA file '{path.name}': {key} is {float(state[key]):g}, expected {self.alpha:g}. "
                    f"Set lora.alpha = {float(state[key]):g}, as that LoRA was trained, or start from none."
                )
        for key in self.parts:
            name = "diffusion_model." + key.replace("/", ".")
            self.pairs[key].A.copy_(state[f"{name}.lora_A.weight"])
            self.pairs[key].B.copy_(state[f"{name}.lora_B.weight"])

    def _named_as_here(self, path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors under the keys of `weights`. Raises ValueError where its layout is another one."""
        modules = {name.replace("/", "."): "diffusion_model." + name.replace("/", ".") for name in self.parts}
        modules |= {name.replace(".", "_"): full for name, full in modules.items()}
        found = {}
        for key, value in state.items():
            match = LAYOUT.fullmatch(key)
            module = modules.get(match["module"]) if match else None
            kind = match and ("alpha" if match["alpha"] else "lora_A.weight" if match["a"] else "lora_B.weight")
            new = f"{module}.{kind}" if module else key
            if new in found:
                raise ValueError(
                    f"LoRA file '{path.name}': has {new} under two names, one is {key}. Take another file."
                )
            found[new] = value
        own = [f"{full}.lora_A.weight" for full in modules.values()]
        if not any(key in found for key in (*own, *(key.replace("lora_A", "lora_B") for key in own))):
            first = f"has keys such as {next(iter(state)):.100}" if state else "is empty"
            raise ValueError(
                f"LoRA file '{path.name}' {first}: a foreign layout for this diffusion model, expected keys such as "
                f"{own[0]}, or Kohya's or PEFT's of the same modules. Convert it to ComfyUI's "
                "layout for this model, or start from none."
            )
        for full in modules.values():
            a = found.get(f"{full}.lora_A.weight")
            if a is not None and a.ndim:
                found.setdefault(f"{full}.alpha", torch.tensor(float(a.shape[0])))
            if f"{full}.alpha" in found and found[f"{full}.alpha"].numel() == 1:
                found[f"{full}.alpha"] = found[f"{full}.alpha"].reshape(())
        return found
