"""What a picture costs: the counts behind docs/speed.md."""

from importlib import import_module

import pytest
import torch
from subject_dla.dla import Modality
from subject_dla.loaders.backbones import BACKBONES
from subject_dla.tests.host.test_parity import skip_what_the_host_cannot_build
from subject_dla.tests.small.models import KL_VAE
from subject_dla.tools.perf import _models, costs
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize("family", costs.FAMILIES)
def test_the_page_has_the_counts(family):
    skip_what_the_host_cannot_build(family)
    model = costs.counted(family)
    page = [line.split("|") for line in costs.PAGE.read_text("utf-8").splitlines() if line.startswith("|")]
    shown = [[cell.strip() for cell in cells[1:7]] for cells in page]
    lines = costs.table({"models": {family: model}, "device": ""}).splitlines()
    counted = [
        [cell.strip() for cell in line.split("|")[1:7]] for line in lines if line.startswith(f"| {model['title']}")
    ]
    assert len(counted) == len(costs.SIZES) * len(costs.MEASURED) and [row for row in counted if row not in shown] == []


def test_a_staged_run_has_all_its_steps():
    row = costs.counted("flux")["rows"][5]
    assert (row["px"], row["references"], row["tokens"]["image"], row["tokens"]["reference"]) == (1024, 1, 4096, 4096)
    assert all(sum(steps.values()) == costs.STEPS for steps in row["steps"].values())
    assert set(row["steps"]["staged"]) == set(costs.KINDS)
    mean = {way: sum(row["tokens"]["in_dit"][kind] * n for kind, n in row["steps"][way].items()) for way in costs.WAYS}
    assert mean == {way: tokens * costs.STEPS for way, tokens in row["tokens"]["mean"].items()}


@pytest.mark.parametrize("half, channels, count", [
    ("Encoder", 3, costs.VAE_ENCODE), ("Decoder", KL_VAE["z_channels"], costs.VAE_DECODE)
])  # fmt: skip
def test_operations_of_the_vae(half, channels, count):
    px, build = 128, getattr(import_module("comfy.ldm.modules.diffusionmodules.model"), half)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        module = build(**KL_VAE)
        module.mid.attn_1.optimized_attention = lambda q, k, v: q  # counted apart
        module(torch.empty(1, channels, *[px if half == "Encoder" else px // 8] * 2))
    assert counter.get_total_flops() == pytest.approx(count * px**2, rel=0.01)


@pytest.mark.parametrize("name", _models.MLLMS)
def test_tokens_of_an_image(name, tmp_path):
    mllm = _models.random_mllm(name, tmp_path, full=False)
    features = mllm.encode("a", [torch.rand(512, 512, 3)])
    assert int((features.modality == Modality.IMAGE).sum()) == costs.mllm_tokens(name)


@pytest.mark.parametrize("family", costs.FAMILIES)
def test_sizes_are_the_releases(family):
    skip_what_the_host_cannot_build(family)
    shapes = [value.shape for value in _models.dit.build(family, _models.release_sizes(family)).state_dict().values()]
    assert sum(map(torch.Size.numel, shapes)) == BACKBONES[family].training.sizes.parameters
