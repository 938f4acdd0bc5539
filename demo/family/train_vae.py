"""Trains the demo's VAE: TAESD's layout, which the host loads, from nothing, on the demo's pictures.

    python common/bootstrap.py demo.family.train_vae COMFYUI DATA RUN [--steps N]

writes RUN/models/vae (fp16). Latents have FLUX.1's 16 channels at an eighth of the size; scaled for the DiT, their
standard deviation is 1.
"""

import torch
from torch import Tensor

from . import loop
from .data import load_pictures, picture_paths, read_entries
from .layout import FLUX_SCALE, FLUX_SHIFT, NAMES

CROP, BATCH, NOISE = 64, 24, 0.1  # NOISE: on latents, so that near latents mean near pictures


def main() -> None:
    """The command."""
    options = loop.setup(__doc__, 3000)
    model = _new_vae().to(memory_format=torch.channels_last)
    data = load_pictures(options.data, picture_paths(read_entries(options.data, "training")[:8000]))

    def loss_terms(step: int) -> dict[str, Tensor]:
        generator = loop.step_generator(1, step)
        index = torch.randint(len(data), (BATCH,), generator=generator)
        y, x = torch.randint(0, (data.shape[-1] - CROP) // 8 + 1, (2,), generator=generator) * 8
        x0 = data[index, :, y : y + CROP, x : x + CROP].float().div(255).contiguous(memory_format=torch.channels_last)
        z = model.taesd_encoder(x0)
        noise = torch.randn(z.shape, generator=generator)
        out = model.taesd_decoder(z + NOISE * noise).float()
        z, error = z.float(), out - x0
        edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
        spread = z.var((0, 2, 3)).add(1e-6).log().square().mean() + z.mean((0, 2, 3)).square().mean()
        return {"l1": error.abs().mean(), "l2": 4 * error.square().mean(), "edges": edges, "spread": 0.02 * spread}

    record = loop.train("vae", model, loss_terms, options.run, steps=options.steps, learning_rate=2e-3, warmup=200)
    model.eval()
    with torch.no_grad(), loop.autocast():
        x0 = data[:256].float().div(255)
        z = model.taesd_encoder(x0)
        error = (model.taesd_decoder(z).float().clamp(0, 1) - x0).square().mean()
    record["psnr"] = round(float(-10 * error.log10()), 2)
    model.vae_scale.data.fill_(FLUX_SCALE * float(z.float().std()))
    model.vae_shift.data.fill_(FLUX_SHIFT)
    loop.save_weights(options.run / "models" / "vae" / NAMES["vae"], model.state_dict(), record)
    loop.log(f"vae: {record['psnr']} dB")


def _new_vae():
    """The host's class with fresh weights, which its own layers lack."""
    from comfy.taesd.taesd import TAESD

    model = TAESD(latent_channels=16)
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Conv2d):
            part.weight.data = torch.nn.init.kaiming_normal_(torch.empty_like(part.weight))
            if part.bias is not None:
                part.bias.data.zero_()
        if name.endswith("conv.4"):  # last of a residual block: branches start small
            part.weight.data.mul_(0.1)
    with torch.no_grad():
        model.vae_scale.fill_(1.0)
        model.vae_shift.fill_(0.0)
    return model.requires_grad_(True)


if __name__ == "__main__":
    main()
