import math
from dataclasses import replace

import pytest
import torch
from fakes import make_episode, make_group, make_task
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectories import rollouts

from grpo_lightning.functional import group_advantages
from grpo_lightning.functional.advantage import STD_FLOOR
from grpo_lightning.rollout.advantages import with_advantages
from grpo_lightning.rollout.episode import Episode, Group, Turn
from grpo_lightning.rollout.ledger import NO_VERSION, Ledger, Source
from grpo_lightning.rollout.types import Action

FORCED = "forced"
BROKEN = Episode((), (), {}, None, "error", "no route")


def episode(reward, *earned):
    """An episode of one-token turns: the reward of each turn, or ``(FORCED, reward)``."""
    ledger, turns = Ledger.of_prompt([1]), []
    for number, value in enumerate(earned):
        was_forced = isinstance(value, tuple)
        logprobs = () if was_forced else (-1.0,)
        action = Action("", (5,), logprobs, sum(logprobs), was_forced, "stop", NO_VERSION if was_forced else 0)
        turns.append(Turn((), action, value[1] if was_forced else value))
        ledger = ledger.extended(
            [5], Source.FORCED if was_forced else Source.SAMPLED, number, logprobs or None, action.policy_version
        )
    return Episode(tuple(turns), (ledger,), {}, reward)


def advantages(credit, *episodes):
    [group] = with_advantages([Group(make_task(), episodes)], credit)
    assert group.episodes == episodes
    return [list(values) for values in group.advantages]


def test_golden_numbers_of_whole_episodes():
    # Rewards 3, 1 and 2: mean 2, variance 2 / 3.
    unit = 1 / (math.sqrt(2 / 3) + STD_FLOOR)
    found = advantages("episode", episode(3.0, 1.0, 2.0), episode(1.0, 0.0), episode(2.0, (FORCED, 2.0), 0.0, 0.0))
    assert found == [pytest.approx([unit, unit]), pytest.approx([-unit]), pytest.approx([0.0] * 3, abs=1e-12)]


def test_golden_numbers_of_rewards_to_go():
    # What each turn and those after it brought: 4, 3, 1 and 0, 0. Mean 8 / 5.
    # Squared deviations (144 + 49 + 9 + 64 + 64) / 25 = 13.2, variance 2.64.
    found = advantages("reward_to_go", episode(4.0, 1.0, 2.0, 1.0), episode(0.0, 0.0, 0.0))
    unit = math.sqrt(2.64) + STD_FLOOR
    assert found == [
        pytest.approx([2.4 / unit, 1.4 / unit, -0.6 / unit]),
        pytest.approx([-1.6 / unit, -1.6 / unit]),
    ]


def test_what_the_whole_episode_earned_goes_to_every_turn():
    # 5 at the end on top of 1 in the first turn: 6 and 5 to go. The other: -1 and -1. Mean 9 / 4.
    found = advantages("reward_to_go", episode(6.0, 1.0, 0.0), episode(-1.0, 0.0, None))
    deviations = [3.75, 2.75, -3.25, -3.25]
    unit = math.sqrt(sum(d * d for d in deviations) / 4) + STD_FLOOR
    assert [*found[0], *found[1]] == pytest.approx([d / unit for d in deviations])


def test_forced_turns_have_no_advantage_and_are_not_compared_but_what_they_earned_is():
    # Turns of the policy: 2 - 0.5 = 1.5 and 2 - 0.5 - 1 = 0.5 to go; and 0. Mean 2 / 3.
    found = advantages("reward_to_go", episode(2.0, (FORCED, 0.5), 1.0, 0.5), episode(0.0, 0.0, (FORCED, 0.0)))
    deviations = [1.5 - 2 / 3, 0.5 - 2 / 3, -2 / 3]
    unit = math.sqrt(sum(d * d for d in deviations) / 3) + STD_FLOOR
    assert found[0] == pytest.approx([0.0, deviations[0] / unit, deviations[1] / unit])
    assert found[1] == pytest.approx([deviations[2] / unit, 0.0])
    assert found[0][0] == found[1][1] == 0.0


@pytest.mark.parametrize("credit", ["episode", "reward_to_go"])
def test_episodes_without_a_reward_get_0_and_count_for_nothing(credit):
    scored = [episode(1.0, 0.0), episode(0.0, 0.0), episode(0.5, 0.0)]
    failed = [episode(None, 7.0, None), BROKEN]
    found = advantages(credit, scored[0], failed[0], scored[1], failed[1], scored[2])
    assert found[1] == [0.0, 0.0]
    assert found[3] == []
    assert [found[i] for i in (0, 2, 4)] == advantages(credit, *scored)


@pytest.mark.parametrize("credit", ["episode", "reward_to_go"])
@pytest.mark.parametrize("several", [1, 2])
def test_groups_in_which_nothing_was_played(credit, several):
    # What then happens is decided, and told, where rollouts are cut.
    group = Group(make_task(), (BROKEN, BROKEN))
    assert [g.advantages for g in with_advantages([group] * several, credit)] == [((), ())] * several


def z_scores(values):
    known = [v for v in values if v is not None]
    if not known or min(known) == max(known):
        return [0.0] * len(values)
    mean = math.fsum(known) / len(known)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / len(known))
    return [0.0 if v is None else (v - mean) / (std + STD_FLOOR) for v in values]


def by_loops(group, credit):
    """The definition, one turn after the other."""
    if credit == "episode":
        found = z_scores([e.reward for e in group.episodes])
        return [[value] * len(e.turns) for value, e in zip(found, group.episodes, strict=True)]
    to_go = []
    for e in group.episodes:
        for number, turn in enumerate(e.turns):
            if e.reward is None or turn.action.was_forced:
                to_go.append(None)
            else:
                to_go.append(e.reward - sum(t.reward for t in e.turns[:number] if t.reward is not None))
    found = iter(z_scores(to_go))
    return [[next(found) for _ in e.turns] for e in group.episodes]


@pytest.mark.parametrize("credit", ["episode", "reward_to_go"])
@settings(max_examples=150, deadline=None)
@given(before=rollouts())
def test_advantages_equal_the_loops(credit, before):
    after = with_advantages(before, credit)
    for old, new in zip(before, after, strict=True):
        for found, expected in zip(new.advantages, by_loops(old, credit), strict=True):
            assert found == pytest.approx(expected, abs=1e-9)
        assert (new.task, new.episodes) == (old.task, old.episodes)


@settings(max_examples=60, deadline=None)
@given(rewards=st.lists(st.none() | st.sampled_from([0.0, 0.1, 0.5, 1.0, -2.0]), min_size=1, max_size=6))
def test_single_turns_have_the_same_either_way(rewards):
    group = make_group([make_episode([1, 2], r) for r in rewards])
    # With the reward of a reward function, and with the environment's own.
    paid = [replace(e, turns=(replace(e.turns[0], reward=e.reward),)) for e in group.episodes]
    whole = with_advantages([group])
    assert with_advantages([group], "reward_to_go") == whole
    assert with_advantages([replace(group, episodes=tuple(paid))], "reward_to_go")[0].advantages == whole[0].advantages


def test_advantages_are_those_of_the_functional():
    rewards = [[1.0, 0.0, 0.25], [0.5, 0.5, 0.5]]
    made = [make_group([make_episode([1], r) for r in row]) for row in rewards]
    expected = group_advantages(torch.tensor(rewards, dtype=torch.float64)).tolist()
    assert [[a for (a,) in g.advantages] for g in with_advantages(made)] == expected
    assert all(g.advantages == () for g in made)


@settings(max_examples=30, deadline=None)
@given(made=rollouts(3), credit=st.sampled_from(["episode", "reward_to_go"]))
def test_groups_do_not_see_each_other(made, credit):
    together = with_advantages(made, credit)
    alone = [with_advantages([group], credit)[0] for group in made]
    for one, other in zip(together, alone, strict=True):
        for found, expected in zip(one.advantages, other.advantages, strict=True):
            assert found == pytest.approx(expected, abs=1e-12)
