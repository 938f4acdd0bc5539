"""A LoRA to start from: the same thing in other names is taken over, another layout is called foreign."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from subject_dla.loaders.backbones import BACKBONES
from subject_dla.training.dit.lora import LoRA
from torch.nn import Linear, ModuleDict, ModuleList

HERE = "diffusion_model.double_blocks.0.img_attn.qkv"
MODULE = HERE.removeprefix("diffusion_model.")


def lora(alpha=None):
    attention = ModuleDict({"img_attn": ModuleDict({"qkv": Linear(16, 48)})})
    return LoRA(ModuleDict({"double_blocks": ModuleList([attention])}), BACKBONES["flux"], 2, alpha)


@pytest.fixture
def made(tmp_path):
    """A LoRA with weights, and its tensors A, B and alpha."""
    found = lora()
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    found.save(tmp_path / "own.safetensors")
    state = load_file(tmp_path / "own.safetensors")
    return found, (state[f"{HERE}.lora_A.weight"], state[f"{HERE}.lora_B.weight"], state[f"{HERE}.alpha"])


LAYOUTS = {
    "own": (HERE, "lora_A.weight", "lora_B.weight"),
    "Kohya": ("lora_unet_double_blocks_0_img_attn_qkv", "lora_down.weight", "lora_up.weight"),
    "diffusers": (f"transformer.{MODULE}", "lora_A.weight", "lora_B.weight"),
    "older diffusers": (f"transformer.{MODULE}", "lora.down.weight", "lora.up.weight"),
    "PEFT": (f"base_model.model.{MODULE}", "lora_A.default.weight", "lora_B.default.weight"),
    "PEFT around the DiT": (f"base_model.model.{HERE}", "lora_A.weight", "lora_B.weight"),
    "no prefix": (MODULE, "lora_A.weight", "lora_B.weight"),
}


@pytest.mark.parametrize("alpha", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_thing_in_other_names_is_taken_over(made, tmp_path, layout, alpha):
    first, (a, b, scale) = made
    name, down, up = LAYOUTS[layout]
    state = {f"{name}.{down}": a, f"{name}.{up}": b} | ({f"{name}.alpha": scale.reshape(1)} if alpha else {})
    save_file(state, tmp_path / "other.safetensors")
    second = lora()
    second.load(tmp_path / "other.safetensors")
    ours, theirs = first.weights(), second.weights()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_without_alpha_the_rank_is_compared(made, tmp_path):
    _, (a, b, _) = made
    save_file({f"{HERE}.lora_A.weight": a, f"{HERE}.lora_B.weight": b}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="alpha is 2, expected 8. Set lora.alpha = 2"):
        lora(alpha=8.0).load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "a foreign layout .* expected keys such as"),
        (["lora_unet_down_blocks_0_attentions_0_proj_in.hada_w1_a"], "a foreign layout .* Convert it"),
        (["blocks.0.weight"], "has keys such as blocks.0.weight: a foreign layout"),
        ([f"{HERE}.lora_A.weight", f"{HERE}.lora_B.weight", f"{HERE}.dora_scale"], "has .*dora_scale too"),
        ([f"{HERE}.lora_A.weight", f"{HERE}.lora_B.weight", "x.txt_mlp.0.lora_A.weight"], "txt_mlp.0.lora_A.* too"),
        ([f"{HERE}.lora_A.weight"], "lora_B.weight is nothing, expected"),
        ([f"{HERE}.lora_A.weight", f"{MODULE}.lora_A.weight"], "under two names"),
    ],
)
def test_another_layout_is_called_foreign(made, tmp_path, keys, text):
    _, (a, b, _) = made
    save_file({key: (b if "lora_B" in key else a).clone() for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"LoRA file 'x.safetensors'.*{text}"):
        lora().load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("damage", "text"), [
    ("nan", "NaN or infinite"), ("int8", "torch.int8, expected fp16"), ("fp64", "NaN or infinite in fp32"),
])  # fmt: skip
def test_weights_that_are_no_finite_floats_are_refused(made, tmp_path, damage, text):
    _, (a, b, _) = made
    values = {"int8": b.to(torch.int8), "fp64": b.double() + 1e300}  # which fp32 has not
    b = values.get(damage, b * float("nan"))
    save_file({f"{HERE}.lora_A.weight": a, f"{HERE}.lora_B.weight": b}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"LoRA file 'x.safetensors': .*{text}"):
        lora().load(tmp_path / "x.safetensors")
