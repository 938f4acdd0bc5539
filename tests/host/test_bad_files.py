"""A few of the damaged files of `nox -s faults -- bad_files`: each is refused with its name, or read rightly."""

import itertools

import pytest
import torch
from subject_dla.loaders.orient_anything import network
from subject_dla.tools.faults._child import try_all
from subject_dla.tools.faults.bad_files import cases


@pytest.fixture
def one_thread(monkeypatch):
    """As the processes need it; what `cases` changes is put back."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    sizes, threads = dict(network.SIZES), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    network.SIZES.clear()
    network.SIZES.update(sizes)


def test_damaged_files_of_every_loader_are_named(tmp_path, one_thread):
    found = try_all(itertools.islice(cases(tmp_path), 5, None, 13), "bad_files")
    assert not found["bad_files_unclear"]
    assert found["bad_files_clear"] == found["bad_files_tried"] > 20
