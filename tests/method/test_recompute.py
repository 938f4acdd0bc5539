"""What autograd is told of writes in place."""

import torch
from subject_dla.training.dit.checkpointing import in_place


def test_a_new_tensor_at_an_old_one_s_place_is_not_taken_for_it():
    """Plain `allow_mutation_on_saved_tensors` fails this each time that the addresses meet."""
    met = 0
    for _ in range(200):
        weight = torch.ones(1000, requires_grad=True)
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
    assert met  # else this test shows nothing here
