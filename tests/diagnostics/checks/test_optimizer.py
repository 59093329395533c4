import pytest

from grpo_lightning.diagnostics import Status
from grpo_lightning.diagnostics.checks.optimizer import (
    check_collapse,
    check_learning_rate,
    check_processes,
    check_steps,
    check_trained,
)

TRAINABLE = {"a": 1, "b": 2}


def test_trained_parameters():
    assert check_trained(TRAINABLE, {"a", "b"}, {1, 2, 3}, {"base": 4}).status is Status.PASS
    frozen = check_trained(TRAINABLE, {"a", "b", "c"}, {1, 2}, {})
    assert frozen.cause == "frozen_parameters"
    assert "1 parameters that should be trained are frozen: c." in frozen.message
    assert check_trained({}, (), {1}, {}).cause == "frozen_parameters"
    missing = check_trained(TRAINABLE, {"a"}, {2}, {})
    assert missing.cause == "not_in_optimizer"
    assert "does not hold 1 of 2 trainable parameters: a." in missing.message


def test_many_names_are_cut_short():
    verdict = check_trained(TRAINABLE, set("abcdefg"), {1, 2}, {})
    assert "5 parameters that should be trained are frozen: c, d, e and 2 more." in verdict.message


def test_parameters_of_the_base_in_the_optimizer():
    verdict = check_trained(TRAINABLE, {"a", "b"}, {1, 2, 4}, {"base.norm": 4, "base.head": 5})
    assert verdict.cause == "base_changed"
    assert "also holds 1 parameters of the base model: base.norm" in verdict.message


def test_what_is_frozen_is_named_first():
    assert check_trained({"a": 1}, {"a", "b"}, {1}, {}).cause == "frozen_parameters"
    assert check_trained({"a": 1}, {"a", "b"}, {4}, {"base": 4}).cause == "frozen_parameters"


@pytest.mark.parametrize(
    ("rates", "peaks", "streak", "expected"),
    [
        ([1e-4], [1e-4], 0, Status.PASS),
        ([0.0, 1e-4], [0.0, 1e-4], 0, Status.PASS),
        ([0.0], [1e-4], 1, Status.NO_POWER),
        ([0.0], [1e-4], 2, Status.NO_POWER),
        ([0.0], [1e-4], 3, Status.FAIL),
        ([0.0], [0.0], 1, Status.FAIL),
    ],
)
def test_learning_rate(rates, peaks, streak, expected):
    verdict = check_learning_rate(rates, peaks, streak=streak, allowed=3)
    assert verdict.status is expected
    assert verdict.cause == ("lr_zero" if expected is Status.FAIL else "")


def test_steps():
    assert check_steps(4, 4).status is Status.PASS
    verdict = check_steps(4, 1)
    assert verdict.cause == "skipped_steps"
    assert "3 of 4 updates" in verdict.message


def test_processes():
    one = {"a": (1.0, 2.0), "b": (0.0, 0.5)}
    assert check_processes([one]).status is Status.NO_POWER
    assert check_processes([one, dict(one)]).status is Status.PASS
    verdict = check_processes([one, {**one, "b": (0.0, 0.5 + 1e-12)}])
    assert verdict.cause == "processes_diverged"
    assert "1 parameters differ, the first is b" in verdict.message


@pytest.mark.parametrize(
    ("entropy", "far", "words"),
    [(1.0, 2, ""), (0.011, 0, ""), (0.009, 0, "fell below 1%"), (1.0, 3, "far from the one that sampled")],
)
def test_collapse(entropy, far, words):
    verdict = check_collapse(entropy, 1.0, min_share=0.01, far=far, far_allowed=3, clipped=0.6, kl=0.1)
    assert verdict.cause == ("policy_collapsed" if words else "")
    assert words in verdict.message
