"""Trains the oracle on renders, a third of them through the VAE as generated pictures are.

    python common/bootstrap.py demo.family.train_oracle COMFYUI DATA RUN [--steps N] [--start FILE]

reads RUN/models/vae, writes RUN/oracle.safetensors (fp16) with its own errors on pictures of the test split.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...evaluation.copy_paste.metrics import copy_paste_report
from . import loop
from .data import load_pictures, picture_paths, read_entries
from .latents import decode, encode, encode_cached, load_vae
from .oracle import COARSE, FINE, TRAITS, Oracle, labels, split_logits

BATCH, DECODED = 64, 2000  # DECODED: how many pictures are decoded from their latents, once


def main() -> None:
    """The command."""
    options = loop.setup(__doc__, 3000)
    entries = read_entries(options.data, "pairs")
    paths, pictures = picture_paths(entries), [picture for entry in entries for picture in entry["pictures"]]
    single = [number for number, picture in enumerate(pictures) if len(picture.toys) == 1]
    data = load_pictures(options.data, [paths[number] for number in single])
    latents = encode_cached(options.data, paths, options.run)[single]
    vae = load_vae(options.run)
    decoded = [decode(vae, part.float()).mul(255).round().byte() for part in latents[:DECODED].split(16)]
    decoded = torch.cat(decoded).contiguous()
    traits, angles = labels([pictures[number] for number in single])
    model = Oracle().to(memory_format=torch.channels_last)
    loop.load_matching(model, options.start)

    def loss_terms(step: int) -> dict[str, Tensor]:
        generator = loop.step_generator(3, step)
        index = torch.randint(len(data), (BATCH,), generator=generator)
        index[2 * BATCH // 3 :] %= DECODED
        x = torch.cat((data[index[: 2 * BATCH // 3]], decoded[index[2 * BATCH // 3 :]])).float().div(255)
        x = x + 0.03 * torch.randn(BATCH, 3, 1, 1, generator=generator)
        x = x + 0.02 * torch.randn(x.shape, generator=generator)
        out = model(x.contiguous(memory_format=torch.channels_last)).float()
        logits = enumerate(split_logits(out, tuple(TRAITS)).items())
        terms = {name: 0.2 * F.cross_entropy(part, traits[index, i]) for i, (name, part) in logits}
        return {"angles": 4 * F.mse_loss(out[:, :3], angles[index])} | terms

    record = loop.train("oracle", model, loss_terms, options.run, steps=options.steps, learning_rate=2e-3, warmup=200)
    model.eval()
    entries = read_entries(options.data, "test")
    pictures = [picture for entry in entries for picture in entry["pictures"]]
    toys = [picture.toys[0] for picture in pictures]
    expected = torch.tensor([[picture.view.azimuth, picture.view.polar] for picture in pictures])
    x = load_pictures(options.data, picture_paths(entries))
    record["floor"] = {}
    decoded = torch.cat([decode(vae, encode(vae, part)) for part in x.split(64)])
    for name, images in (("renders", x.float().div(255)), ("through the VAE", decoded)):
        reading = model.read(images)
        report = copy_paste_report(expected, reading.angles)
        record["floor"][name] = {
            "azimuth": round(report.azimuth, 2), "polar": round(report.polar, 2),
            "average recall": round(report.average_recall, 3),
            "coarse": round(float(reading.accuracy(COARSE, toys).mean()), 4),
            "fine": round(float(reading.accuracy(FINE, toys).mean()), 4),
        }  # fmt: skip
    loop.save_weights(options.run / "oracle.safetensors", model.state_dict(), record)
    loop.log(f"oracle: {record['floor']}")


if __name__ == "__main__":
    main()
