"""DLA files as models under ComfyUI's model management."""

import logging
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.utils
import torch

from ..dla import checkpoint
from ..dla.aggregator import MAX_CHUNK_BYTES, DualLayerAggregator
from ..dla.config import DLAConfig
from ..dla.context import Context, aggregate, kept_tokens
from ..dla.features import Features, MLLMInfo
from ..dla.pooling import head_linear, head_logits
from . import folders
from .host import make_patcher

log = logging.getLogger(__name__)
SHARES = (1, 8, 64)  # of MAX_CHUNK_BYTES, one after the other where memory runs out
CPU_DTYPES = (torch.float32, torch.bfloat16)  # fp16 is slow or missing there


class Operations(comfy.ops.manual_cast):
    """The host's layers, whose weights it loads, offloads and casts, and those that it lacks."""

    class HeadLinear(comfy.ops.manual_cast.Linear):  # noqa: D106
        def forward_comfy_cast_weights(self, read: torch.Tensor, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
            return head_linear(read, x, *comfy.ops.cast_bias_weight(self, x))

    class HeadLogits(comfy.ops.manual_cast.Linear):  # noqa: D106
        def forward_comfy_cast_weights(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
            weight, bias = comfy.ops.cast_bias_weight(self, x)
            return head_logits(x, weight, bias, self.heads)


class DLA:
    """The DLA socket: a DualLayerAggregator that the host loads, offloads and casts.

    state: checked weights, see dla/checkpoint.py. name: its file, for messages.
    """

    def __init__(self, config: DLAConfig, state: dict[str, torch.Tensor], name: str = ""):
        self.config, self.name = config, name
        self.load_device = comfy.model_management.get_torch_device()
        offload_device = comfy.model_management.unet_offload_device()
        dtype = compute_dtype(self.load_device, comfy.utils.weight_dtype(state) or torch.float32)
        model = DualLayerAggregator(config, device=offload_device, dtype=dtype, operations=Operations)
        model.compute_dtype = dtype
        state = {key: value.to(dtype) for key, value in state.items()}
        self.patcher = make_patcher(model, self.load_device, offload_device, state)

    @property
    def model(self) -> DualLayerAggregator:
        """The module in the host's patcher."""
        return self.patcher.model

    def aggregate(self, features: Features, *, template: str | None = None, vit_blend: float | None = None) -> Context:
        """As dla.context.aggregate, on the host's device; the result is on its intermediate device.

        Without enough memory it pools fewer tokens at a time, which changes no result. Raises ValueError if the
        features are another MLLM's.
        """
        self._load(features)
        options: dict[str, Any] = {"template": template, "vit_blend": vit_blend, "device": self.load_device}
        for share in SHARES:
            options["max_chunk_bytes"] = MAX_CHUNK_BYTES // share
            try:
                with torch.inference_mode():
                    context = aggregate(features, self.model, **options)
                break
            except comfy.model_management.OOM_EXCEPTION:
                if share == SHARES[-1]:
                    raise
            log.warning("%s: no memory to pool layers, pooling fewer tokens at a time", self.name or "DLA")
            comfy.model_management.soft_empty_cache()  # here, where the error holds nothing any more
        return context.to(comfy.model_management.intermediate_device())

    def layer_weights(self, features: Features, template: str | None = None) -> torch.Tensor:
        """(B, T, layers) fp32, see DualLayerAggregator.layer_weights; T counts the features' tokens."""
        self._load(features)
        keep = kept_tokens(features, self.config.template if template in (None, "auto") else template)
        weights = self.model.layer_weights(features, keep, device=self.load_device)
        return weights.to(comfy.model_management.intermediate_device())

    def check_mllm(self, info: MLLMInfo) -> None:
        """Raises ValueError unless features of this MLLM are what the DLA was trained on."""
        try:
            self.config.check_mllm(info)
        except ValueError as error:
            raise ValueError(f"DLA {self.name!r}: {error}") from None

    def _load(self, features: Features) -> None:
        self.check_mllm(features.info)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory_required(self.config, features))


def read_config(name: str) -> DLAConfig:
    """Config of a file under models/dla, from its header alone. Raises ValueError."""
    return checkpoint.read_config(folders.find("dla", name))


def check_dit(
    config: DLAConfig, name: str, width: int | None, dit: str = "", model: str = "the diffusion model"
) -> None:
    """Raises ValueError unless a DiT can read the tokens of the DLA in the file `name`.

    width: of the context that the DiT reads, in channels; dit: its family. None and "" = not known, which passes.
    model: what the text calls the DiT.
    """
    wanted = f"a {config.dit}" if config.dit else "a diffusion model"
    if width not in (None, config.context_width) or (config.dit and dit and config.dit != dit):
        raise ValueError(
            f"DLA {name!r} makes tokens {config.context_width} wide for {config.dit or 'any family'}; {model} is "
            f"{dit or 'of a family not known here'} and reads tokens {width or '?'} wide. Load {wanted} that reads "
            f"tokens {config.context_width} wide, or a DLA trained for this one."
        )


def load_dla(name: str) -> DLA:
    """The DLA in that file under models/dla. Raises ValueError if it is not there or no usable DLA."""
    path = folders.find("dla", name)
    config = checkpoint.read_config(path)
    # the header check comes first: the host would unpickle a file that is no .safetensors
    state = comfy.utils.load_torch_file(str(path), safe_load=True)
    checkpoint.check_finite(path, state)
    return DLA(config, state, name)


def compute_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """bf16, else fp16, on a device that is fast in it, else fp32; on the CPU fp32 or bf16, as the file."""
    if comfy.model_management.is_device_cpu(device):
        return stored if stored in CPU_DTYPES else torch.float32
    if comfy.model_management.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32


def memory_required(config: DLAConfig, features: Features) -> int:
    """Bytes on the load device beside the weights: one chunk of layer states, and a few fp32 copies of the result."""
    batch, _, tokens, width = features.hidden_states.shape
    copies = 4 if not config.refiner_blocks else 16  # the refiner's MLP is four times as wide
    return MAX_CHUNK_BYTES + batch * tokens * 4 * (copies * width + 3 * config.context_width)
