"""Peak memory of the aggregator above one chunk, as a share of its input, measured in a process of its own.

python common/bootstrap.py tests.small.peak_memory softmax|linear|heads
"""

import resource
import sys

import torch

from ...dla import DLAConfig, DualLayerAggregator, Features, MLLMInfo

INFO = MLLMInfo("peak", "internvl", 28, 512)
CHUNK = 4 * 2**20


def features(tokens: int) -> Features:
    kind = torch.tensor([[1, 0] * (tokens // 2)], dtype=torch.uint8)
    index = torch.where(kind == 1, 0, -1).to(torch.int16)
    hidden = torch.full((1, 29, tokens, 512), 0.5, dtype=torch.bfloat16)
    return Features(hidden, tuple(range(29)), kind, index, kind < 2, INFO)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(pooling: str) -> None:
    form = {"pooling": "softmax"} if pooling == "heads" else {"pooling": pooling, "scores": "states"}
    dla = DualLayerAggregator(DLAConfig(INFO, 512, **form), dtype=torch.bfloat16).requires_grad_(False)
    dla(features(16), max_chunk_bytes=CHUNK)  # kernels, thread pools
    given = features(1024)
    before = peak()
    dla(given, max_chunk_bytes=CHUNK)
    print((peak() - before - CHUNK) / given.hidden_states.nbytes)


if __name__ == "__main__":
    main(sys.argv[1])
