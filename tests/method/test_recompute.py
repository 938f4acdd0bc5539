"""What autograd is told of writes in place."""

import pytest
import torch
from subject_dla.training.dit.checkpointing import in_place


def test_a_new_tensor_at_an_old_one_s_place_is_not_taken_for_it():
    """Plain `allow_mutation_on_saved_tensors` fails this each time that the addresses meet."""
    met = 0
    for size in range(100, 4100):  # addresses meet for some sizes, whatever was allocated before
        weight = torch.ones(size, requires_grad=True)
        with in_place():
            first = weight * 2
            place = id(first), first.data_ptr()
            loss = first.square().sum()  # keeps first ...
            first.mul_(0)  # ... which is copied, as it is written over
            del first
            second = weight * 3
            met += (id(second), second.data_ptr()) == place
            (loss + second.square().sum()).backward()
        assert torch.equal(weight.grad, torch.full_like(weight, 2 * 2 * 2 + 2 * 3 * 3))
        if met == 10:
            break
    assert met  # else this test shows nothing here


@pytest.mark.parametrize("rows", [slice(None), slice(2), slice(2, None)])
def test_what_is_kept_is_copied_before_a_write_to_a_part_of_it(rows):
    """Plain `allow_mutation_on_saved_tensors` sees no write to the last rows."""
    weight = torch.ones(5, 3, requires_grad=True)
    with in_place():
        first = weight * 2
        loss = first.square().sum() + first[2:].square().sum()
        first[rows].mul_(3)
        (loss + first.sum()).backward()
    expected = torch.full_like(weight, 2 * 2 * 2)
    expected[2:] *= 2
    ones = torch.ones_like(weight)
    ones[rows] *= 3
    assert torch.equal(weight.grad, expected + 2 * ones)


def test_views_of_one_tensor_share_a_copy():
    kept, weight = [], torch.ones(5, 3, requires_grad=True)
    with in_place():
        first = weight * 2
        losses = [first.square().sum() for _ in range(2)]
        first.add_(1)
        kept = [loss.grad_fn.next_functions[0][0]._saved_self for loss in losses]
    assert kept[0].data_ptr() == kept[1].data_ptr() != first.data_ptr() and torch.equal(*kept)
