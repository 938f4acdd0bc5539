"""The method: MLLM features, layerwise attention pooling, the Dual Layer Aggregator and its checkpoint. No ComfyUI here."""

from .aggregator import Context, DLAConfig, DualLayerAggregator, aggregate, kept_tokens
from .features import Features, MLLMInfo, Modality
from .pooling import LayerwiseAttentionPooling

__all__ = [
    "Context",
    "DLAConfig",
    "DualLayerAggregator",
    "Features",
    "LayerwiseAttentionPooling",
    "MLLMInfo",
    "Modality",
    "aggregate",
    "kept_tokens",
]
