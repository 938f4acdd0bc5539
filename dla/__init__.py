"""The method: MLLM features, layerwise attention pooling, the Dual Layer Aggregator and its file. No ComfyUI here."""

from .aggregator import Context, DLAConfig, DualLayerAggregator, aggregate, kept_tokens
from .checkpoint import DLACheckpointError, check_finite, describe, load_dla, read_config, save_dla
from .features import Features, MLLMInfo, Modality
from .pooling import LayerwiseAttentionPooling

__all__ = [
    "Context",
    "DLACheckpointError",
    "DLAConfig",
    "DualLayerAggregator",
    "Features",
    "LayerwiseAttentionPooling",
    "MLLMInfo",
    "Modality",
    "aggregate",
    "check_finite",
    "describe",
    "kept_tokens",
    "load_dla",
    "read_config",
    "save_dla",
]
