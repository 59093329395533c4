import io
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from fakes import make_episode, make_group
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trajectories import rollouts

from grpo_lightning.errors import CheckpointError
from grpo_lightning.functional.aggregation import token_weights
from grpo_lightning.rollout.episode import Turn
from grpo_lightning.rollout.ledger import Ledger
from grpo_lightning.rollout.micro_batches import Layout
from grpo_lightning.rollout.packing import is_trainable
from grpo_lightning.rollout.rollout import Origin, make_rollouts
from grpo_lightning.rollout.state import NOT_BEGUN, rollout_from_state, rollout_to_state
from grpo_lightning.rollout.types import SamplingSettings

LAYOUT = Layout(updates=1, micro_batches=3, processes=1, passes=2)
SAMPLING = SamplingSettings(max_tokens=8, temperature=0.7, banned_token_ids=(97, 98))


def rollout_of(groups):
    tasks = tuple(10 + i for i in range(len(groups)))
    origin = Origin(version=5, number=2, epoch=2, tasks=tasks, metrics={"reward/mean": 0.1, "reward/std": 1 / 3})
    [rollout] = make_rollouts(origin, groups, LAYOUT, token_weights, SAMPLING)
    return rollout


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def source_of(groups):
    return [None] * 10 + [group.task for group in groups]


@settings(max_examples=60, deadline=None)
@given(groups=rollouts(), position=st.integers(0, 6))
def test_a_rollout_comes_back_bit_for_bit(groups, position):
    assume(any(sum(map(is_trainable, group.episodes)) > 1 for group in groups))
    rollout = rollout_of(groups)
    state = through_a_file(rollout_to_state(rollout, position))
    origin, again, at = rollout_from_state(state, LAYOUT, SAMPLING, source_of(groups))
    assert (origin, at) == (rollout.origin, position)
    # Episodes compare every field, of actions and tool calls too, and ledgers every column.
    assert tuple(again) == rollout.groups
    for old, new in zip(groups, again, strict=True):
        for before, after in zip(old.episodes, new.episodes, strict=True):
            for one, other in zip(before.ledgers, after.ledgers, strict=True):
                for column in fields(Ledger):
                    a, b = getattr(one, column.name), getattr(other, column.name)
                    assert a.dtype == b.dtype
                    assert a.tobytes() == b.tobytes(), column.name
                    assert not b.flags.writeable
    resumed = rollout_of(again)
    for one, other in zip(rollout.batches, resumed.batches, strict=True):
        for name, value in vars(one).items():
            same = (
                torch.equal(value.nan_to_num(7), vars(other)[name].nan_to_num(7))
                if isinstance(value, torch.Tensor)
                else value == vars(other)[name]
            )
            assert same, name
    assert np.array_equal(rollout.stored, resumed.stored, equal_nan=True)


def small():
    return [make_group([make_episode([5, 6], 1.0), make_episode([7], 0.0)], [1.0, -1.0])]


def test_what_no_checkpoint_can_hold_is_kept_as_text():
    [group] = small()
    first, second = group.episodes
    strange = {"board": np.array([[1, 2]]), "where": object, "level": np.float64(0.5)}
    message = {"role": "user", "content": ({"type": "text", "text": "?"},)}
    turn = Turn((message,), first.turns[0].action, np.float64(0.25), None, strange)
    group = replace(group, episodes=(replace(first, turns=(turn,), closing=(message,)), second))
    state = through_a_file(rollout_to_state(rollout_of([group]), 0))
    _, [again], _ = rollout_from_state(state, LAYOUT, SAMPLING, source_of([group]))
    [kept] = again.episodes[0].turns
    assert kept.info == {"board": [[1, 2]], "where": "<class 'object'>", "level": 0.5}
    assert kept.reward == 0.25
    assert kept.messages == again.episodes[0].closing == ({"role": "user", "content": [{"type": "text", "text": "?"}]},)


def test_another_layout_is_refused():
    state = rollout_to_state(rollout_of(small()), 2)
    message = (
        "cut into {'updates': 1, 'micro_batches': 3, .*but now there is {'updates': 2, .*Resume with the same settings"
    )
    with pytest.raises(CheckpointError, match=message):
        rollout_from_state(state, replace(LAYOUT, updates=2), SAMPLING, source_of(small()))


def test_a_rollout_whose_epoch_has_not_begun_is_refused():
    state = rollout_to_state(rollout_of(small()), NOT_BEGUN)
    with pytest.raises(CheckpointError, match="saved before its epoch began, where Lightning would skip that epoch"):
        rollout_from_state(state, LAYOUT, SAMPLING, source_of(small()))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(SAMPLING, top_p=0.9), "with top_p 1 and top_k 0, but now there are 0.9 and 0"),
        (replace(SAMPLING, temperature=1.0), "at temperature 0.7 with 2 banned tokens, but now there are 1 and 2"),
        (replace(SAMPLING, banned_token_ids=(97,)), "with 2 banned tokens, but now there are 0.7 and 1"),
        (replace(SAMPLING, banned_token_ids=(97, 99)), "with 2 banned tokens, but now there are 0.7 and 2"),
    ],
)
def test_other_sampling_is_refused(other, message):
    state = rollout_to_state(rollout_of(small()), 2)
    with pytest.raises(CheckpointError, match=message):
        rollout_from_state(state, LAYOUT, other, source_of(small()))


def test_other_tasks_are_refused():
    state = rollout_to_state(rollout_of(small()), 2)
    with pytest.raises(CheckpointError, match="of more tasks than the 10 there are now"):
        rollout_from_state(state, LAYOUT, SAMPLING, [None] * 10)
    other = replace(small()[0].task, id="another")
    message = "holds samples of task 'task', but the task source now has 'another' in its place"
    with pytest.raises(CheckpointError, match=message):
        rollout_from_state(state, LAYOUT, SAMPLING, [None] * 10 + [other])
