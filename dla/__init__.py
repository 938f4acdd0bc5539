"""The method: MLLM features, layerwise attention pooling, the Dual Layer Aggregator and its file. No ComfyUI here."""

from .aggregator import DualLayerAggregator
from .checkpoint import DLACheckpointError, check_finite, describe, load_dla, read_config, save_dla
from .config import DLAConfig
from .context import Context, aggregate, kept_tokens
from .features import Features, ImageGrid, MLLMInfo, Modality, StockContext
from .pooling import LayerwiseAttentionPooling

__all__ = [
    "Context",
    "DLACheckpointError",
    "DLAConfig",
    "DualLayerAggregator",
    "Features",
    "ImageGrid",
    "LayerwiseAttentionPooling",
    "MLLMInfo",
    "Modality",
    "StockContext",
    "aggregate",
    "check_finite",
    "describe",
    "kept_tokens",
    "load_dla",
    "read_config",
    "save_dla",
]
