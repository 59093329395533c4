import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from fakes import make_episode, make_group, make_task
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectories import rollouts

from grpo_lightning.functional import group_advantages
from grpo_lightning.functional.advantages import ESTIMATORS, NEEDS_EPISODES, STD_FLOOR
from grpo_lightning.rollout.advantages import estimated, judge, with_advantages
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


SETTINGS = {"pass_at_k": {"k": 2}}
ALL = {name: partial(function, **SETTINGS.get(name, {})) for name, function in ESTIMATORS.items()}


def scored(reward, tokens=2, turns=1, **rewards):
    """An episode of some sampled tokens, with single rewards."""
    return replace(make_episode([1], reward), **_of_turns(tokens, turns), rewards=rewards)


def _of_turns(tokens, turns):
    ledger, made = Ledger.of_prompt([1]), []
    for number in range(turns):
        action = Action("", (5,) * tokens, (-1.0,) * tokens, -1.0 * tokens, False, "stop", 0)
        made.append(Turn((), action))
        ledger = ledger.extended([5] * tokens, Source.SAMPLED, number, action.token_logprobs, 0)
    return {"turns": tuple(made), "ledgers": (ledger,)}


def group_of(*episodes):
    return Group(make_task(), episodes)


def test_what_an_estimator_is_given():
    groups = [
        group_of(
            scored(3.0, tokens=4, turns=2, right=1.0, short=1.0), scored(None, right=None), scored(1.0, right=1.0)
        ),
        group_of(scored(2.0, tokens=1, short=2.0)),
    ]
    groups[0] = replace(groups[0], greedy=0.25)
    kept = []
    with_advantages(
        groups,
        estimator=lambda judged: kept.append(judged) or torch.zeros_like(judged.rewards_PG),
        part_weights={"short": 0.5},
    )
    [judged] = kept
    nan = math.nan
    assert judged.valid_PG.tolist() == [[True, False, True], [True, False, False]]
    assert judged.rewards_PG[judged.valid_PG].tolist() == [3.0, 1.0, 2.0]
    assert judged.lengths_PG.tolist() == [[8, 2, 2], [1, 0, 0]]
    assert judged.lengths_PG.dtype == torch.int64
    assert judged.greedy_P.tolist() == pytest.approx([0.25, nan], nan_ok=True)
    assert judged.part_weights_K.tolist() == [1.0, 0.5]
    right, short = judged.parts_PGK.unbind(2)
    assert right.flatten().tolist() == pytest.approx([1.0, nan, 1.0, nan, nan, nan], nan_ok=True)
    assert short.flatten().tolist() == pytest.approx([1.0, nan, nan, 2.0, nan, nan], nan_ok=True)


@pytest.mark.parametrize("name", ALL)
def test_every_estimator_judges_episodes(name):
    groups = [
        group_of(*(scored(r, tokens=t, turns=2, right=r) for r, t in [(1.0, 2), (0.0, 5), (0.0, 3)]), BROKEN),
        group_of(*(scored(r, right=r) for r in (0.0, 1.0))),
    ]
    groups = [replace(group, greedy=value) for group, value in zip(groups, [0.5, 0.0], strict=True)]
    found = with_advantages(groups, estimator=ALL[name])
    judged = judge([[1.0, 0.0, 0.0, None], [0.0, 1.0]], [g.episodes for g in groups], {}, [0.5, 0.0])
    expected = ALL[name](judged).tolist()
    for group, row in zip(found, expected, strict=True):
        for e, advantages, value in zip(group.episodes, group.advantages, row, strict=False):
            assert advantages == (value,) * len(e.turns)
    assert found[0].advantages[0][0] > found[0].advantages[1][0]


@pytest.mark.parametrize("name", sorted(set(ALL) - NEEDS_EPISODES))
def test_estimators_of_rewards_alone_judge_turns(name):
    # To go: 4, 3, 1 and 0, 0, one row of five.
    group = group_of(episode(4.0, 1.0, 2.0, 1.0), episode(0.0, 0.0, 0.0))
    [found] = with_advantages([group], "reward_to_go", ALL[name])
    [row] = ALL[name](judge([[4.0, 3.0, 1.0, 0.0, 0.0]], [()], {}, [None])).tolist()
    assert [a for turns in found.advantages for a in turns] == row


@pytest.mark.parametrize("name", sorted(NEEDS_EPISODES))
def test_estimators_of_episodes_refuse_turns(name):
    with pytest.raises(
        ValueError, match=f"which credit 'reward_to_go' needs, but got '{name}'; choose credit 'episode'"
    ):
        with_advantages([group_of(episode(1.0, 1.0), episode(0.0, 0.0))], "reward_to_go", ALL[name])


def test_weights_of_single_rewards_reach_gdpo():
    group = group_of(*(scored(r + s, right=r, short=s) for r, s in [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]))
    signs = []
    for weight in (2.0, 0.5):
        [found] = with_advantages([group], estimator=ALL["gdpo"], part_weights={"short": weight})
        right, short, none = (a for (a,) in found.advantages)
        assert none < min(right, short)
        signs.append(right > short)
    assert signs == [False, True]


def test_a_greedy_reward_for_each_group():
    group = group_of(scored(1.0), scored(0.0))
    with pytest.raises(ValueError, match="expected the reward of a greedy answer to each of the 2 prompts"):
        with_advantages([replace(group, greedy=0.0), group], estimator=ALL["remax"])


def test_estimators_keep_their_promise():
    judged = judge([[1.0, None]], [()], {}, [None])
    for value, message in [
        (torch.zeros(2), r"expected advantages of shape \(1, 2\) from 'wrong', but got \(2,\)"),
        (torch.tensor([[0.0, 1.0]]), "expected finite advantages from 'wrong', 0 without a reward"),
        (torch.tensor([[math.nan, 0.0]]), "expected finite advantages from 'wrong', 0 without a reward"),
    ]:

        def wrong(judged, value=value):
            return value

        with pytest.raises(ValueError, match=message):
            estimated(judged, wrong)
