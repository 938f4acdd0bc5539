"""The shipped family, through the pack's loaders and guider: its pictures are of the view that the prompt names."""

import pytest
import torch
from PIL import Image
from subject_dla.common.drawing.sheet import to_tensor
from subject_dla.demo.evidence.draw import Arm, Case, Family
from subject_dla.demo.family import latents, world
from subject_dla.demo.family.layout import MODELS, ROOT
from subject_dla.demo.family.oracle import load_oracle
from subject_dla.demo.showcase import CASES
from subject_dla.evaluation.copy_paste.metrics import azimuth_difference
from subject_dla.sampling.stages import preset
from subject_dla.tests.small.training import small_family


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    small_family(tmp_path_factory.mktemp("models"))
    return Family()


@pytest.fixture(scope="module")
def cases(family):
    out = []
    for name, prompt in CASES:
        picture = to_tensor(Image.open(ROOT / "demo" / "images" / name))[0]
        out.append(Case({"prompt": prompt, "image_paths": [name]}, [picture], [family.vae.encode(picture[None])]))
    return out


def named_azimuth(prompt: str) -> float:
    words = prompt.split("seen from the ")[1]
    return 45.0 * world.VIEWS.index(max((view for view in world.VIEWS if words.startswith(view)), key=len))


def test_new_views_as_the_prompt_names_them(family, cases):
    oracle = load_oracle(ROOT / "demo" / "oracle.safetensors")
    drawn = Arm(family, "demo").draw(cases, preset("mllm_only"))
    asked = torch.tensor([named_azimuth(case.prompt) for case in cases])
    off = azimuth_difference(oracle.read(drawn).angles[:, 0], asked)
    assert (off < 22.5).sum() >= 3, off  # of five; by chance each with one in eight


def test_cases_drawn_together_do_not_see_each_other(family, cases):
    """Two prompts of one length in one batch, against another neighbour."""
    arm, twice = Arm(family, "demo"), [cases[1], cases[1]]
    mixed = [cases[1], Case(cases[1].entry | {"image_paths": ["other"]}, cases[2].references, cases[2].latents)]
    with_itself, with_other = (arm.draw(pair, preset("both"))[0] for pair in (twice, mixed))
    assert (with_itself - with_other).abs().max() < 1e-3


def test_latents_encoded_many_at_a_time_are_the_hosts(cases):
    pictures = torch.stack([case.references[0] for case in cases]).permute(0, 3, 1, 2).mul(255).round().byte()
    encoded = latents.unscale(latents.encode(latents.load_vae(MODELS.parent), pictures))
    expected = torch.cat([case.latents[0] for case in cases])
    assert (encoded - expected).abs().max() < 0.02 * expected.abs().max()
