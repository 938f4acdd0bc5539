"""Layer roles in the graph: what the pooling attends to and where on the picture; sweeps, their labels, their sheet."""

from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image
from subject_dla.common.drawing.sheet import labelled_sheet, sheet_of_batches
from subject_dla.dla import DLAConfig, DualLayerAggregator, Features, ImageGrid, MLLMInfo, Modality
from subject_dla.evaluation import layer_weights_plot as plot
from subject_dla.evaluation.layer_weights import LayerWeights, describe
from subject_dla.loaders.dla import DLA
from subject_dla.loaders.mllm.families import FAMILIES
from subject_dla.loaders.mllm.vision import Vision, internvl_grid, internvl_tiles, qwen_grid, qwen_pixels, to_area
from subject_dla.loaders.preprocessing import HALF
from subject_dla.nodes.layers import SubjectAblateLayers, SubjectAblationSweep, SubjectLayerWeights
from subject_dla.nodes.schema import Node, schema
from subject_dla.nodes.sweep import SubjectContactSheet, SubjectThresholdSweep
from subject_dla.sampling.stages import preset
from subject_dla.sampling.sweep import threshold_sweep
from subject_dla.tests.small.features import random_features

INFO = MLLMInfo("tiny", "qwen2_5_vl", layers=3, width=16)


def make_features() -> Features:
    modality = [[2, 2, 0, 0, 0, *[1] * 6, 0, 2]]
    return random_features(modality, INFO, prefix=(2,), grids=((ImageGrid(2, 3),),))


def make_weights(rows, layers, image=(), grid=None, top=28) -> LayerWeights:
    """Tokens with these weights; those numbered in `image` are image 0's."""
    modality = torch.tensor([int(i in image) for i in range(len(rows))], dtype=torch.uint8)
    index, mask = torch.where(modality == 1, 0, -1).to(torch.int16), torch.ones(len(rows), dtype=torch.bool)
    weights, info = torch.tensor(rows, dtype=torch.float32), MLLMInfo("m", "qwen2_5_vl", top, 8)
    return LayerWeights(weights, tuple(layers), mask, modality, index, info, grid and (grid,))


def pixels(image: Image.Image) -> numpy.ndarray:
    return numpy.asarray(image).astype(int)


def test_bars_and_cells_have_the_numbers_of_their_layers():
    rows = [[0.7, 0.2, 0.1, 0.0], [0.5, 0.4, 0.1, 0.0], [0.0, 0.0, 0.25, 0.75]]
    found = make_weights(rows, range(4), image=(2,), top=3)
    picture, edges = pixels(plot.heat_map(found)), plot.column_edges(4)
    assert picture.shape[1] == plot.WIDTH and edges[0] == plot.LEFT and edges[-1] == plot.WIDTH - plot.RIGHT
    heights = []
    for left, right in zip(edges, edges[1:]):
        bar = (picture[38:109, (left + right) // 2] == (86, 130, 214)).all(axis=1)  # the text panel's profile
        heights.append(bar.sum())
    assert heights[0] > 60
    for height, mean in zip(heights, (0.6, 0.3, 0.1, 0)):
        assert height / heights[0] == pytest.approx(mean / 0.6, abs=0.04)
    for token in range(2):  # 8 px a token, below the profile
        for column, weight in enumerate(rows[token]):
            middle = (edges[column] + edges[column + 1]) // 2
            expected = plot.heat_colours(torch.tensor([[weight / 0.7]]))[0, 0]
            assert abs(picture[38 + 70 + 10 + 8 * token + 4, middle] - expected).max() <= 1, (token, column)


def test_negative_weights_are_blue_and_hang_below_the_line():
    cold, none, hot = plot.heat_colours(torch.tensor([[-1.0, 0.0, 1.0]]))[0].astype(int)
    assert cold[2] > cold[0] and hot[0] > hot[2] - 1 and none.min() > 250
    picture = pixels(plot.heat_map(make_weights([[-0.5, 1.5]], (0, 1), top=1)))
    left, middle, right = plot.column_edges(2)
    columns = ((left + middle) // 2, (222, 140, 62)), ((middle + right) // 2, (86, 130, 214))
    first, second = (numpy.argwhere((picture[30:112, x] == shade).all(axis=1)) for x, shade in columns)
    assert first.min() > second.max() - 2 and len(second) / len(first) == pytest.approx(3, rel=0.15)


def test_mean_layer_and_words():
    found = make_weights([[0.5, 0.5, 0, 0], [0, 0, 0, 1.0]], (0, 9, 14, 28), image=(1,))
    assert found.mean_layer(found.weights).tolist() == [4.5, 28.0]
    text = describe(found, "my.safetensors").splitlines()
    assert "my.safetensors" in text[0] and len(text) == 3
    assert "text, 1 tokens: mean layer 4.50" in text[1] and "early (0-9) 1.00" in text[1]
    assert "mean layer 28.00" in text[2] and "28 (1.000)" in text[2] and "late (20-28) 1.00" in text[2]
    before_norm = make_weights([[0, 1.0]], (0, 29), image=(0,))
    assert "29 (1.000)" in describe(before_norm) and "late (20-28) 1.00" in describe(before_norm)


def test_qwen_tokens_lie_where_the_vision_tower_took_them_from():
    vision = FAMILIES["qwen2_5_vl"].vision
    generator = torch.Generator().manual_seed(3)
    sizes = [(640, 480), (480, 640), (512, 512), (1000, 101), (57, 1000), (28, 28)]
    sizes += [tuple(torch.randint(60, 900, (2,), generator=generator).tolist()) for _ in range(60)]
    for width, height in sizes:
        for side in (112, 384, 560):
            image = to_area(torch.zeros(height, width, 3), side)
            grid = qwen_grid(*image.shape[:2], vision)
            assert len(qwen_pixels(image, grid, vision)) == 4 * grid.tokens
            placement = plot.place(grid, width, height)
            assert tuple(placement.order.shape) == (grid.rows, grid.columns), (width, height, side)
            assert placement.box == (0, 0, width, height)
            assert placement.order.flatten().tolist() == list(range(grid.tokens))


@pytest.mark.parametrize("width, height, tiles", [
    (300, 300, 1), (600, 200, 1), (600, 200, 4), (240, 500, 6), (500, 500, 4),
])  # fmt: skip
def test_internvl_tokens_lie_where_their_tiles_were_cut(width, height, tiles):
    """Every token's mean brightness in the tiles is that of the px of the picture that are said to be its own."""
    vision = Vision(14, 2, HALF, HALF)
    ramp = torch.linspace(0.2, 0.8, width)[None] * torch.linspace(0.5, 1.0, height)[:, None]
    grid = internvl_grid(height, width, vision, 448, tiles)
    seen = internvl_tiles(ramp[..., None].expand(-1, -1, 3), grid, vision)
    values = seen[:, 0].unfold(1, 28, 28).unfold(2, 28, 28).mean(dim=(3, 4)).flatten() / 2 + 0.5
    assert len(values) == grid.tokens
    placement = plot.place(grid, width, height)
    found = placement.over(values, width, height)
    edge = max(width, height) / 16  # px: tokens that reach over the picture's edge hold border as well
    off = (found - ramp)[int(edge) : height - int(edge), int(edge) : width - int(edge)].abs()
    assert float(off.mean()) < 0.02 and float(off.max()) < 0.1
    left, top, right, bottom = placement.box
    assert (left + right) / 2 == pytest.approx(width / 2) and (top + bottom) / 2 == pytest.approx(height / 2)


def test_the_overlay_lights_up_the_token_on_the_picture_and_keeps_its_shape():
    width, height, rows, columns = 400, 200, 4, 8
    weights = torch.zeros(rows * columns, 3)
    weights[:, 0] = 1
    weights[2 * columns + 5] = torch.tensor([0.0, 0.0, 1.0])  # row 2, column 5 reads the last layer
    found = make_weights(weights.tolist(), (0, 14, 28), range(rows * columns), ImageGrid(rows, columns))
    picture = torch.full((height, width, 3), 0.5)
    for layer in (None, 28):
        shown = plot.overlay(found, picture, layer=layer)
        assert shown.size == (768, 384 + 34)
        red = pixels(shown)[:384]
        hot = numpy.argwhere(abs(red - red[5, 5]).sum(axis=2) > 60)
        cell = 768 / columns
        assert hot.min(axis=0) == pytest.approx([2 * cell, 5 * cell], abs=2)
        assert hot.max(axis=0) == pytest.approx([3 * cell, 6 * cell], abs=2)
        assert len(hot) == pytest.approx(cell**2, rel=0.05)


def test_a_picture_that_the_tokens_are_not_of_is_refused():
    found = make_weights([[1.0]] * 32, (0,), range(32), ImageGrid(4, 8))
    with pytest.raises(ValueError, match="8 x 4 tokens.*very picture"):
        plot.overlay(found, torch.zeros(600, 100, 3))
    with pytest.raises(ValueError, match="image 2.*1 reference"):
        plot.overlay(found, torch.zeros(200, 400, 3), index=1)
    with pytest.raises(ValueError, match="layer 7.*pools 0"):
        plot.overlay(found, torch.zeros(200, 400, 3), layer=7)
    with pytest.raises(ValueError, match="64 x 16 tokens.*100 x 100 px"):
        plot.place(ImageGrid(16, 64, (1, 4), thumbnail=True), 100, 100)
    with pytest.raises(ValueError, match="do not record the grid.*Encode again"):
        plot.overlay(make_weights([[1.0]] * 32, (0,), range(32)), torch.zeros(200, 400, 3))


def test_layer_weights_shows_what_the_dla_computes(monkeypatch):
    torch.manual_seed(1)
    plain = DualLayerAggregator(DLAConfig(INFO, context_width=16, heads=4))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.3)
    dla, features, kept = DLA(plain.config, plain.state_dict(), "a.safetensors"), make_features(), []
    shown = SimpleNamespace(as_dict=lambda: {"images": [], "animated": (False,)})
    monkeypatch.setattr("subject_dla.nodes.layers.ui.PreviewImage", lambda maps, cls: kept.append(maps) or shown)
    maps, over, text = SubjectLayerWeights.execute(features, dla, torch.rand(1, 56, 84, 3), 1, 3).result
    assert maps.shape[0] == 1 and maps.shape[2] == plot.WIDTH and over.shape == (1, 512 + 34, 768, 3) and len(kept) == 2
    expected = plain.layer_weights(features)[0]
    for modality, name in ((Modality.TEXT, "text, 4"), (Modality.IMAGE, "image, 6")):
        weights = expected[features.modality[0] == modality]
        size = weights.abs()
        centre = float(((size * torch.arange(4)).sum(1) / size.sum(1)).mean())
        assert f"{name} tokens: mean layer {centre:.2f}" in text, text
    assert "template, 1 tokens" in text  # the leading two are not passed on
    maps, over, _ = SubjectLayerWeights.execute(features, dla).result
    assert type(over).__name__ == "ExecutionBlocker" and over.message is None


def test_a_dla_without_memory_pools_fewer_tokens_at_a_time(monkeypatch, caplog):
    torch.manual_seed(1)
    plain = DualLayerAggregator(DLAConfig(INFO, context_width=16, heads=4))
    dla, features, chunks = DLA(plain.config, plain.state_dict(), "a.safetensors"), make_features(), []
    expected, forward = dla.aggregate(features).tokens, DualLayerAggregator.forward

    def without_memory(self, *args, max_chunk_bytes, **options):
        chunks.append(max_chunk_bytes)
        if len(chunks) < fits:
            raise torch.cuda.OutOfMemoryError("Allocation on device")
        return forward(self, *args, max_chunk_bytes=max_chunk_bytes, **options)

    monkeypatch.setattr(DualLayerAggregator, "forward", without_memory)
    for fits in (2, 3):
        chunks.clear()
        assert torch.equal(dla.aggregate(features).tokens, expected)
        assert len(chunks) == fits and chunks == sorted(chunks, reverse=True) and "a.safetensors" in caplog.text
    chunks.clear()
    fits = 9
    with pytest.raises(torch.cuda.OutOfMemoryError):
        dla.aggregate(features)
    assert len(chunks) == 3


def test_ablate_layers_and_the_sweep_zero_what_they_say():
    features, ablate = make_features(), SubjectAblateLayers.execute
    assert ablate(features, "untouched", "", "untouched", "").result[0] is features
    (found,) = ablate(features, "untouched", "nonsense", "keep", "late").result
    gone = (found.hidden_states == 0).all(dim=-1)[0]
    assert gone.sum(dim=1).tolist() == [6, 6, 6, 0]
    found, labels = SubjectAblationSweep.execute(features, "text and image", "zero", "early; middle; late").result
    groups = ("layer 0", "layers 1-2", "layer 3")
    assert labels == ["untouched", *(f"{name}: {layers} zeroed" for name in ("text", "image") for layers in groups)]
    counts = [(entry.hidden_states == 0).all(dim=-1)[0].sum(dim=1).tolist() for entry in found]
    assert counts == [[0] * 4, [4, 0, 0, 0], [0, 4, 4, 0], [0, 0, 0, 4], [6, 0, 0, 0], [0, 6, 6, 0], [0, 0, 0, 6]]
    with pytest.raises(ValueError, match="'5'.*0 .*3"):
        SubjectAblationSweep.execute(features, "text", "zero", "early; 5")
    with pytest.raises(ValueError, match="This sweep has 1001 settings, expected 256 at most"):  # each is a copy
        SubjectAblationSweep.execute(features, "text", "zero", "1;" * 1000)


def test_a_threshold_sweep_is_a_grid_each_schedule_once_and_labelled():
    run = SubjectThresholdSweep.execute
    stages, labels = run("paper", "flow_time", "0.95, 0.85", "0.85, 0.7", "grid", "1", "1", False).result
    assert labels == [f"paper, tau1 {tau1}, tau2 {tau2}" for tau1 in (0.95, 0.85) for tau2 in (0.85, 0.7)]
    assert stages[0] == preset("paper") and stages[3] == preset("paper", tau1=0.85, tau2=0.7)
    assert stages[2] == preset("two_stage", tau1=0.85)  # no time between the two
    stages, labels = run("paper", "flow_time", "0, 0.95", "0, 0.85", "pairs", "1", "1", True).result
    assert labels == ["both throughout", "MLLM only", "paper, tau1 0, tau2 0", "paper, tau1 0.95, tau2 0.85"]
    assert all(stages[2].strengths(t) == (1, 0) for t in (1.0, 0.5, 0.0))  # the paper's (0, 0)
    stages, labels = run("semantics_first", "flow_time", "0.9", "0.8, 0.7", "grid", "1", "0.5, 1", False).result
    assert labels == ["semantics first, tau1 0.9, VAE 0.5", "semantics first, tau1 0.9, VAE 1"]
    strengths = [[(key.context, key.reference) for key in entry.keyframes] for entry in stages]
    assert strengths == [[(1, 0), (1, 0.5)], [(1, 0), (1, 1)]]
    stages, labels = run("paper", "steps", "0.1, 0.3", "0.2", "grid", "1", "1", False).result
    assert labels == ["paper, tau1 0.1, tau2 0.2"]
    counts = {"paper": 4, "semantics_first": 2, "two_stage": 2, "mllm_only": 1, "vae_only": 1, "both": 1}
    for name, count in counts.items():
        assert len(threshold_sweep(name, "flow_time", (0.95, 0.9), (0.9, 0.8))) == count


@pytest.mark.parametrize("changes, words", [
    ({"tau1": "0.95, x"}, "tau1.*'x'"), ({"tau2": "1.5"}, "tau2.*'1.5'.*0 to 1"), ({"tau1": " "}, "tau1 is empty"),
    ({"vae_strengths": "3"}, "vae_strengths.*'3'.*0 to 2"),
    ({"tau1": "0.7", "tau2": "0.9"}, "tau2 of 0.9.*below.*Swap"),
    ({"tau1": "0.7", "tau2": "0.9", "combine": "pairs"}, "out of order"),
    ({"tau1": "0.7", "tau2": "0.6, 0.5", "combine": "pairs"}, "1 numbers and tau2 2"),
    ({"tau1": ", ".join(f"0.9{i:02}" for i in range(99))}, "297 settings.*256"),
])  # fmt: skip
def test_a_sweep_that_cannot_be_is_explained(changes, words):
    given = dict(preset="paper", clock="flow_time", tau1="0.95", tau2="0.85, 0.8, 0.7", combine="grid")
    given |= dict(mllm_strengths="1", vae_strengths="1", controls=False)
    with pytest.raises(ValueError, match=words):
        SubjectThresholdSweep.execute(**given | changes)


def test_a_sweep_of_long_lists_is_refused_before_it_is_combined():
    """10,000 by 10,000 took 8 GB."""
    many = ",".join(str(number / 10_000) for number in range(10_000))
    for combine in ("grid", "pairs"):
        with pytest.raises(ValueError, match="This sweep has 10000 settings, expected 256 at most"):
            SubjectThresholdSweep.execute("paper", "flow_time", many, many, combine, "1", many, False)


def test_an_error_is_no_longer_than_a_person_reads():
    class Sample(Node):
        @classmethod
        def define_schema(cls):
            return schema("measure", node_id="Sample", display_name="Sample", inputs=[], outputs=[])

        @classmethod
        def execute(cls):
            raise ValueError("k" * 10**7)

    with pytest.raises(ValueError, match="^Sample: k+ …$") as error:
        Sample.execute()
    assert len(str(error.value)) < 3100


def flat(level, count=1, height=64, width=64):
    return torch.full((count, height, width, 3), level / 255)


def test_lists_and_batches_come_onto_one_sheet_in_order():
    images = [flat(10), flat(60, count=2, width=128), flat(110)]
    sheet = (sheet_of_batches(images, ["a", "b", "c"], columns=2, side=64)[0] * 255).round().int()
    assert sheet.shape == (12 + 2 * (64 + 20 + 24), 768, 3)
    assert [int((sheet == level).all(-1).sum()) for level in (10, 60, 110)] == [4096, 2 * 64 * 32, 4096]
    places = [(sheet == level).all(-1).nonzero().float().mean(0) for level in (10, 60, 110)]
    assert places[0][0] < places[2][0] and places[0][1] < places[2][1]
    one = sheet_of_batches(images, list("abcd"), ["1"], references=[flat(200)], title="t", side=64)
    assert int(((one[0] * 255).round() == 200).all(-1).sum()) == 4096
    two = sheet_of_batches(images, list("abcd"), ["2"], references=[flat(200)], title="t", side=64)
    assert not torch.equal(one, two)
    long = labelled_sheet([Image.new("RGB", (64, 64))], ["a label of more than one line\nfigure"], side=64)
    ink, grey = (numpy.argwhere((pixels(long) == shade).all(-1))[:, 0] for shade in ((40, 40, 46), (110, 110, 118)))
    assert ink.max() - ink.min() > 20 and grey.min() > ink.max()  # figures below the whole label
    with pytest.raises(ValueError, match="2 labels.*4 pictures in 3 batches"):
        sheet_of_batches(images, ["a", "b"])
    with pytest.raises(ValueError, match="3 labels"):
        labelled_sheet([Image.new("RGB", (8, 8))], ["a", "b", "c"])
    assert SubjectContactSheet.GET_SCHEMA().is_input_list
    (sheet,) = SubjectContactSheet.execute(images=[flat(10), flat(60)], title=["t"], columns=[1], side=[64]).result
    assert sheet.shape[0] == 1 and sheet.shape[1] > 128
