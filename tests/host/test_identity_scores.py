"""Identity Scores on the host's own loaders, against transformers' own models on the same random weights.

The files have the published key layouts and layer counts, by which the host knows them; it is handed their small width.
"""

import json
from pathlib import Path

import comfy.clip_vision
import comfy.sd
import folder_paths
import pytest
import torch
import transformers
from comfy_api.latest._io import HiddenHolder
from safetensors.torch import load_file, save_file
from subject_dla.evaluation.identity_scores import spread
from subject_dla.loaders.embedders import EmbedderError, FolderEmbedder, HostCLIP, HostDINO, HostText
from subject_dla.loaders.preprocessing import DINO, clip_preprocessing, preprocess
from subject_dla.nodes.identity import SubjectIdentityScores
from subject_dla.nodes.queued_graph import model_files

TEXT = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96, eos_token_id=49407)
SMALL = TEXT | dict(hidden_act="quick_gelu")
VISION = dict(hidden_size=32, num_hidden_layers=24, num_attention_heads=2, intermediate_size=48, patch_size=14)
PROMPTS = ["a (red:1.5) cat in the snow", "the same cat, seen from behind", "word " * 90]
FILE = "clip/model.safetensors"
TOKENIZER = Path(comfy.__path__[0]) / "sd1_tokenizer"
REAL = comfy.clip_vision.ClipVisionModel


def build(config, class_, folder, seed, **options):
    """A folder as published, of random weights which fp16, the host's storage, holds exactly."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = class_(config, **options)
        for parameter in model.parameters():
            parameter.data = (torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1) * 0.5).half().float()
    model.eval().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """models/clip_vision with a CLIP, a DINOv2 and a DINO, each a folder; the library's own models of the first two."""
    root = tmp_path_factory.mktemp("clip_vision")
    clip = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION | {"image_size": 224}, projection_dim=64)
    dinov2 = dict(hidden_size=32, num_hidden_layers=24, num_attention_heads=2, image_size=518, patch_size=14)
    vit = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=16)
    dino = transformers.ViTConfig(**vit, layer_norm_eps=1e-6)
    models = {
        "clip": build(clip, transformers.CLIPModel, root / "clip", 0),
        "dinov2": build(transformers.Dinov2Config(**dinov2), transformers.Dinov2Model, root / "dinov2", 1),
        "dino": build(dino, transformers.ViTModel, root / "dino-vits16", 2, add_pooling_layer=False),
    }
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (root / "clip" / name).write_bytes((TOKENIZER / name).read_bytes())
    small = dict(model_type="clip_vision_model", hidden_act="quick_gelu", image_size=224, num_channels=3)
    (root / "clip.json").write_text(json.dumps(VISION | small | {"projection_dim": 64}))
    small = dict(model_type="dinov2", use_swiglu_ffn=False, layer_norm_eps=1e-6)
    (root / "dinov2.json").write_text(json.dumps(dinov2 | small | {"image_mean": DINO.mean, "image_std": DINO.std}))
    return root, models


def load_vision(world, monkeypatch, name, path=None):
    root = world[0]
    monkeypatch.setattr(comfy.clip_vision, "ClipVisionModel", lambda config: REAL(str(root / f"{name}.json")))
    return comfy.clip_vision.load(str(path or root / name / "model.safetensors"))


def load_text(*paths, **sizes):
    return comfy.sd.load_clip([str(path) for path in paths], model_options={"model_config": dict(SMALL), **sizes})


@pytest.fixture
def listed(world, monkeypatch):
    """The folder as the host's models/clip_vision and models/text_encoders."""
    for kind in ("clip_vision", "text_encoders"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(world[0])], {".safetensors"}))
    return world[0]


def pictures(count, seed, height=300, width=260):
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return (smooth.clamp(0, 1).movedim(1, -1) * 255).round() / 255


def close(a, b):
    return torch.testing.assert_close(a / a.norm(), b / b.norm(), atol=2e-5, rtol=0)


@torch.no_grad()
def test_clip_vision_is_the_librarys_with_its_own_image_processor(world, monkeypatch):
    root, models = world
    embedder, model = HostCLIP(load_vision(world, monkeypatch, "clip"), [FILE]), models["clip"]
    image = pictures(1, 0, 224, 224)[0]  # no resize: Pillow's and torch's differ by a grey level
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224)
    pixels = torch.as_tensor(processor([(image * 255).round().byte().numpy()], return_tensors="pt")["pixel_values"])
    close(embedder.image(image), model.visual_projection(model.vision_model(pixels.float()).pooler_output)[0])
    large = pictures(1, 1, 300, 420)[0]
    own = preprocess(large, clip_preprocessing(224))[None]  # which tests/method holds against Pillow
    expected = model.visual_projection(model.vision_model(own).pooler_output)[0]
    assert torch.cosine_similarity(embedder.image(large), expected, dim=0) > 0.9999
    record = embedder.backbone
    assert (record["model"], record["layers"], record["width"]) == ("CLIPVisionModelProjection", 24, 32)
    assert (record["embedding"], record["patch"], record["input"]) == (64, 14, 224)
    assert record["file"] == FILE and str(embedder.preprocessing).startswith("shorter side to 224 px")


@torch.no_grad()
def test_dinov2_is_the_librarys_at_256_224(world, monkeypatch):
    root, models = world
    vision = load_vision(world, monkeypatch, "dinov2")
    embedder = HostDINO(vision)
    before = {key: value.clone() for key, value in vision.get_sd().items()}
    image = pictures(1, 2)[0]
    expected = models["dinov2"](preprocess(image, DINO)[None]).last_hidden_state[0, 0]
    close(embedder.image(image), expected)
    after = vision.get_sd()
    assert all(torch.equal(value, after[key]) for key, value in before.items())  # the host's own node is left as it was
    assert embedder.backbone["name"] == "DINOv2 ViT 24 x 32/14" and embedder.backbone["embedding"] == 32


@torch.no_grad()
@pytest.mark.parametrize("skip", [None, -2])
def test_clip_text_is_the_librarys_without_emphasis_and_cut_at_77_tokens(world, listed, skip):
    root, models = world
    clip = load_text(root / "clip" / "model.safetensors")
    clip.clip_layer(skip)
    tower = HostText(clip, 64, ["clip/model.safetensors"])
    tokenizer = transformers.CLIPTokenizer.from_pretrained(root / "clip")
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt")
        expected = models["clip"].text_projection(models["clip"].text_model(**tokens).pooler_output)[0]
        close(tower.text(prompt), expected)
        assert torch.equal(tower.text(prompt), tower.text(prompt))
    assert tower.cut == 3  # the last one, every time
    assert tower.backbone["file"] == "clip/model.safetensors" and tower.backbone["embedding"] == 64


@torch.no_grad()
def test_the_tower_that_fits_is_taken_from_a_pair_and_what_the_host_encodes_stays(world, listed):
    """The host hands CLIP-L's state over before the projection: as wide, and worth nothing beside a picture."""
    path = world[0] / "clip" / "model.safetensors"
    clip = load_text(path)
    before = clip.encode_from_tokens(clip.tokenize("a cat"), return_pooled=True)[1]
    alone = HostText(clip, 64).text("a cat")
    assert torch.equal(clip.encode_from_tokens(clip.tokenize("a cat"), return_pooled=True)[1], before)
    assert torch.cosine_similarity(before[0].float(), alone, dim=0) < 0.9
    pair = load_text(path, path, clip_g_model_config=SMALL | dict(hidden_size=48))  # the host's SDXL model
    with torch.no_grad():
        for parameter in pair.cond_stage_model.clip_g.parameters():
            parameter.zero_()  # no file for it here
    close(HostText(pair, 64).text("a cat"), alone)
    with pytest.raises(EmbedderError, match="clip_l of width 64, clip_g of width 48.*1280 wide"):
        HostText(pair, 1280)


@torch.no_grad()
def test_folders_run_the_librarys_models(world, listed):
    root, models = world
    image = pictures(1, 3)[0]
    dino, dinov2 = FolderEmbedder("dino-vits16", "dino"), FolderEmbedder("dinov2", "dino")
    clip = FolderEmbedder("clip", "clip")
    close(dino.image(image), models["dino"](preprocess(image, DINO)[None]).last_hidden_state[0, 0])
    close(dinov2.image(image), models["dinov2"](preprocess(image, DINO)[None]).last_hidden_state[0, 0])
    pixels = preprocess(image, clip_preprocessing(224))[None]
    close(clip.image(image), models["clip"].visual_projection(models["clip"].vision_model(pixels).pooler_output)[0])
    host = HostText(load_text(root / "clip" / "model.safetensors"), 64)
    for prompt in PROMPTS:
        close(clip.text(prompt), host.text(prompt))
    assert dino.backbone["name"] == "DINO ViT 2 x 32/16" and dino.backbone["file"] == "dino-vits16 (folder)"
    weights = load_file(root / "dino-vits16" / "model.safetensors")
    weights.pop("layernorm.weight")
    (root / "torn").mkdir(exist_ok=True)
    (root / "torn" / "config.json").write_bytes((root / "dino-vits16" / "config.json").read_bytes())
    save_file(weights, root / "torn" / "model.safetensors", {"format": "pt"})
    with pytest.raises(EmbedderError, match="torn.*layernorm.weight"):
        FolderEmbedder("torn", "dino")
    with pytest.raises(EmbedderError, match="'gone'.*dino-vits16"):
        FolderEmbedder("gone", "dino")


def run(tmp_path, monkeypatch, **inputs):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    lists = {key: value if key == "images" else [value] for key, value in inputs.items()}
    report, text, own = SubjectIdentityScores.execute(**lists).result
    (written, *_), read = sorted(tmp_path.glob("identity/*.json"), reverse=True), json.loads(text)
    assert json.loads(written.read_text(encoding="utf-8")) == read
    for row in (row for row in read["figures"] if not row["figure"].endswith(", references")):
        assert all(f"{row['figure']} {value:.3f}" in text for text, value in zip(own, row["per_output"], strict=True))
    return report, {row["figure"]: row for row in read["figures"]}, read


def test_identical_pictures_give_1_and_order_is_of_no_account(world, listed, monkeypatch, tmp_path):
    models = {"dino": load_vision(world, monkeypatch, "dinov2"), "clip_vision": load_vision(world, monkeypatch, "clip")}
    models["clip"] = load_text(world[0] / "clip" / "model.safetensors")
    same = pictures(3, 4)
    labels = {"subjects": "a\nb\nc", "reference_subjects": "a\nb\nc"}
    report, found, _ = run(tmp_path, monkeypatch, images=[same], references=same, **models, **labels)
    for name in ("DINO-I", "CLIP-I"):
        assert found[name]["per_output"] == pytest.approx([1] * 3, abs=1e-12) and found[name]["mean"] <= 1
    assert "CLIP-T" not in found and "prompts are empty" in report and "copying" in report

    images, references = list(pictures(4, 5)[:, None]), pictures(3, 6, 240, 320)
    labels = {"subjects": "a\nb\na\nb", "reference_subjects": "a\nb\na", "prompts": "one\ntwo\nthree\nfour"}
    _, found, read = run(tmp_path, monkeypatch, images=images, references=references, **models, **labels)
    turned = {key: "\n".join(reversed(text.split("\n"))) for key, text in labels.items()}
    _, other, _ = run(tmp_path, monkeypatch, images=images[::-1], references=references.flip(0), **models, **turned)
    for name in ("DINO-I", "CLIP-I", "CLIP-T"):
        assert other[name]["per_output"] == pytest.approx(found[name]["per_output"][::-1], abs=1e-12)
        assert other[name]["mean"] == pytest.approx(found[name]["mean"], abs=1e-12)
    assert [pair[:2] for pair in found["DINO-I"]["pairs"]] == [[0, 0], [0, 2], [1, 1], [2, 0], [2, 2], [3, 1]]
    assert [pair[:2] for pair in found["CLIP-T"]["pairs"]] == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert len(found["DINO-I, references"]["per_output"]) == 2  # b has one picture: nothing to compare with
    assert found["CLIP-T"]["backbone"]["text"]["model"] == "CLIPTextModel" and read["prompts"][3] == "four"


def test_prompts_and_labels_may_be_one_for_all_or_one_for_each_item_of_the_list():
    batches = [torch.zeros(2, 8, 8, 3), torch.zeros(1, 8, 8, 3)]
    assert spread("prompts", ["a cat"], batches) == ["a cat"] * 3
    assert spread("prompts", ["a\n\n b \n"], batches) == ["a", "a", "b"]
    assert spread("prompts", ["a\nline", "b"], batches) == ["a line", "a line", "b"]
    assert spread("prompts", ["a\nb\nc"], batches) == ["a", "b", "c"]
    assert spread("prompts", [""], batches) is None and spread("prompts", None, batches) is None
    with pytest.raises(ValueError, match="prompts has 4 texts, expected 3 .*, 2 .*or one"):
        spread("prompts", ["a\nb\nc\nd"], batches)


def test_what_does_not_fit_is_refused_with_what_would(world, listed, monkeypatch, tmp_path):
    root = world[0]
    clip, dino = load_vision(world, monkeypatch, "clip"), load_vision(world, monkeypatch, "dinov2")
    text = load_text(root / "clip" / "model.safetensors")
    with pytest.raises(EmbedderError, match="dino holds a CLIPVisionModelProjection.*DINOv2.*clip_vision"):
        HostDINO(clip)
    with pytest.raises(EmbedderError, match="clip_vision holds a Dinov2Model.*ViT-L/14"):
        HostCLIP(dino)
    with pytest.raises(EmbedderError, match="1280 wide.*leave clip open"):
        HostText(text, 1280)
    weights = load_file(root / "clip" / "model.safetensors")
    for name in ("text_projection.weight", "visual_projection.weight"):
        save_file({key: value for key, value in weights.items() if key != name}, root / f"no_{name[:4]}.safetensors")
    with pytest.raises(EmbedderError, match="no_text.*no text_projection.*clip_l.safetensors"):
        HostText(load_text(root / "no_text.safetensors"), 64, ["no_text.safetensors"])
    bare = load_vision(world, monkeypatch, "clip", root / "no_visu.safetensors")
    with pytest.raises(EmbedderError, match="no_visu.*no visual_projection"):
        HostCLIP(bare, ["no_visu.safetensors"])
    text.cond_stage_model.clip_l.transformer.text_projection.weight.data.zero_()
    with pytest.raises(EmbedderError, match="the file holds no text_projection"):
        HostText(text, 64)
    image = pictures(1, 0)
    with pytest.raises(ValueError, match="no model is connected"):
        run(tmp_path, monkeypatch, images=[image], references=image)
    with pytest.raises(ValueError, match="subjects are given and reference_subjects are not"):
        run(tmp_path, monkeypatch, images=[image], references=image, dino=dino, subjects="cat")
    with pytest.raises(ValueError, match="images.*image_2.*4 channels"):
        run(tmp_path, monkeypatch, images=[image, torch.rand(1, 64, 64, 4)], references=image, dino=dino)
    assert not list(tmp_path.rglob("*.json"))


def test_the_file_is_read_off_the_queued_graph():
    inputs = {
        "3": {"clip_name": "dino/large.safetensors"}, "5": {"switch": ["4", 0]},
        "4": {"clip_name1": "l.safetensors", "clip_name2": "t5.gguf", "type": "flux"},
        "9": {"dino": ["3", 0], "clip": ["4", 0], "clip_vision": ["5", 0]},
    }  # fmt: skip
    hidden = {"PROMPT": {key: {"inputs": values} for key, values in inputs.items()}, "UNIQUE_ID": "9"}
    queued = HiddenHolder.from_dict(hidden)
    assert model_files(queued, "dino") == ["dino/large.safetensors"]
    assert model_files(queued, "clip") == ["l.safetensors", "t5.gguf"]
    assert model_files(queued, "clip_vision") == [] == model_files(SubjectIdentityScores.hidden, "dino")
    assert sorted(model_files(queued, "clip_vision", chain=True)) == ["l.safetensors", "t5.gguf"]  # behind the switch
