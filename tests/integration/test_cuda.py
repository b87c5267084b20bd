"""Test that a step of training does not wait for a CUDA device. It needs such a device."""

import pytest
import torch

from benchmarks.gpu_suite.waiting import step_of_training

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_host_does_not_wait_in_a_step():
    result = step_of_training(torch.device("cuda"))
    assert result["right"], result
