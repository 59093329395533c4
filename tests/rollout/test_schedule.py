"""Where a run stands in the order of tasks."""

from types import SimpleNamespace

import pytest
from fakes import make_episode, make_group

from grpo_lightning.functional.aggregation import token_weights
from grpo_lightning.rollout.micro_batches import Layout
from grpo_lightning.rollout.rollout import Origin, make_rollouts
from grpo_lightning.rollout.schedule import RolloutSchedule
from grpo_lightning.rollout.state import NOT_BEGUN
from grpo_lightning.rollout.types import SamplingSettings

SAMPLING = SamplingSettings(max_tokens=8, temperature=0.7)


def rollout(number=0, drawn=None, micro_batches=2, passes=3):
    group = make_group([make_episode([5, 6], 0.0), make_episode([7], 1.0)], [-1.0, 1.0])
    origin = Origin(version=0, number=number, epoch=number, tasks=(3, 4), metrics={}, drawn=drawn)
    [made] = make_rollouts(origin, [group, group], Layout(1, micro_batches, 1, passes), token_weights, SAMPLING)
    return made


def loop(epoch, started, processed=0, is_last_batch=False):
    """Lightning's counts."""
    return SimpleNamespace(
        epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=epoch, started=epoch + started)),
        epoch_loop=SimpleNamespace(
            batch_progress=SimpleNamespace(current=SimpleNamespace(processed=processed), is_last_batch=is_last_batch)
        ),
    )


@pytest.mark.parametrize(("drawn", "expected"), [(None, 2), (2, 2), (7, 7)])
def test_tasks_drawn_are_those_of_the_groups_unless_groups_were_replaced(drawn, expected):
    schedule = RolloutSchedule()
    schedule.add(rollout(0, drawn))
    assert (schedule.rollouts, schedule.tasks_drawn) == (1, expected)
    schedule.add(rollout(1, 5))
    assert (schedule.rollouts, schedule.tasks_drawn) == (2, expected + 5)
    state = schedule.state_dict(loop(1, 0))
    again = RolloutSchedule()
    again.load_state_dict(state)
    assert (again.rollouts, again.tasks_drawn) == (2, expected + 5)
    assert state["rollout"]["drawn"] == 5


@pytest.mark.parametrize(
    ("counts", "position"),
    [
        ({"started": 0}, NOT_BEGUN),
        ({"started": 1, "processed": 0}, 0),
        ({"started": 1, "processed": 2}, 2),
        # Not before the optimizer step whose gradients are lost.
        ({"started": 1, "processed": 3}, 2),
        ({"started": 1, "processed": 6, "is_last_batch": True}, 6),
        # An epoch that was ended early: nothing is left of it.
        ({"started": 1, "processed": 2, "is_last_batch": True}, 6),
    ],
)
def test_position(counts, position):
    schedule = RolloutSchedule()
    schedule.add(rollout(0))
    assert schedule.state_dict(loop(0, **counts))["rollout"]["position"] == position


def test_a_rollout_of_a_finished_epoch_is_not_kept():
    schedule = RolloutSchedule()
    schedule.add(rollout(0))
    assert schedule.state_dict(loop(1, 0))["rollout"] is None


@pytest.mark.parametrize(("fresh", "counts"), [(True, (0, 0)), (False, (1, 7))])
def test_another_run_forgets_the_rollout_and_perhaps_the_counts(fresh, counts):
    schedule = RolloutSchedule()
    schedule.add(rollout(0, 7))
    schedule.begin_run(fresh)
    assert schedule.current is None
    assert (schedule.rollouts, schedule.tasks_drawn) == counts
