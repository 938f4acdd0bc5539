"""Trains the demo's MLLM: Qwen2.5-VL's layout made small, from nothing, to describe what a picture shows and what a
prompt would make of it.

    python common/bootstrap.py demo.family.train_mllm COMFYUI DATA RUN [--steps EYES WORDS] [--start FILE]

writes RUN/models/mllm, a Hugging Face folder (fp16). Reading a prompt with a reference and telling the whole target is what
the stock Qwen-Image template asks of the MLLM; the answers are dropped, the hidden states are what the DiT gets. As in a real
one's training every word after the pictures is foretold, the prompt's as well: so the last layers turn to the next word.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import fit, pictures, world
from .layout import CONTEXT_WIDTH, NAMES
from .oracle import COARSE, TRAITS, truth

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|unk|>",
)
WORDS = r"\n|[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]"
WIDTH, LAYERS, BATCH = CONTEXT_WIDTH, 8, 32
DESCRIBE = "describe the picture"
IGNORED = -100
EYES_BATCH = 64


def main() -> None:
    options = fit.begin(__doc__, 5000, 3000)  # eyes, words
    from ...loaders.mllm.templates import QWEN_IMAGE

    folder = options.run / "models" / "mllm" / NAMES["mllm"]
    config = write_folder(folder, QWEN_IMAGE)
    model = Trainable(config, folder)
    fit.start(model.backbone, options.start, lambda key: re.sub("^model.", "language_model.", key))
    rows = pictures.entries(options.data, "training")
    known = [(name, picture) for row in rows for name, picture in zip(pictures.paths(row), row["pictures"]) if len(picture.toys) == 1]  # fmt: skip
    data = pictures.load(options.data, [name for name, _ in known])
    task = Task([picture for _, picture in known], "training")
    held = pictures.entries(options.data, "validation")
    seen = [(row["image_paths"][0], row["pictures"][1]) for row in held]
    held_data, held_task = (
        pictures.load(options.data, [name for name, _ in seen]),
        Task([p for _, p in seen], "validation"),
    )

    labels, angles = truth([picture for _, picture in known])
    eyes = Eyes(model.backbone.visual)
    both = nn.ModuleDict({"mllm": model, "eyes": eyes})

    def see(step: int) -> dict[str, Tensor]:
        index = torch.randint(len(data), (EYES_BATCH,), generator=fit.draw(4, step))
        return {"traits": eyes.loss(model.see(data[index])[0], labels[index], angles[index])}

    def answer(step: int) -> dict[str, Tensor]:
        samples = [task.at(step * BATCH + i) for i in range(BATCH)]
        index = [number for images, *_ in samples for number in images]
        seen, grids = model.see(data[index])
        return {"words": model(*model.batch(samples, grids), seen), "traits": eyes.loss(seen, labels[index], angles[index])}  # fmt: skip

    look, words = options.steps
    records = [
        fit.fit("mllm-eyes", eyes, see, options.run, steps=look, rate=1e-3, warmup=200),
        fit.fit("mllm", both, answer, options.run, steps=words, rate=1.5e-3, warmup=300),
    ]
    record = {"phases": records}
    model.eval()
    right = {name: [0, 0] for name in ("describe", "ask", "question", "repeat")}
    with torch.no_grad(), fit.mixed():
        for start in range(0, 512, 64):
            samples = [held_task.at(start + i) for i in range(64)]
            seen, grids = model.see(held_data[[number for images, *_ in samples for number in images]])
            logits, labels = model.logits(*model.batch(samples, grids), seen)
            good = (logits.argmax(-1) == labels) | (labels == IGNORED)
            for (*_, reply, kind), row, label in zip(samples, good, labels):
                answer = (label != IGNORED).nonzero()[-len(model.tokens(reply)) - 1 :, 0]
                right[kind][0] += bool(row[answer].all())
                right[kind][1] += 1
    record["answers wholly right, held out"] = {name: round(a / b, 3) for name, (a, b) in right.items()}
    weights = {f"model.{re.sub('^language_model.', '', key)}" if key.startswith("language_model.") else key: value
               for key, value in model.backbone.state_dict().items()}  # fmt: skip
    fit.keep(folder / "model.safetensors", weights, record, {"format": "pt"})
    fit.say(f"mllm: {record['answers wholly right, held out']}")


class Task:
    """Endless questions about pictures: (pictures' numbers, prompt, answer, kind)."""

    def __init__(self, shown: list[world.Picture], split: str):
        self.shown, self.split = shown, split

    def at(self, number: int) -> tuple[list[int], str, str, str]:
        draw = random.Random(f"mllm {self.split} {number}")
        index = draw.randrange(len(self.shown))
        picture = self.shown[index]
        toy, kind = picture.toys[0], draw.random()
        if kind < 0.25:
            return [index], DESCRIBE, picture.caption(), "describe"
        if kind < 0.45:
            return [index], *question(draw, picture), "question"
        if kind < 0.5:
            other = draw.randrange(len(self.shown))
            example = world.ask(
                draw, [picture, self.shown[other]], (toy, self.shown[other].toys[0]), world.random_view(draw), "view"
            )
            return [index, other], example.prompt, example.target.caption(), "ask"
        named = draw.choice(("view", "view", "turn", "turn", ""))
        bin = (world.bin_of(picture.view) + draw.choice((2, 4, 6))) % 8 if named == "turn" else draw.randrange(8)
        view = world.random_view(draw, bin) if named else picture.view
        example = world.ask(draw, [picture], (toy,), view, named)
        target, prompt = example.target.caption(), example.prompt
        if kind < 0.6:  # without the reference there is no more to tell
            return [], prompt, prompt, "repeat"
        if named and not any(level in prompt for level in world.LEVELS):  # the answer tells what can be known
            target = target.rsplit(f" {view.level}", 1)[0]
        return [index], prompt, target, "ask"


def question(draw: random.Random, picture: world.Picture) -> tuple[str, str]:
    toy = picture.toys[0]
    questions = {f"what colour is its {part}?": getattr(toy, part) for part in world.PARTS}
    questions |= {"what is it?": f"a {toy.kind}", "from where is it seen?": picture.view.caption()}
    turned = {
        words: world.VIEWS[(world.bin_of(picture.view) + amount // 45) % 8] for words, amount in world.TURNS.items()
    }
    questions |= {f"which side is seen {words}?": f"the {side}" for words, side in turned.items()}
    prompt = draw.choice(tuple(questions))
    return prompt, questions[prompt]


class Eyes(nn.Module):
    """The vision tower with a head that reads traits and view off the mean of its tokens, and is then dropped: words alone
    taught it to see too slowly; and a mean is what an attention head of the language model can take as well. Coarse traits
    alone, which words name too."""

    def __init__(self, visual: nn.Module):
        super().__init__()
        self.visual = visual  # a shared part: its steps train it
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 + sum(len(TRAITS[name]) for name in COARSE))

    def loss(self, seen: Tensor, labels: Tensor, angles: Tensor) -> Tensor:
        out = self.norm(rearrange(seen, "(b n) c -> b n c", b=len(labels)).float())
        out = self.head(out.mean(1)).float()
        logits = out[:, 3:].split([len(TRAITS[name]) for name in COARSE], 1)
        return F.mse_loss(out[:, :3], angles) * 4 + sum(
            0.2 * F.cross_entropy(part, labels[:, list(TRAITS).index(name)]) for name, part in zip(COARSE, logits)
        )


class Trainable(nn.Module):
    """transformers' own Qwen2.5-VL without the pack's cast-at-use layers, and the tied LM head."""

    def __init__(self, config: dict, folder: Path):
        super().__init__()
        import transformers
        from tokenizers import Tokenizer

        from ...loaders.mllm.templates import QWEN_IMAGE

        settings = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        # explicit softmax and a linear map of the patches: far quicker backwards on a CPU than the fused forms
        self.backbone = transformers.AutoModel.from_config(settings, attn_implementation="eager").float()
        patches = self.backbone.visual.patch_embed
        patches.forward = lambda x: F.linear(x, patches.proj.weight.flatten(1))
        self.template, self.image_token = QWEN_IMAGE, config["image_token_id"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def see(self, shown: Tensor) -> tuple[Tensor, Tensor]:
        """The vision tower's tokens of pictures (n, 3, h, w) uint8, one picture after another, and the grid of each."""
        from ...loaders.mllm.families import FAMILIES
        from ...loaders.mllm.vision import qwen_grid, qwen_pixels

        vision = FAMILIES["qwen2_5_vl"].vision
        grid = qwen_grid(*shown.shape[2:], vision)
        pixels = [qwen_pixels(picture.permute(1, 2, 0).float() / 255, grid, vision) for picture in shown]
        grids = torch.tensor([[1, grid.rows * vision.merge, grid.columns * vision.merge]] * len(shown))
        out = self.backbone.visual(torch.cat(pixels), grid_thw=grids)
        return getattr(out, "pooler_output", out), grids

    def batch(self, samples: list, grids: Tensor):
        """ids, positions (3, b, t) and labels (of what follows the pictures), padded on the right."""
        from ...dla.features import ImageGrid
        from ...loaders.mllm.vision import mrope_positions

        grid, rows = ImageGrid(*(grids[0, 1:] // 2).tolist()), []  # all of one size
        for images, prompt, answer, _ in samples:
            ids = [None if t == self.image_token else t for t in self.tokens(self.template.text(prompt, len(images)))]
            reply = self.tokens(f"{answer}<|im_end|>")
            positions = mrope_positions(ids + reply, [grid] * len(images))[:, 0]
            flat = [i for t in ids for i in ([self.image_token] * grid.tokens if t is None else [t])]
            start = max((place for place, token in enumerate(flat) if token == self.image_token), default=0) + 1
            rows.append((flat + reply, positions, start))
        longest = max(len(ids) for ids, _, _ in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        labels, places = torch.full_like(ids, IGNORED), torch.zeros(3, *ids.shape, dtype=torch.long)
        for row, (tokens, positions, start) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, start - 1 : len(tokens) - 1] = torch.tensor(tokens[start:])  # of the token before
            places[:, row, : len(tokens)] = positions
        return ids, places, labels

    def logits(self, ids: Tensor, places: Tensor, labels: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        embeds = self.backbone.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids == self.image_token)[..., None], seen.to(embeds.dtype))
        # padding is on the right: causal attention never looks at it
        states = self.backbone.language_model(
            inputs_embeds=embeds, position_ids=places, use_cache=False
        ).last_hidden_state
        return F.linear(states, self.backbone.get_input_embeddings().weight), labels

    def forward(self, *batch) -> Tensor:
        logits, labels = self.logits(*batch)
        keep = labels != IGNORED
        return F.cross_entropy(logits[keep].float(), labels[keep])


def vocabulary(template) -> list[str]:
    draw = random.Random(0)
    texts = [template.system, template.system_images, template.text("", 2), DESCRIBE, "0 1 2 3 4 5 6 7 8 9 ? !"]
    shown = [
        world.random_picture(draw, (world.random_toy(draw, "training"),), world.random_view(draw)) for _ in range(500)
    ]
    for number in range(4000):
        _, prompt, answer, _ = Task(shown, "training").at(number)
        texts += [prompt, answer]
    words = {word.lower() for text in texts for word in re.findall(WORDS, re.sub(r"<\|\w+\|>", " ", text))}
    return sorted(words)


def write_folder(folder: Path, template) -> dict:
    """config.json, preprocessor_config.json and tokenizer.json; the config."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    words = {token: number for number, token in enumerate((*SPECIAL, *vocabulary(template)))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "attention_dropout": 0.0,
        "bos_token_id": words["<|endoftext|>"], "eos_token_id": words["<|im_end|>"], "hidden_act": "silu",
        "vision_start_token_id": words["<|vision_start|>"], "vision_end_token_id": words["<|vision_end|>"],
        "vision_token_id": words["<|unk|>"], "image_token_id": words["<|image_pad|>"], "video_token_id": words["<|unk|>"],
        "hidden_size": WIDTH, "initializer_range": 0.02, "intermediate_size": 3 * WIDTH, "max_position_embeddings": 4096,
        "max_window_layers": LAYERS, "num_attention_heads": 4, "num_hidden_layers": LAYERS, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": True,
        "torch_dtype": "float16", "use_cache": True, "use_sliding_window": False, "vocab_size": len(words),
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "vision_config": {
            "depth": 4, "hidden_act": "silu", "hidden_size": 128, "intermediate_size": 384, "num_heads": 4,
            "in_chans": 3, "out_hidden_size": WIDTH, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
            "window_size": 112, "fullatt_block_indexes": [0, 1, 2, 3], "tokens_per_second": 2, "temporal_patch_size": 2,
        },
    }  # fmt: skip
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor", "min_pixels": 3136,
        "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    for name, value in (("config", config), ("preprocessor_config", processor)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1), encoding="utf-8")
    return config


if __name__ == "__main__":
    main()
