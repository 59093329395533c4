from dataclasses import replace

import numpy as np
import pytest
from fakes import make_episode, make_group

from grpo_lightning.diagnostics import Status
from grpo_lightning.diagnostics.checks.endings import check_endings
from grpo_lightning.diagnostics.checks.groups import check_equal_answers, check_groups, check_rewards, equal_answers
from grpo_lightning.rollout.chat_template import TemplateFacts

Z = 5.3


def rollout(rng, *, answers=6, rewards=None, groups=16, samples=8):
    """Short answers, right or wrong by what they say; ``rewards`` makes something else of that."""
    found = []
    for _ in range(groups):
        said = rng.integers(answers, size=samples)
        right = rng.integers(answers)
        found.append([(int(answer), float(answer == right)) for answer in said])
    flat = np.array([reward for group in found for _, reward in group])
    given = iter(flat if rewards is None else rewards(rng, flat))
    return [
        make_group([make_episode([answer], float(next(given))) for answer, _ in group], name=f"t{n}")
        for n, group in enumerate(found)
    ]


def judged(seed, rollouts=20, **settings):
    rng = np.random.default_rng(seed)
    return check_equal_answers([equal_answers(rollout(rng, **settings)) for _ in range(rollouts)], Z)


def test_rewards_that_follow_from_the_answer_never_alarm():
    answers = [judged(seed).status for seed in range(5)]
    assert Status.FAIL not in answers
    assert answers.count(Status.PASS) == 5


def test_rewards_of_other_samples_are_found():
    verdicts = [judged(seed, rewards=lambda rng, values: rng.permutation(values)) for seed in range(5)]
    assert {v.cause for v in verdicts} == {"groups_shuffled"}
    assert "wrong samples" in verdicts[0].message


def test_a_noisy_reward_is_no_failure():
    def noisy(rng, values):
        return values + 0.2 * rng.normal(size=len(values))

    verdicts = [judged(seed, rewards=noisy) for seed in range(5)]
    assert {v.status for v in verdicts} == {Status.PASS}
    assert "no function of the answer" in verdicts[0].message


def test_long_answers_and_solved_tasks_say_nothing():
    assert judged(0, answers=10**6).status is Status.NO_POWER
    solved = judged(0, rewards=lambda rng, values: np.ones_like(values))
    assert solved.status is Status.NO_POWER
    assert "too few" in solved.message


def test_groups_and_their_tasks():
    groups = [make_group([make_episode([7], prompt=(4, 5)), make_episode([8], prompt=(4, 5))])]
    assert check_groups(groups, {0: True}).status is Status.PASS
    verdict = check_groups(groups, {0: False})
    assert verdict.cause == "groups_mixed"
    assert "for example task 'task'" in verdict.message


def test_rewards_that_never_differ():
    assert check_rewards(4, 0).status is Status.NO_POWER
    assert check_rewards(5, 0).cause == "rewards_constant"
    assert check_rewards(500, 1).status is Status.PASS


def facts(stops):
    return TemplateFacts("a model", ["x", "x"], True, "<a>", "<end>", 9, stops)


def test_ends_that_are_passed_over():
    groups = [make_group([make_episode([7, 9, 8], finish_reason="length") for _ in range(40)])]
    verdict = check_endings(groups, (1,), facts(["<eos>"]))
    assert verdict.cause == "template"
    assert "40 of 40 completions go on behind '<end>'" in verdict.message
    assert check_endings(groups, (9,), facts(["<end>"])).status is Status.PASS
    assert check_endings(groups, (1,), None).cause == "never_stops"
    # A base model does not know the token.
    base = [make_group([make_episode([7, 1]) for _ in range(40)])]
    assert check_endings(base, (1,), facts(["<eos>"])).status is Status.PASS


@pytest.mark.parametrize(
    ("at_once", "cause"), [(0, "never_stops"), (4, "never_stops"), (20, ""), (40, "answers_empty")]
)
def test_what_ends_before_it_says_anything_is_no_answer_that_ends(at_once, cause):
    """A limit of one token: what stops there has said nothing."""
    silent, cut_off = make_episode([1]), make_episode([7], finish_reason="length")
    silent = replace(silent, turns=(replace(silent.turns[0], action=replace(silent.turns[0].action, text="")),))
    verdict = check_endings([make_group([silent] * at_once + [cut_off] * (40 - at_once))], (1,), None)
    assert verdict.cause == cause
    if cause == "never_stops":
        assert f"Of {40 - at_once} completions that say something 100% were cut off" in verdict.message


def test_too_few_turns_say_nothing_of_endings():
    assert check_endings([make_group([make_episode([7])])], (1,), None).status is Status.NO_POWER
