import pytest

from grpo_lightning.arithmetic import BatchPlan
from grpo_lightning.errors import ConfigurationError


def test_the_whole_run_in_one_line():
    plan = BatchPlan(prompts=8, samples=4, updates=2, micro_batches=2, epochs=15)
    assert str(plan) == (
        "8 prompts x 4 samples = 32 completions -> 2 updates of 16, each in 2 micro-batches; "
        "15 epochs = 30 updates, 480 completions"
    )
    assert plan.completions == 32


def test_passes_and_single_things():
    assert str(BatchPlan(prompts=4, samples=2, updates=1, passes=3, epochs=1)) == (
        "4 prompts x 2 samples = 8 completions -> 1 update of 8, each in 1 micro-batch, 3 passes; "
        "1 epoch = 3 updates, 8 completions"
    )


def test_several_processes():
    assert "each in 2 micro-batches in each of 4 processes; 1 epoch" in str(
        BatchPlan(prompts=4, samples=2, updates=1, micro_batches=2, processes=4, epochs=1)
    )


def test_without_a_planned_end():
    assert str(BatchPlan(prompts=4, samples=2, updates=2)).endswith("2 updates of 4, each in 1 micro-batch")


@pytest.mark.parametrize(("updates", "nearest"), [(3, 2), (5, 4), (7, 4), (16, 8)])
def test_a_setting_that_works_is_named(updates, nearest):
    plan = BatchPlan(prompts=8, samples=4, updates=updates)
    message = (
        rf"expected updates_per_rollout to divide prompts_per_rollout=8, but got {updates}; "
        rf"use --data.updates_per_rollout {nearest} \(or another of \[1, 2, 4, 8\]\)"
    )
    with pytest.raises(ConfigurationError, match=message):
        plan.check()
    BatchPlan(prompts=8, samples=4, updates=nearest).check()
