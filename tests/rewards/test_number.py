import math

import numpy as np
import pytest
import torch

from grpo_lightning.rewards.number import finite


@pytest.mark.parametrize(
    "value", [1, 1.0, True, np.float32(1), np.float64(1), np.int64(1), np.bool_(True), torch.tensor(1.0)]
)
def test_numbers_of_all_kinds(value):
    number = finite(value)
    assert (type(number), number) == (float, 1.0)


@pytest.mark.parametrize(
    "value", [None, "1", b"1", [1.0], math.nan, -math.inf, 10**400, np.float32("nan"), np.ones(2), torch.ones(2), 1j]
)
def test_anything_else(value):
    assert finite(value) is None
