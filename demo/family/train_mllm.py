"""Trains the demo's MLLM: Qwen2.5-VL's layout made small, from nothing, to describe pictures and prompts' targets.

    python common/bootstrap.py demo.family.train_mllm COMFYUI DATA RUN [--steps VISION TEXT] [--start FILE]

writes RUN/models/mllm, a Hugging Face folder (fp16). To read a prompt with a reference and describe the whole target is
what the stock Qwen-Image template asks of the MLLM; the DiT gets the hidden states, not the answer. As in real training
every word after the pictures is predicted, the prompt's as well: so the last layers turn to the next word.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...dla.features import ImageGrid
from . import loop
from .data import load_pictures, picture_paths, read_entries
from .layout import CONTEXT_WIDTH, NAMES
from .mllm_folder import write_folder
from .mllm_tasks import Tasks
from .oracle import COARSE, TRAITS, labels, split_logits

VISION_BATCH, BATCH = 64, 32
IGNORED = -100  # label of a token that is not predicted


def main() -> None:
    """The command."""
    options = loop.setup(__doc__, 5000, 3000)
    from ...loaders.mllm.templates import QWEN_IMAGE

    folder = options.run / "models" / "mllm" / NAMES["mllm"]
    config = write_folder(folder, QWEN_IMAGE)
    model = _TrainableMLLM(config, folder)
    loop.load_matching(model.backbone, options.start, lambda key: re.sub("^model.", "language_model.", key))
    entries = read_entries(options.data, "training")
    pairs = zip(picture_paths(entries), [picture for entry in entries for picture in entry["pictures"]])
    paths, pictures = zip(*((path, picture) for path, picture in pairs if len(picture.toys) == 1))
    data, tasks = load_pictures(options.data, list(paths)), Tasks(list(pictures), "training")
    traits, angles = labels(list(pictures))
    head = _VisionHead()

    def vision_terms(step: int) -> dict[str, Tensor]:
        index = torch.randint(len(data), (VISION_BATCH,), generator=loop.step_generator(4, step))
        return {"traits": head.loss(model.encode_images(data[index])[0], traits[index], angles[index])}

    def text_terms(step: int) -> dict[str, Tensor]:
        samples = [tasks[step * BATCH + i] for i in range(BATCH)]
        index = [number for images, *_ in samples for number in images]
        tokens, grid = model.encode_images(data[index])
        words = model(*model.batch(samples, grid), tokens)
        return {"words": words, "traits": head.loss(tokens, traits[index], angles[index])}

    run, (vision_steps, text_steps) = options.run, options.steps
    vision, both = nn.ModuleList([model.backbone.visual, head]), nn.ModuleList([model, head])
    record = {"phases": [
        loop.train("mllm-vision", vision, vision_terms, run, steps=vision_steps, learning_rate=1e-3, warmup=200),
        loop.train("mllm", both, text_terms, run, steps=text_steps, learning_rate=1.5e-3, warmup=300),
    ]}  # fmt: skip
    record["answers wholly right, held out"] = accuracy = _accuracy(model, options.data)
    weights = {f"model.{key.removeprefix('language_model.')}" if key.startswith("language_model.") else key: value
               for key, value in model.backbone.state_dict().items()}  # fmt: skip
    loop.save_weights(folder / "model.safetensors", weights, record, {"format": "pt"})
    loop.log(f"mllm: {accuracy}")


@torch.no_grad()
def _accuracy(model: _TrainableMLLM, data: Path) -> dict[str, float]:
    """By kind of task, the share of answers that are right in every word, on held-out toys."""
    entries = read_entries(data, "validation")
    pictures = load_pictures(data, [entry["image_paths"][0] for entry in entries])
    tasks = Tasks([entry["pictures"][1] for entry in entries], "validation")
    right = {kind: [] for kind in ("describe", "ask", "question", "repeat")}
    model.eval()
    with loop.autocast():
        for start in range(0, 512, 64):
            samples = [tasks[start + i] for i in range(64)]
            tokens, grid = model.encode_images(pictures[[number for images, *_ in samples for number in images]])
            logits, expected = model.logits(*model.batch(samples, grid), tokens)
            correct = (logits.argmax(-1) == expected) | (expected == IGNORED)
            for (*_, answer, kind), row, label in zip(samples, correct, expected):
                predicted = (label != IGNORED).nonzero()[-len(model.tokens(answer)) - 1 :, 0]
                right[kind].append(bool(row[predicted].all()))
    return {kind: round(sum(answers) / len(answers), 3) for kind, answers in right.items()}


class _VisionHead(nn.Module):
    """Reads coarse traits and view off the mean of the vision tower's tokens; dropped after training.

    Text alone trains the vision tower too slowly, and an attention head of the language model can take a mean as well.
    """

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(CONTEXT_WIDTH)
        self.head = nn.Linear(CONTEXT_WIDTH, 3 + sum(len(TRAITS[name]) for name in COARSE))

    def loss(self, tokens: Tensor, traits: Tensor, angles: Tensor) -> Tensor:
        out = self.norm(rearrange(tokens, "(b n) c -> b n c", b=len(traits)).float())
        out = self.head(out.mean(1)).float()
        logits = split_logits(out, COARSE).items()
        errors = [0.2 * F.cross_entropy(part, traits[:, list(TRAITS).index(name)]) for name, part in logits]
        return F.mse_loss(out[:, :3], angles) * 4 + sum(errors)


class _TrainableMLLM(nn.Module):
    """transformers' own Qwen2.5-VL without the pack's cast-at-use layers, and the tied LM head."""

    def __init__(self, config: dict, folder: Path):
        super().__init__()
        import transformers
        from tokenizers import Tokenizer

        from ...loaders.mllm.templates import QWEN_IMAGE

        settings = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        # Explicit softmax and a linear map of the patches: far faster backward on a CPU than the fused forms.
        self.backbone = transformers.AutoModel.from_config(settings, attn_implementation="eager").float()
        patches = self.backbone.visual.patch_embed
        patches.forward = lambda x: F.linear(x, patches.proj.weight.flatten(1))
        self.template, self.image_token = QWEN_IMAGE, config["image_token_id"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_images(self, pictures: Tensor) -> tuple[Tensor, ImageGrid]:
        """The vision tower's tokens of pictures (n, 3, h, w) uint8, concatenated, and the grid of each."""
        from ...loaders.mllm.families import FAMILIES
        from ...loaders.mllm.vision import qwen_grid, qwen_pixels

        vision = FAMILIES["qwen2_5_vl"].vision
        grid = qwen_grid(*pictures.shape[2:], vision)
        pixels = [qwen_pixels(picture.permute(1, 2, 0).float() / 255, grid, vision) for picture in pictures]
        patches = torch.tensor([[1, grid.rows * vision.merge, grid.columns * vision.merge]] * len(pictures))
        out = self.backbone.visual(torch.cat(pixels), grid_thw=patches)
        return getattr(out, "pooler_output", out), grid

    def batch(self, samples: list, grid: ImageGrid) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (b, t), positions (3, b, t), labels (b, t) of what follows the pictures, padded on the right."""
        from ...loaders.mllm.vision import mrope_positions

        rows = []
        for images, prompt, answer, _ in samples:
            ids = [None if t == self.image_token else t for t in self.tokens(self.template.text(prompt, len(images)))]
            reply = self.tokens(f"{answer}<|im_end|>")
            positions = mrope_positions(ids + reply, [grid] * len(images))[:, 0]
            flat = [i for t in ids for i in ([self.image_token] * grid.tokens if t is None else [t])]
            start = max((index for index, token in enumerate(flat) if token == self.image_token), default=0) + 1
            rows.append((flat + reply, positions, start))
        longest = max(len(ids) for ids, _, _ in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        labels, positions = torch.full_like(ids, IGNORED), torch.zeros(3, *ids.shape, dtype=torch.long)
        for row, (tokens, coordinates, start) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, start - 1 : len(tokens) - 1] = torch.tensor(tokens[start:])  # at the token before
            positions[:, row, : len(tokens)] = coordinates
        return ids, positions, labels

    def logits(self, ids: Tensor, positions: Tensor, labels: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        embeds = self.backbone.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids == self.image_token)[..., None], images.to(embeds.dtype))
        # No attention mask: padding is on the right, which causal attention does not read.
        out = self.backbone.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False)
        return F.linear(out.last_hidden_state, self.backbone.get_input_embeddings().weight), labels

    def forward(self, *batch) -> Tensor:
        logits, labels = self.logits(*batch)
        predicted = labels != IGNORED
        return F.cross_entropy(logits[predicted].float(), labels[predicted])


if __name__ == "__main__":
    main()
