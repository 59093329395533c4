"""What is done to a rollout's groups between sampling and advantages."""

import math
from dataclasses import replace

import pytest
import torch
from fakes import make_episode, make_group, make_task
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectories import rollouts

from grpo_lightning.functional.advantages import ESTIMATORS
from grpo_lightning.functional.reward_shaping import overlong_penalty
from grpo_lightning.rollout.advantages import with_advantages
from grpo_lightning.rollout.episode import Group
from grpo_lightning.rollout.ledger import Source
from grpo_lightning.rollout.shaping import (
    KL,
    OVERLONG,
    add_reward,
    mask_truncated,
    punish_kl,
    punish_overlong,
    refill,
    varies,
    with_greedy,
)

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def group_of(*rewards, length=2, **settings):
    return make_group([make_episode(range(5, 5 + length), r, **settings) for r in rewards])


class TestVaries:
    @pytest.mark.parametrize(
        ("rewards", "expected"),
        [
            ((0.0, 1.0), True),
            ((1.0, 1.0), False),
            ((1.0, None), False),
            ((None, None), False),
            ((None, 1.0, 0.5), True),
        ],
    )
    def test_rewards(self, rewards, expected):
        assert varies(group_of(*rewards)) is expected


class TestWithGreedy:
    def test_the_reward_is_kept_beside(self):
        group = group_of(1.0, 0.0)
        assert with_greedy(group, 0.5) == replace(group, greedy=0.5)

    def test_without_one_the_group_is_not_judged(self):
        group = with_greedy(group_of(1.0, 0.0), None)
        assert [e.reward for e in group.episodes] == [None, None]
        assert {e.failure for e in group.episodes} == {"the greedy answer to its task has no reward"}
        other = replace(group_of(1.0, 0.0), greedy=0.5)
        judged = with_advantages([group, other], estimator=ESTIMATORS["remax"])
        assert [g.advantages for g in judged] == [((0.0,), (0.0,)), ((0.5,), (-0.5,))]


class TestAddReward:
    def test_it_counts_and_has_a_name(self):
        groups = add_reward([group_of(1.0, 2.0), group_of(3.0)], "style", [0.5, -0.5, 0.25])
        assert [[e.reward for e in g.episodes] for g in groups] == [[1.5, 1.5], [3.25]]
        assert [e.rewards for g in groups for e in g.episodes] == [
            {"reward": 1.0, "style": 0.5}, {"reward": 2.0, "style": -0.5}, {"reward": 3.0, "style": 0.25}
        ]  # fmt: skip

    def test_an_episode_without_a_reward_stays_without_and_uses_up_its_value(self):
        [group] = add_reward([group_of(1.0, None, 2.0)], "style", [0.5, 100.0, 0.25])
        assert [e.reward for e in group.episodes] == [1.5, None, 2.25]
        assert "style" not in group.episodes[1].rewards

    @pytest.mark.parametrize("count", [1, 3])
    def test_as_many_values_as_episodes(self, count):
        with pytest.raises(ValueError, match=f"expected a value for each of 2 episodes, but got {count}"):
            add_reward([group_of(1.0, 2.0)], "style", [0.5] * count)

    @PROPERTY
    @given(groups=rollouts())
    def test_nothing_else_changes(self, groups):
        found = add_reward(groups, "style", [0.0] * sum(len(g.episodes) for g in groups))
        for before, after in zip(groups, found, strict=True):
            assert after.task is before.task
            assert after.advantages == before.advantages
            for one, other in zip(before.episodes, after.episodes, strict=True):
                assert other.reward == one.reward
                assert replace(other, rewards=one.rewards) == one

    def test_advantages_follow(self):
        [group] = with_advantages(add_reward([group_of(1.0, 1.0)], "style", [1.0, 0.0]))
        assert group.advantages[0][0] > 0 > group.advantages[1][0]


class TestPunishOverlong:
    # 10 allowed, 4 of them buffer: free until 6, then -1/4 for each token.
    @pytest.mark.parametrize(
        ("length", "penalty"), [(1, 0.0), (6, 0.0), (7, -0.25), (9, -0.75), (10, -1.0), (12, -1.0)]
    )
    def test_golden(self, length, penalty):
        [group] = punish_overlong([group_of(2.0, length=length)], max_length=10, buffer=4)
        assert group.episodes[0].rewards[OVERLONG] == penalty
        assert group.episodes[0].reward == 2.0 + penalty

    @PROPERTY
    @given(groups=rollouts())
    def test_only_what_the_policy_sampled_counts(self, groups):
        for before, after in zip(groups, punish_overlong(groups, max_length=6, buffer=3), strict=True):
            for one, other in zip(before.episodes, after.episodes, strict=True):
                if one.reward is None:
                    assert other == one
                else:
                    expected = overlong_penalty(one.count(Source.SAMPLED), max_length=6, buffer=3)
                    assert other.rewards[OVERLONG] == expected
                    assert other.reward == one.reward + expected


class TestPunishKL:
    def test_golden(self):
        """Prompts of two tokens, then two sampled: rows 2 and 3 of each ledger of four."""
        kl = torch.tensor([math.nan, math.nan, 0.5, 0.25, math.nan, math.nan, 1.0, -0.5], dtype=torch.float64)
        [group] = punish_kl([group_of(1.0, 2.0)], kl, 0.1)
        assert [e.rewards[KL] for e in group.episodes] == pytest.approx([-0.075, -0.05])
        assert [e.reward for e in group.episodes] == pytest.approx([0.925, 1.95])

    def test_rows_behind_the_last_trained_token_may_be_missing(self):
        [group] = punish_kl([group_of(1.0, 2.0)], torch.tensor([math.nan, math.nan, 0.5]).double(), 1.0)
        assert [e.rewards[KL] for e in group.episodes] == [-0.5, 0.0]

    @PROPERTY
    @given(groups=rollouts(), weight=st.floats(0.01, 2))
    def test_every_episode_is_punished_for_its_own_tokens(self, groups, weight):
        rows = sum(len(ledger) for g in groups for e in g.episodes for ledger in e.ledgers)
        kl = torch.randn(rows, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
        kl[::3] = math.nan
        values, row = kl.tolist(), 0
        for before, after in zip(groups, punish_kl(groups, kl, weight), strict=True):
            for one, other in zip(before.episodes, after.episodes, strict=True):
                length = sum(map(len, one.ledgers))
                own = [v for v in values[row : row + length] if not math.isnan(v)]
                row += length
                if one.reward is not None:
                    assert other.rewards[KL] == pytest.approx(-weight * math.fsum(own), abs=1e-12)


class TestMaskTruncated:
    def test_only_those_that_were_cut_off(self):
        group = Group(
            make_task(),
            (make_episode([5], 1.0), make_episode([6], 0.0, finish_reason="length"), make_episode([7], 0.0)),
        )
        [found] = mask_truncated([group])
        assert [e.masked for e in found.episodes] == [False, True, False]
        assert [e.reward for e in found.episodes] == [1.0, 0.0, 0.0]

    def test_they_still_count_in_their_group(self):
        group = Group(make_task(), (make_episode([5], 1.0), make_episode([6], 0.0, finish_reason="length")))
        assert with_advantages(mask_truncated([group]))[0].advantages == with_advantages([group])[0].advantages


class Drawn:
    """Draws groups that vary, or do not, as told; counts what is asked."""

    def __init__(self, *varied):
        self.all, self.varied, self.asked = varied, list(varied), []

    def __call__(self, number, count):
        self.asked.append((number, count))
        first = 100 * (number + 1)
        return [(first + i, group_of(0.0, 1.0 if self.varied.pop(0) else 0.0)) for i in range(count)]


def first(*varied):
    return [(i, group_of(0.0, 1.0 if v else 0.0)) for i, v in enumerate(varied)]


class TestRefill:
    def test_nothing_to_replace(self):
        draw = Drawn()
        found, replaced, drawn = refill(first(True, True), draw, 5)
        assert (draw.asked, replaced, drawn) == ([], 0, 2)
        assert [index for index, _ in found] == [0, 1]

    def test_no_rounds(self):
        draw = Drawn()
        begun = first(True, False, True)
        found, replaced, drawn = refill(begun, draw, 0)
        assert (draw.asked, replaced, drawn) == ([], 0, 3)
        assert found == begun, "in their order, which decides the updates that they are trained in"

    def test_until_it_is_full(self):
        draw = Drawn(False, True, True)
        found, replaced, drawn = refill(first(True, False, False), draw, 5)
        assert draw.asked == [(0, 2), (1, 1)]
        assert [index for index, _ in found] == [0, 101, 200]
        assert (replaced, drawn) == (3, 6)

    def test_what_cannot_be_replaced_stays(self):
        draw = Drawn(False, False, False, True)
        found, replaced, drawn = refill(first(False, True, False), draw, 2)
        assert draw.asked == [(0, 2), (1, 2)]
        # One was found, and takes the first place that is to be filled; the last group stays.
        assert [index for index, _ in found] == [201, 1, 2]
        assert (replaced, drawn) == (4, 7)

    @PROPERTY
    @given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(0, 4), st.randoms(use_true_random=False))
    def test_counts(self, begun, rounds, random):
        draw = Drawn(*[random.random() < 0.5 for _ in range(100)])
        found, replaced, drawn = refill(first(*begun), draw, rounds)
        assert len(found) == len(begun)
        assert drawn == len(begun) + sum(count for _, count in draw.asked)
        assert len(draw.asked) <= rounds
        assert drawn == len(found) + replaced
        assert len({index for index, _ in found}) == len(found)
        for place, (index, group) in enumerate(found):
            assert index == place or (index >= 100 and varies(group) and not begun[place])
            assert not begun[place] or index == place
        good = sum(varies(group) for _, group in found)
        assert good == len(begun) or len(draw.asked) == rounds
        given = sum(draw.all[: sum(count for _, count in draw.asked)])
        assert good == sum(begun) + given, "none that varies is lost"
