"""How the benchmarks count operations."""

import pytest
import torch
from subject_dla.tools.perf._measure import operations
from torch.nn.functional import scaled_dot_product_attention
from torch.utils import flop_counter

HEADS, QUERIES, KEYS, WIDTH = 8, 6, 10, 16
EXPECTED = 2 * HEADS * QUERIES * KEYS * 2 * WIDTH  # scores, and values weighted by them


def shapes(key_heads, device):
    sizes = (HEADS, QUERIES), (key_heads, KEYS), (key_heads, KEYS)
    return [torch.zeros(1, *size, WIDTH, device=device) for size in sizes]


@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_grouped_query_attention_is_counted_where_pytorch_refuses_it(monkeypatch, kernel, key_heads):
    operator = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention")
    more = {"flash": (), "efficient": (None, False), "cudnn": (None, False)}[kernel]

    def attend():
        return operator(*shapes(key_heads, "meta"), *more)

    def before_2_13(query, key, value, *args, out_shape=None, **kwargs):
        assert query[1] == key[1] == value[1]
        return EXPECTED

    monkeypatch.setitem(flop_counter.flop_registry, operator, flop_counter.shape_wrapper(before_2_13))
    if key_heads < HEADS:
        with pytest.raises(AssertionError), flop_counter.FlopCounterMode(display=False):
            attend()
    assert operations(attend) == EXPECTED


@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_attention_on_the_cpu_is_counted(key_heads):
    query, key, value = shapes(key_heads, "cpu")
    assert operations(lambda: scaled_dot_product_attention(query, key, value, enable_gqa=True)) == EXPECTED
