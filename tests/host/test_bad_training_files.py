"""A sample of `nox -s faults -- bad_training_files`: damaged files of training end in clear errors."""

import os

import pytest
import torch
from subject_dla.tools.faults._child import try_all
from subject_dla.tools.faults.bad_training_files import cases

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX alone")


def test_damaged_files_of_training_are_refused_clearly(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = try_all(cases(tmp_path, drawn=3), "bad_files")
    finally:
        torch.set_num_threads(threads)
    assert found["bad_files_tried"] > 50 and not found["bad_files_unclear"], found["bad_files_unclear"]
