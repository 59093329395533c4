from dataclasses import replace

import pytest
from fakes import make_episode, make_group
from hypothesis import given
from hypothesis import strategies as st
from trajectories import rollouts

from grpo_lightning.diagnostics import Status
from grpo_lightning.diagnostics.checks.advantages import check_advantages
from grpo_lightning.rollout.advantages import with_advantages


def rollout(*rewards):
    return with_advantages([make_group([make_episode([5, 6], reward) for reward in group]) for group in rewards])


def changed(groups, change):
    return [
        replace(g, advantages=tuple(tuple(change(n, a) for a in turns) for turns in g.advantages))
        for n, g in enumerate(groups)
    ]


@given(rollouts(), st.sampled_from(["episode", "reward_to_go"]))
def test_what_the_rollout_computes_passes(groups, credit):
    verdict = check_advantages(with_advantages(groups, credit), credit)
    assert verdict.status is Status.PASS, str(verdict)


def test_a_solved_task_is_no_failure():
    verdict = check_advantages(rollout([1.0, 1.0], [0.0, 0.0]), "episode")
    assert verdict.status is Status.PASS
    assert "advantages of 0 are right" in verdict.message


@pytest.mark.parametrize(
    ("change", "cause", "words"),
    [
        (lambda n, a: 0.0, "advantages_zero", "although the rewards vary in 2 of 3 groups"),
        (lambda n, a: -a, "advantages_sign", "make the policy worse"),
        (lambda n, a: 0.5 * a, "advantages_wrong", "they are 0.5 times as large"),
        (lambda n, a: a + 0.1, "advantages_wrong", "do not sum to 0 in each group"),
        (lambda n, a: (n + 1) * a, "advantages_wrong", "another size in each group"),
        (lambda n, a: 0.0 if n == 0 else a, "advantages_wrong", "In 1 of 3 groups"),
        (lambda n, a: a * (1 + 1e-4), "advantages_wrong", "In 2 of 3 groups"),
    ],
)
def test_what_does_not_follow_from_the_rewards(change, cause, words):
    groups = rollout([0.0, 1.0, 1.0], [0.0, 0.5, 2.0], [1.0, 1.0, 1.0])
    verdict = check_advantages(changed(groups, change), "episode")
    assert (verdict.status, verdict.cause) == (Status.FAIL, cause)
    assert words in verdict.message
    assert "expected" in str(verdict)


def test_advantages_without_differences_in_reward():
    groups = changed(rollout([1.0, 1.0]), lambda n, a: 0.3)
    assert check_advantages(groups, "episode").cause == "advantages_wrong"


def test_other_credit_is_seen():
    found = with_advantages(
        [make_group([make_episode([5], 1.0), make_episode([5], None), make_episode([6], 0.0)])], "episode"
    )
    assert check_advantages(found, "episode").status is Status.PASS
    broken = [replace(found[0], episodes=(replace(found[0].episodes[0], reward=float("nan")), *found[0].episodes[1:]))]
    verdict = check_advantages(broken, "episode")
    assert verdict.cause == "advantages_wrong"
    assert "1 rewards are NaN or infinite" in verdict.message
