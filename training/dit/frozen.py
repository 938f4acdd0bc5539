"""The frozen DiT, run by the host with gradients to its context tokens."""

from contextlib import contextmanager

import comfy.ldm.flux.math
import comfy.model_management
import torch
from torch import Tensor, nn

from ...dla.context import Context
from ...loaders import host
from ...loaders.backbones import TRAINED, backbone_of, titles
from ...loaders.conditioning import values_of
from ...loaders.dit import context_width, dit_of
from ...sampling.attention import KeyStrengthAttention
from ...sampling.tokens import key_strengths, token_parts
from .checkpointing import in_place, recomputed
from .lora import LoRA


class GradientError(RuntimeError):
    """This host, or this way of loading the model, cannot give right gradients; the text says what to do."""


class FrozenDiT:
    """A MODEL to train through: velocities of the host's own forward, with gradients to context tokens and a LoRA.

    Its weights stay frozen; with `checkpointing` only the blocks' inputs are kept for the backward pass. Raises
    GradientError on hosts whose gradients are wrong, ValueError for a family whose record says nothing of training.
    """

    def __init__(self, model, checkpointing: bool = True):
        backbone = backbone_of(model)
        if backbone is None or backbone.training is None:
            raise ValueError(
                f"Training needs {titles(TRAINED)} as ComfyUI runs them; this model is "
                f"{type(dit_of(model.model)).__name__}. Load one of these with Load Diffusion Model."
            )
        self.family = backbone
        if host.is_dynamic(model):
            model = model.clone(disable_dynamic=True)  # weights that come and go have no place in a backward pass
        self.patcher, self.base = model, model.model
        self.dit: nn.Module = dit_of(model.model)
        self.checkpointing = checkpointing
        self.lora: LoRA | None = None
        self.context_width = context_width(model)
        self.device = model.load_device
        self.latent_channels = model.get_model_object("latent_format").latent_channels
        sigma = float(model.get_model_object("model_sampling").percent_to_sigma(0.5))
        self.shift = sigma / (1 - sigma)  # the model's time shift, see flow.FlowTimes
        check_rotation()

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the host's arithmetic in the DiT, whatever its weights' storage."""
        return self.base.manual_cast_dtype or self.base.get_dtype()

    def load(self, memory_required: int = 0) -> None:
        """Puts the DiT on the device, with so many bytes left free, in weights that autograd can use."""
        make_trainable_through(self.base)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory_required)
        make_trainable_through(self.base)  # the host puts weights back that another job's LoRA had patched
        self.base.requires_grad_(False)

    @contextmanager
    def gradients(self):
        """Around forward and backward pass: what makes the host's forward differentiable and right."""
        blocks = [block for name in self.family.training.blocks for block in getattr(self.dit, name)]
        trained = self.lora.inside if self.lora is not None else lambda _: ()
        with host.in_training(), recomputed(blocks, trained) if self.checkpointing else in_place():
            yield

    def latent(self, latent: Tensor) -> Tensor:
        """The VAE's latents (b, c, h, w) or (b, c, 1, h, w), as the DiT wants them."""
        return self.base.process_latent_in(latent.to(self.device))

    def velocity(
        self,
        noisy: Tensor,
        t: Tensor,
        context: Context | None,
        references: list[Tensor] = (),
        *,
        method: str | None = None,
        pooled: Tensor | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Predicted velocity, as `noisy` (b, c, h, w) or (b, c, 1, h, w) in latent units, fp32.

        Args:
            noisy: (b, c, h, w) or (b, c, 1, h, w), in latent units.
            t: (b,), flow times.
            context: None = no context tokens, exactly as a stage leaves them out.
            references: VAE latents (b, c, h, w) each, as the VAE gives them.
            method: Their placement.
            pooled: (b, p), FLUX.1's CLIP-L.
            guidance: Distilled guidance.

        Raises:
            GradientError: Where the output does not depend on the context for autograd.
        """
        batch, mask, settings = noisy.shape[0], None, dict(method=method, guidance=guidance)
        if context is None:
            tokens = noisy.new_zeros(batch, self.family.context_off_tokens, self.context_width)
        else:
            tokens, mask = context.tokens, context.attention_mask
        family = self.family
        # of tokens, for the whole batch; with references in the context, the picture's position follows from it
        one_number = family.counts_context or family.pads_context or family.references_in_context
        if mask is not None and one_number and not bool(mask.all()):
            rows = [slice(i, i + 1) for i in range(batch)]
            vectors = [None if pooled is None else pooled[i] for i in rows]
            parts = zip(rows, map(context.row, range(batch)), vectors)
            found = [
                self.velocity(noisy[i], t[i], row, [r[i] for r in references], pooled=vector, **settings)
                for i, row, vector in parts
            ]
            return torch.cat(found)
        every = torch.ones(1, tokens.shape[1], dtype=torch.bool, device=self.device)  # padding is taken out below
        references = [reference.to(self.device) for reference in references]
        values = values_of(every, self.family.counts_context, pooled=pooled, references=references, **settings)
        conds = self.base.extra_conds(
            noise=noisy, device=self.device, prompt_type="positive", cross_attn=tokens, **values
        )
        conds = {key: c.process_cond(batch_size=batch, device=self.device, area=None).cond for key, c in conds.items()}
        options = dict(self.patcher.model_options.get("transformer_options", {}))
        options |= {"cond_or_uncond": [0], "uuids": list(range(batch)), "sigmas": t}
        strengths = self._log_strengths(conds, noisy, mask)
        if strengths is not None:
            previous = options.get("optimized_attention_override")
            options["optimized_attention_override"] = KeyStrengthAttention(strengths, 1, self.device, previous)
        denoised = self.base.apply_model(noisy, t.to(noisy), transformer_options=options, **conds)
        if torch.is_grad_enabled() and tokens.requires_grad and not denoised.requires_grad:
            raise GradientError(
                "The diffusion model's output does not depend on its context for autograd: its kernels have no "
                "backward pass (fp8_e4m3fn_fast, nunchaku, GGUF kernels or a compiled model). Load it with weight "
                "dtype default, fp8_e4m3fn or fp8_e5m2."
            )
        t = t.reshape(-1, *[1] * (noisy.ndim - 1))
        return (noisy - denoised) / t

    def _log_strengths(self, conds: dict, noisy: Tensor, mask: Tensor | None) -> Tensor | None:
        """(b, keys): keys taken out of attention, for a context that is off or padding; None where nothing is."""
        if mask is not None and bool(mask.all()):
            return None
        latents = [latent.shape[1:] for latent in conds.get("ref_latents", [])]
        count, on = conds["c_crossattn"].shape[1], float(mask is not None)
        parts = token_parts(self.family, None, count, noisy.shape, {"ref_latents": latents})
        logs = key_strengths(parts, on, [(1.0, None)] * len(latents))
        logs = logs.repeat(noisy.shape[0], 1)
        if mask is not None:
            logs[:, :count].masked_fill_(~mask.cpu(), -torch.inf)
        return logs


def make_trainable_through(module: nn.Module) -> None:
    """Replaces weights that were made under inference mode, as the host's nodes do, which no backward pass may keep.

    A parameter stays one of them when it is moved, and is known by having no version; one that the host made outside of
    a tensor from inside has a version.
    """

    def fresh(tensor: Tensor | None) -> bool:
        try:
            return tensor is None or not tensor.is_inference() and tensor._version >= 0
        except RuntimeError:
            return False

    for part in module.modules():
        for name, tensor in part._parameters.items():
            if not fresh(tensor):
                part._parameters[name] = nn.Parameter(tensor.clone(), requires_grad=False)
        for name, tensor in part._buffers.items():
            if not fresh(tensor):
                part._buffers[name] = tensor.clone()


def check_rotation() -> None:
    """Raises GradientError where the host's rotary embedding gives no or wrong gradients (0.8 to 0.13, comfy-kitchen).

    A rotation is linear: <f(x), g> must be <x, gradient>.
    """
    draw = torch.Generator().manual_seed(0)
    x, g = (torch.randn(1, 1, 3, 8, generator=draw) for _ in range(2))
    angles = comfy.ldm.flux.math.rope(torch.arange(3.0)[None], 8, 10000).unsqueeze(1)
    with host.in_training():
        for name, rotate in host.rotations().items():
            leaf = x.clone().requires_grad_()
            out = rotate(leaf, angles)
            gradient = torch.autograd.grad(out, leaf, g, allow_unused=True)[0] if out.requires_grad else None
            if gradient is None or not torch.allclose((out * g).sum(), (x * gradient).sum(), rtol=1e-4, atol=1e-4):
                raise GradientError(
                    f"This ComfyUI ({host.version()}) computes rotary embeddings ({name}) with kernels that have no "
                    "right gradient, so nothing trained here would be right. Update ComfyUI to 0.14 or newer, or use "
                    "one before 0.8, or uninstall comfy-kitchen."
                )
