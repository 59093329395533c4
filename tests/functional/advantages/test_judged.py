import math
from dataclasses import replace

import pytest
import torch
from functional.judged_maker import make_judged

from grpo_lightning.functional.advantages.judged import LARGEST


def test_wrong_shapes_are_named():
    judged = make_judged([[0.0, 1.0, 2.0]])
    for name, shape, expected in [
        ("valid_PG", (1, 2), r"\(1, 3\)"),
        ("lengths_PG", (3,), r"\(1, 3\)"),
        ("greedy_P", (3,), r"\(1,\)"),
        ("parts_PGK", (1, 3, 2), r"\(1, 3, 1\)"),
        ("part_weights_K", (1, 1), r"\(1,\)"),
    ]:
        with pytest.raises(ValueError, match=f"expected {name} of shape {expected}, but got"):
            replace(judged, **{name: torch.ones(shape, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"expected rewards of shape \[P, G\], but got \(3,\)"):
        replace(judged, rewards_PG=torch.zeros(3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_valid_rewards_are_finite(bad):
    with pytest.raises(ValueError, match="expected finite rewards, but got NaN or infinity"):
        make_judged([[bad, 0.0]])
    make_judged([[bad, 0.0]], [[False, True]])


def test_single_rewards_may_be_missing_but_not_infinite():
    make_judged([[1.0, 0.0]], parts=[[[None, 1.0], [0.0, None]]])
    with pytest.raises(ValueError, match="expected finite rewards, but got NaN or infinity"):
        make_judged([[1.0, 0.0]], parts=[[[math.inf], [0.0]]])


def test_rewards_whose_squares_overflow_are_refused():
    make_judged([[LARGEST, -LARGEST]])
    with pytest.raises(ValueError, match=r"expected rewards of at most 1e\+100, but got larger ones"):
        make_judged([[-2 * LARGEST, 0.0]])
    with pytest.raises(ValueError, match=r"expected rewards of at most 1e\+100, but got larger ones"):
        make_judged([[1.0, 0.0]], parts=[[[1.0], [2 * LARGEST]]])
