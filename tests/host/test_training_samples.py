"""A DLA that was trained here, in the editor's nodes: the features, context and pictures of its run's own samples."""

from dataclasses import replace

import pytest
import torch
from subject_dla.common.picture_files import load_picture
from subject_dla.dla import DualLayerAggregator
from subject_dla.dla.context import aggregate
from subject_dla.loaders.backbones import BACKBONES
from subject_dla.loaders.conditioning import aggregate_conditioning
from subject_dla.loaders.dla import load_dla
from subject_dla.loaders.mllm import encode_subject, load_mllm, mllm_from_clip
from subject_dla.loaders.mllm.base import MLLMError
from subject_dla.loaders.mllm.huggingface import load_folder
from subject_dla.loaders.reference_latents import add_identity
from subject_dla.sampling.sample import staged_sample
from subject_dla.sampling.stages import preset
from subject_dla.tests.host.test_mllm_encoders import WIDTH, build_clip
from subject_dla.tests.host.test_parity import skip_what_the_host_lacks
from subject_dla.tests.small.dit import TinyVAE, tiny
from subject_dla.tests.small.mllm import build_qwen25vl
from subject_dla.tests.small.training import paint_subjects, small_family, small_recipe
from subject_dla.training import run, samples
from subject_dla.training.models import TrainingModels
from subject_dla.training.paths import RunPaths
from subject_dla.training.recipe import Recipe

SIDE = 64  # px


@pytest.fixture(params=["flux", "qwen_image21"])
def workspace(request, tmp_path, monkeypatch):
    """Folder, the recipe's [models] and [dla], and small models of a family with an MLLM that it is trained with."""
    skip_what_the_host_lacks(request.param)
    files, backbone = small_family(tmp_path / "models"), BACKBONES[request.param]
    if request.param == "qwen_image21":
        mllm = mllm_from_clip(build_clip(monkeypatch, "QwenImage21TEModel"))
        dit, settings = tiny(request.param, context_in_dim=WIDTH), {"before_norm": True}
    else:
        build_qwen25vl(tmp_path / "models/mllm/tiny", width=16, layers=2, heads=2, kv_heads=1, dtype=torch.float32)
        dit, settings, mllm = tiny(request.param), {}, load_mllm("tiny")
    return tmp_path, files, settings, TrainingModels(dit, TinyVAE(backbone), mllm)


def test_the_editor_s_nodes_make_the_samples_of_the_run(workspace, monkeypatch):
    folder, files, settings, models = workspace
    made, sheets = [], []

    def sample(*arguments):
        made.append((arguments, staged_sample(*arguments)["samples"]))
        return {"samples": made[-1][1]}

    def sheet(*arguments):
        sheets.append(arguments)
        return samples.sample_sheet(*arguments)

    monkeypatch.setattr(samples, "staged_sample", sample)
    monkeypatch.setattr(run, "sample_sheet", sheet)
    watch = {"sample_every": 2, "samples": 1, "sample_steps": 3}
    recipe = small_recipe(
        files, paint_subjects(folder / "subjects", 5), dla={"heads": 2, **settings}, run=watch,
        data={"mllm_image_size": SIDE, "cache_features": True}, training={"stage": 2, "steps": 2},
    )  # fmt: skip
    paths = [folder / "models" / kind / "small.safetensors" for kind in ("dla", "loras")]
    with torch.inference_mode():  # as nodes run
        run.train(Recipe.from_dict(recipe), models, RunPaths(folder / "run", folder / "cache", *paths), lambda _: None)
        (_, module, batches, _) = sheets[-1]
        example, dla = batches.examples[0], load_dla("small.safetensors")
        images = [load_picture(path)[None] for path in example.references]
        features = encode_subject(models.mllm, example.prompt, images, dla, image_size=SIDE)
        trained_on = batches.features.get(example.prompt, example.references).features
        assert torch.equal(features.hidden_states, trained_on.hidden_states)
        negative = aggregate_conditioning(encode_subject(models.mllm, " ", (), dla), dla)
        positive = aggregate_conditioning(features, dla)
        assert not torch.equal(positive[0][0], aggregate_conditioning(features)[0][0])
        for image in images:
            positive, negative = (
                add_identity(found, models.model, models.vae, image, size=SIDE) for found in (positive, negative)
            )
        guidance = {"guidance": 1.0} if module.backbone.family.takes_guidance else {}  # as the host's FluxGuidance
        positive, negative = ([[tokens, {**values, **guidance}] for tokens, values in c] for c in (positive, negative))
        presets = samples.PRESETS[2].values()
        for name, ((_, seed, steps, cfg, *names, _, _, latent, strength, _), theirs) in zip(presets, made[-3:]):
            ours = staged_sample(
                models.model, seed, steps, cfg, *names, positive, negative, latent, strength, preset(name)
            )
            assert torch.equal(ours["samples"], theirs), name


def test_a_new_dla_is_the_context_that_qwen_image_2_1_reads(monkeypatch, tmp_path):
    """The last layer before its norm, with the images among the tokens; from a folder it cannot be had."""
    mllm = mllm_from_clip(build_clip(monkeypatch, "QwenImage21TEModel"))
    config = Recipe.from_dict({"dla": {"before_norm": True}}).dla_config(mllm.info, WIDTH, "qwen_image21")
    features = mllm.encode("a fox", [torch.rand(64, 96, 3)])
    stock, normed = aggregate(features), aggregate(features, DualLayerAggregator(replace(config, before_norm=False)))
    assert torch.equal(aggregate(features, DualLayerAggregator(config)).tokens, stock.tokens)
    assert not torch.equal(normed.tokens, stock.tokens)
    build_qwen25vl(tmp_path, width=16, layers=2, heads=2, kv_heads=1, dtype=torch.float32)
    folder = load_folder(tmp_path)
    with pytest.raises(MLLMError, match="3, the last layer before the norm, comes from MLLM from CLIP"):
        folder.encode("a fox", layers=replace(config, mllm=folder.info).required_layers)
