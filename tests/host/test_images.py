"""Reference images: what is wrong with one is said with the socket's name and a way out."""

import pytest
import torch
from subject_dla.loaders.images import collect_images


def rgb(*shape):
    return torch.rand(*shape, 3)


def test_a_batch_is_several_references_and_order_is_kept():
    first, second = rgb(2, 40, 60), rgb(1, 80, 30)
    images = collect_images(first, None, second)
    assert [tuple(image.shape) for image in images] == [(40, 60, 3), (40, 60, 3), (80, 30, 3)]
    assert torch.equal(images[1], first[1]) and torch.equal(images[2], second[0])
    assert collect_images(None, required=False) == []
    assert len(collect_images(rgb(10, 28, 28))) == 10
    assert collect_images(rgb(1, 30, 30).half())[0].dtype == torch.float32


@pytest.mark.parametrize("sockets, words", [
    ((None, None), ["No reference image", "image_1"]), ((None, rgb(1, 1, 1)), ["image_2", "1 x 1 px", "28"]),
    ((rgb(8, 30, 30), rgb(3, 30, 30)), ["11 reference images", "10"]),
    ((torch.rand(1, 30, 30, 4),), ["image_1", "4 channels", "SplitImageWithAlpha"]),
    ((torch.rand(1, 30, 30, 1),), ["image_1", "greyscale"]), ((torch.rand(1, 30, 30, 2),), ["image_1", "2 channels"]),
    ((torch.full((1, 30, 30, 3), torch.nan),), ["image_1", "2700 values", "NaN"]),
    ((torch.cat((rgb(1, 30, 30), rgb(1, 30, 30) / 0)),), ["image_1", "number 2", "infinite"]),
    ((rgb(1, 30, 30) * 255,), ["image_1", "255", "0 to 1"]), ((rgb(1, 28, 6000),), ["image_1", "6000 x 28", "Crop"]),
    ((torch.rand(1, 30, 30),), ["image_1", "(1, 30, 30)", "MaskToImage"]),
])  # fmt: skip
def test_each_bad_image_has_its_own_error(sockets, words):
    with pytest.raises(ValueError) as error:
        collect_images(*sockets)
    assert all(word in str(error.value) for word in words), error.value
