import numpy as np
import pytest

from grpo_lightning.diagnostics import Status
from grpo_lightning.diagnostics.checks.age import check_age, check_reuse, last_equal


@pytest.mark.parametrize(
    ("versions", "current", "steps", "lag", "stale"),
    [
        ([5, 5], 5, 0, 0, False),
        ([5, 5], 6, 1, 0, True),
        ([5, 6], 6, 1, 0, True),
        ([5, 5], 6, 1, 1, False),
        # Perturbed: the version grew without a step.
        ([5, 5], 6, 0, 0, False),
        ([5, 5], 6, None, 0, True),
        ([7, 7], 6, 0, 0, True),
        ([-1, -1], 6, None, 9, True),
    ],
)
def test_age(versions, current, steps, lag, stale):
    verdict = check_age(np.array(versions), current=current, steps=steps, lag=lag)
    assert verdict.status is (Status.FAIL if stale else Status.PASS)
    assert verdict.cause == ("stale_rollout" if stale else "")


def test_reuse():
    assert check_reuse(4, 4).status is Status.PASS
    assert check_reuse(5, 4).cause == "stale_rollout"


def test_last_equal():
    assert last_equal([(1,), (2,), (1,), (1,)]) == [(1,), (1,)]
    assert last_equal([(1,)]) == [(1,)]
