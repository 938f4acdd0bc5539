"""Trains the oracle on renders, a third of them through the VAE as generated pictures are.

    python common/bootstrap.py demo.family.train_oracle COMFYUI DATA RUN [--steps N] [--start FILE]

reads RUN/models/vae, writes RUN/oracle.safetensors (fp16) with its own errors on pictures of the test split.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...evaluation.copy_paste.metrics import copy_paste_report
from . import fit, pictures
from .latents import decode, encode, encoded, load_vae
from .oracle import COARSE, FINE, TRAITS, Oracle, truth

BATCH, CODED = 64, 2000  # CODED: so many pictures are decoded from their latents, once


def main() -> None:
    options = fit.begin(__doc__, 3000)
    rows = pictures.entries(options.data, "pairs")
    places = [(number, name, picture) for number, (name, picture) in enumerate(
        (name, picture) for row in rows for name, picture in zip(pictures.paths(row), row["pictures"])) if len(picture.toys) == 1]  # fmt: skip
    shown = [picture for _, _, picture in places]
    data = pictures.load(options.data, [name for _, name, _ in places])
    latents = encoded(options.data, [name for row in rows for name in pictures.paths(row)], options.run)
    latents = latents[[number for number, _, _ in places]]
    vae = load_vae(options.run)
    coded = [decode(vae, part.float()).mul(255).round().byte() for part in latents[:CODED].split(16)]
    coded = torch.cat(coded).contiguous()
    labels, angles = truth(shown)
    model = Oracle().to(memory_format=torch.channels_last)
    fit.start(model, options.start)

    def loss_at(step: int) -> dict[str, Tensor]:
        generator = fit.draw(3, step)
        index = torch.randint(len(data), (BATCH,), generator=generator)
        index[2 * BATCH // 3 :] %= CODED
        x = torch.cat((data[index[: 2 * BATCH // 3]], coded[index[2 * BATCH // 3 :]])).float().div(255)
        x = x + 0.03 * torch.randn(BATCH, 3, 1, 1, generator=generator)
        x = x + 0.02 * torch.randn(x.shape, generator=generator)
        out = model(x.contiguous(memory_format=torch.channels_last)).float()
        logits = out[:, 3:].split([len(values) for values in TRAITS.values()], 1)
        terms = {
            name: 0.2 * F.cross_entropy(part, labels[index, i]) for i, (name, part) in enumerate(zip(TRAITS, logits))
        }
        return {"angles": 4 * F.mse_loss(out[:, :3], angles[index])} | terms

    record = fit.fit("oracle", model, loss_at, options.run, steps=options.steps, rate=2e-3, warmup=200)
    model.eval()
    held = [(name, picture) for row in pictures.entries(options.data, "test") for name, picture in zip(pictures.paths(row), row["pictures"])]  # fmt: skip
    x = pictures.load(options.data, [name for name, _ in held])
    held = [picture for _, picture in held]
    record["floor"] = {}
    coded = torch.cat([decode(vae, encode(vae, part)) for part in x.split(64)])
    for name, seen in (("renders", x.float().div(255)), ("through the VAE", coded)):
        reading = model.read(seen)
        known = torch.tensor([[picture.view.azimuth, picture.view.polar] for picture in held])
        report = copy_paste_report(known, reading.angles)
        toys = [picture.toys[0] for picture in held]
        record["floor"][name] = {
            "azimuth": round(report.azimuth, 2), "polar": round(report.polar, 2), "average recall": round(report.average_recall, 3),
            "coarse": round(float(reading.right(COARSE, toys).mean()), 4), "fine": round(float(reading.right(FINE, toys).mean()), 4),
        }  # fmt: skip
    fit.keep(options.run / "oracle.safetensors", model.state_dict(), record)
    fit.say(f"oracle: {record['floor']}")


if __name__ == "__main__":
    main()
