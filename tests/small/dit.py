"""Random DiTs in the host's own layouts, of full width and one layer or tiny, through its own detection and loaders."""

import inspect
from dataclasses import fields
from importlib import import_module

import torch

from ...loaders.backbones import BACKBONES

FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072,
    mlp_ratio=4.0, num_heads=24, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
    qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
)  # fmt: skip
CONFIGS = {  # of full width and one layer
    "flux": FLUX,
    "qwen_image": dict(in_channels=64, num_layers=1),
    "omnigen2": dict(
        axes_dim_rope=[40, 40, 40], axes_lens=[1024, 1664, 1664], ffn_dim_multiplier=None, hidden_size=2520,
        in_channels=16, multiple_of=256, norm_eps=1e-05, num_attention_heads=21, num_kv_heads=7, num_layers=1,
        num_refiner_layers=1, out_channels=None, patch_size=2, text_feat_dim=2048, timestep_scale=1000.0,
    ),
    "flux2": FLUX | dict(
        image_model="flux2", in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=15360, hidden_size=6144,
        mlp_ratio=3.0, num_heads=48, depth_single_blocks=0, axes_dim=[32] * 4, theta=2000, patch_size=1, qkv_bias=False,
        global_modulation=True, mlp_silu_act=True, ops_bias=False, default_ref_method="index", ref_index_scale=10.0,
        txt_ids_dims=[3],
    ),
    "longcat_image": FLUX | dict(vec_in_dim=None, context_in_dim=3584, guidance_embed=False, txt_ids_dims=[1, 2]),
    "krea2": dict(layers=1),
    "mage_flow": dict(num_layers=1),
    "joyimage": dict(num_layers=1),
    "boogu": dict(num_layers=1, num_double_stream_layers=1, num_refiner_layers=1),
    "z_image": dict(
        patch_size=2, in_channels=16, dim=3840, cap_feat_dim=2560, n_layers=1, n_refiner_layers=1, qk_norm=True,
        n_heads=30, n_kv_heads=30, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512], rope_theta=256.0,
        ffn_dim_multiplier=8 / 3, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32,
        siglip_feat_dim=1152,
    ),
    "ming_image": dict(
        image_model="ming_image", patch_size=2, in_channels=16, dim=3840, cap_feat_dim=2560, n_layers=1,
        n_refiner_layers=1, qk_norm=True, n_heads=30, n_kv_heads=30, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512],
        rope_theta=256.0, ffn_dim_multiplier=8 / 3, z_image_modulation=True, time_scale=1000.0, masked_pad_multiple=32,
    ),
    "qwen_image21": dict(num_layers=1),
}  # fmt: skip
CLASSES = {  # of the host, under comfy.ldm; FLUX.1's for the others
    "qwen_image": "qwen_image.model.QwenImageTransformer2DModel",
    "omnigen2": "omnigen.omnigen2.OmniGen2Transformer2DModel",
    "krea2": "krea2.model.SingleStreamDiT",
    "mage_flow": "mage_flow.model.MageFlowTransformer2DModel",
    "joyimage": "joyimage.model.JoyImageTransformer3DModel",
    "boogu": "boogu.model.BooguTransformer2DModel",
    "z_image": "lumina.model.NextDiT",
    "ming_image": "lumina.model.NextDiT",
    "qwen_image21": "qwen_image21.model.QwenImage21Transformer2DModel",
}
FAMILIES = tuple(CONFIGS)
# FLUX.2 Klein 4B's widths; ComfyUI 0.3.75 takes its number of heads for dev's
KLEIN = dict(hidden_size=3072, num_heads=24, context_in_dim=7680, guidance_embed=False, depth_single_blocks=1)
TINY = {
    "flux": dict(
        hidden_size=32, num_heads=2, axes_dim=[4, 6, 6], context_in_dim=24, vec_in_dim=8, depth=2, depth_single_blocks=1
    ),
    "longcat_image": dict(hidden_size=32, num_heads=2, axes_dim=[4, 6, 6], depth=2),
    "flux2": dict(hidden_size=64, num_heads=2, axes_dim=[8] * 4, context_in_dim=24, depth_single_blocks=1),
    "qwen_image": dict(num_attention_heads=2, joint_attention_dim=24, num_layers=2),
    "omnigen2": dict(
        hidden_size=48, num_attention_heads=2, num_kv_heads=1, axes_dim_rope=[8] * 3, text_feat_dim=24, multiple_of=8,
        num_layers=2, num_refiner_layers=1,
    ),
    "krea2": dict(features=32, heads=2, kvheads=1, layers=2, txtdim=8, txtlayers=3, txtheads=2, txtkvheads=2),
    "mage_flow": dict(num_attention_heads=2, num_layers=2),
    "joyimage": dict(hidden_size=256, num_attention_heads=2, text_dim=24, num_layers=2),
    "boogu": dict(
        hidden_size=48, num_attention_heads=2, num_kv_heads=1, axes_dim_rope=[8] * 3, instruction_feat_dim=24,
        multiple_of=8, num_layers=1, num_double_stream_layers=2, num_refiner_layers=1,
    ),
    "z_image": CONFIGS["z_image"] | dict(  # padded to 5, so that no two groups have a number of tokens
        dim=256, n_heads=2, n_kv_heads=2, cap_feat_dim=24, n_layers=2, siglip_feat_dim=12,
        pad_tokens_multiple=5,
    ),
    "ming_image": CONFIGS["ming_image"] | dict(dim=256, n_heads=2, n_kv_heads=2, cap_feat_dim=24, n_layers=2),
    "qwen_image21": dict(
        num_attention_heads=2, attention_head_dim=16, axes_dims_rope=[4, 6, 6], context_in_dim=24, num_layers=2
    ),
}  # fmt: skip


def build(family: str, sizes=(), dtype=torch.bfloat16, operations=None) -> torch.nn.Module:
    """The host's own class, on the meta device."""
    import comfy.ldm.flux.model
    import comfy.ops

    config = CONFIGS[family] | dict(sizes)
    # hosts before FLUX-like models with text positions don't know the parameter
    if "txt_ids_dims" not in {field.name for field in fields(comfy.ldm.flux.model.FluxParams)}:
        config.pop("txt_ids_dims", None)
    module, name = CLASSES.get(family, "flux.model.Flux").rsplit(".", 1)
    module = import_module(f"comfy.ldm.{module}")
    if family == "qwen_image21":  # the host's kernel for processors adds the causal mask's ones to the logits
        module.optimized_attention = import_module("comfy.ldm.modules.attention").attention_pytorch
    model = getattr(module, name)
    return model(**config, device="meta", dtype=dtype, operations=operations or comfy.ops.disable_weight_init)


def on_this_host(family: str) -> bool:
    """Whether the host has the family's class: older ones run LongCat-Image as another model, without an error."""
    import comfy.model_base
    from comfy.ldm.lumina import model

    if family == "z_image" and "ref_latents" not in inspect.getsource(model):
        return False  # Z-Image without references
    return hasattr(comfy.model_base, BACKBONES[family].host_class)


def _random(model, dtype, seed: int = 0, spread: float = 0.02) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out, one = {}, "krea2" not in type(model).__module__  # which adds one to its scales itself
    for key, value in model.state_dict().items():
        deviation = spread if value.ndim > 1 else 0.1
        # a processor draws a thousand million normal numbers in half a minute: large matrices repeat some
        drawn = torch.empty(min(value.numel(), 2**22 + 15), dtype=dtype).normal_(0, deviation, generator=generator)
        weights = drawn.repeat(-(-value.numel() // max(drawn.numel(), 1)))[: value.numel()].reshape(value.shape)
        out[key] = weights + one if value.ndim == 1 and not key.endswith("bias") else weights  # norm scales: near one
    return out


def load(family: str, monkeypatch, sizes=()):
    """MODEL of full width and one layer, through the host's own detection and loader."""
    import comfy.model_detection as detection
    import comfy.sd

    original = detection.detect_unet_config

    def shortened(*args, **kwargs):  # OmniGen2's depth is written into the host's detection
        config = original(*args, **kwargs)
        if config and config.get("image_model") == "omnigen2":
            config.update(num_layers=1, num_refiner_layers=1)
        if config and config.get("image_model") in ("lumina2", "ming_image"):
            config.update(n_refiner_layers=1)
        return config

    monkeypatch.setattr(detection, "detect_unet_config", shortened)
    return comfy.sd.load_diffusion_model_state_dict(_random(build(family, sizes), torch.bfloat16))


def load_trained(family: str, monkeypatch):
    """As `load`, of the widths of the release that is trained: FLUX.2 Klein 4B's."""
    from ...loaders.dit import build_dit

    if family != "flux2":
        return load(family, monkeypatch)
    return build_dit(_random(build("flux2", KLEIN), torch.bfloat16), KLEIN, {}, "Klein")


def tiny(family: str, seed: int = 0, **sizes):
    """MODEL of a few channels and two layers; what the host knows by heart is passed as a file's `unet_config`."""
    from ...loaders.dit import build_dit

    sizes = TINY[family] | sizes
    weights = _random(build(family, sizes, torch.float32), torch.float32, seed, 0.2)
    return build_dit(weights, sizes, {}, f"tiny {family}")


def tiny_flux(context_width: int = 24, seed: int = 0, **sizes):
    """A tiny FLUX.1 with its context's width chosen."""
    return tiny("flux", seed, context_in_dim=context_width, **sizes)


def tiny_chroma():
    """A tiny DiT that reads no references; its blocks are FLUX.1's."""
    import comfy.ops
    from comfy.ldm.chroma.model import Chroma, ChromaParams

    from ...loaders.dit import build_dit

    sizes = FLUX | TINY["flux"] | dict(image_model="chroma", in_channels=64, out_channels=64)
    sizes |= dict(in_dim=64, out_dim=32, hidden_dim=16, n_layers=1, vec_in_dim=None)
    known = {"image_model", *(field.name for field in fields(ChromaParams))}  # which hosts differ in
    sizes = {name: size for name, size in sizes.items() if name in known}
    module = Chroma(**sizes, device="meta", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    return build_dit(_random(module, torch.float32, 0, 0.2), sizes, {}, "tiny Chroma")


class TinyVAE:
    """Latents of a family's form, from the pixels alone; counts what it encodes."""

    def __init__(self, backbone):
        self.backbone, self._calls = backbone, []  # no number: that would be a setting of the VAE
        self.first_stage_model = torch.nn.Module()  # without weights

    @property
    def encoded(self):
        return len(self._calls)

    def spacial_compression_encode(self):
        return self.backbone.latent_downscale

    def encode(self, pixels):
        self._calls.append(tuple(pixels.shape))
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), self.backbone.latent_downscale)
        latent = small.repeat(1, -(-self.backbone.latent_channels // 3), 1, 1)[:, : self.backbone.latent_channels]
        return latent.unsqueeze(2) if self.backbone.latent_dimensions == 3 else latent

    def decode(self, latent):
        small = latent[:, :, 0] if latent.ndim == 5 else latent
        large = torch.nn.functional.interpolate(small[:, :3], scale_factor=self.backbone.latent_downscale)
        return large.movedim(1, -1).clamp(0, 1)
