import pytest
from fakes import make_episode, make_group

from grpo_lightning.rollout.episode import Episode
from grpo_lightning.rollout.evaluation import greedy_scores, pass_sizes, sampled_scores


def group(*rewards, names=None):
    return make_group([make_episode([1, 2], r, rewards=names) for r in rewards])


def test_greedy_scores():
    groups = [group(1.0), group(0.5), group(None), group(2.0)]
    assert greedy_scores(groups, ["reward"], success_reward=1.0) == {
        "reward": [1.0, 0.5, 2.0],
        "accuracy": [1.0, 0.0, 0.0, 1.0],
        "reward_reward": [1.0, 0.5, 2.0],
    }


def test_each_reward_counts_where_it_applies():
    groups = [group(1.0, names={"format": 1.0, "answer": None}), group(0.5, names={"format": 0.0, "answer": 0.5})]
    scores = greedy_scores(groups, ["format", "answer", "never"], success_reward=0.5)
    assert (scores["reward_format"], scores["reward_answer"], scores["reward_never"]) == ([1.0, 0.0], [0.5], [])
    assert scores["accuracy"] == [1.0, 1.0]


def test_rewards_of_an_environment_are_scores_too():
    groups = [group(1.0, names={"environment": 0.75, "won": 1.0, "format": 0.25}), group(0.5, names={"won": 0.0})]
    broken = make_group([Episode((), (), {}, None, "error", "no route")])
    scores = greedy_scores([*groups, broken], ["format"], success_reward=1.0)
    assert scores == {
        "reward": [1.0, 0.5],
        # What broke is left out: it says nothing about the policy.
        "accuracy": [1.0, 0.0],
        "reward_format": [0.25],
        "reward_environment": [0.75],
        "reward_won": [1.0, 0.0],
    }


def test_sampled_scores():
    groups = [group(1.0, 0.0, 0.0, 3.0), group(0.9, 0.0, -1.0, 0.0), group(1.0, 0.0, 0.0, 0.0)]
    # Two, none and one of four are correct: 1 - C(2, 2) / C(4, 2) = 5 / 6, and 1 - C(3, 2) / C(4, 2) = 1 / 2.
    assert sampled_scores(groups, success_reward=1.0) == {
        "avg_at_4": [0.5, 0.0, 0.25],
        "pass_at_2": [5 / 6, 0.0, 0.5],
        "pass_at_4": [1.0, 0.0, 1.0],
    }


def test_samples_that_cannot_be_scored_are_not_correct():
    assert sampled_scores([group(None, 1.0, None)], success_reward=0.0) == {
        "avg_at_3": [1 / 3],
        "pass_at_2": [2 / 3],
        "pass_at_3": [1.0],
    }


def test_no_tasks_no_scores():
    assert sampled_scores([], success_reward=1.0) == {}


@pytest.mark.parametrize(
    ("samples", "expected"),
    [(2, [2]), (3, [2, 3]), (4, [2, 4]), (6, [2, 4, 6]), (8, [2, 4, 8]), (9, [2, 4, 8, 9]), (31, [2, 4, 8, 16, 31])],
)
def test_pass_sizes(samples, expected):
    assert pass_sizes(samples) == expected
