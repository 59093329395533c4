import math

import numpy as np
import pytest
from fakes import make_episode, make_group

from grpo_lightning.diagnostics import Status
from grpo_lightning.diagnostics.checks.diversity import Said, check_diversity, check_tasks, said

LIMIT = 16.1


def drawn(rng, groups=16, samples=8, tokens=2, vocabulary=40, sharpness=2.0, policies=None):
    """A rollout of independent draws with their true logprobs; a policy of its own for each group."""
    found = []
    for number in range(groups):
        logits = rng.normal(size=vocabulary) * sharpness if policies is None else policies[number]
        logp = logits - np.log(np.exp(logits).sum())
        for _ in range(samples):
            ids = rng.choice(vocabulary, size=tokens, p=np.exp(logp))
            found.append(Said(number, ids.tobytes(), float(logp[ids].sum()), ids.tobytes()))
    return found


def copied(samples):
    """All samples of a group are its first."""
    firsts = {}
    return [firsts.setdefault(sample.group, sample) for sample in samples]


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 5.0])
def test_independent_samples_alarm_no_more_often_than_stated(sharpness):
    rng = np.random.default_rng(1)
    policies = rng.normal(size=(16, 40)) * sharpness
    alarms = {1.0: 0, 3.0: 0, LIMIT: 0}
    before = drawn(rng, policies=policies)
    for _ in range(150):
        samples = drawn(rng, policies=policies)
        for limit in alarms:
            alarms[limit] += check_diversity(samples, before, limit).status is Status.FAIL
        before = samples
    assert alarms[LIMIT] == 0
    for limit in (1.0, 3.0):
        assert alarms[limit] <= 150 * math.exp(-limit)


@pytest.mark.parametrize("tokens", [2, 5, 20])
def test_copies_within_groups_are_found(tokens):
    rng = np.random.default_rng(2)
    verdict = check_diversity(copied(drawn(rng, tokens=tokens)), [], LIMIT)
    assert (verdict.status, verdict.cause) == (Status.FAIL, "samples_repeated")
    assert verdict.evidence["distinct"] <= 16
    assert "copies of each other" in verdict.message


def test_one_long_copy_of_another_group_is_found():
    samples = drawn(np.random.default_rng(3), tokens=20)
    moved = Said(9, samples[8].tokens, samples[8].logprob, samples[8].exact)
    assert check_diversity(samples, [], LIMIT).status is Status.PASS
    verdict = check_diversity([*samples, moved], [], LIMIT)
    assert (verdict.status, verdict.cause) == (Status.FAIL, "samples_repeated")


def test_the_rollout_before_is_found():
    rng = np.random.default_rng(4)
    before = drawn(rng, tokens=5)
    verdict = check_diversity(before, before, LIMIT)
    assert (verdict.status, verdict.cause) == (Status.FAIL, "stale_rollout")
    # The same texts with other logprobs: seeds were repeated, the policy was not.
    other = [Said(s.group, s.tokens, s.logprob, s.exact + b"'") for s in before]
    assert check_diversity(other, before, LIMIT).cause == "samples_repeated"
    assert check_diversity(drawn(rng, tokens=5), before, LIMIT).status is Status.PASS


def test_a_certain_policy_says_nothing():
    certain = [Said(n // 8, bytes([n // 8]), -1e-4, bytes([n // 8])) for n in range(128)]
    verdict = check_diversity(certain, certain, LIMIT)
    assert verdict.status is Status.NO_POWER
    assert "copies would not be strange" in verdict.message
    assert check_diversity(certain[:1], [], LIMIT).status is Status.NO_POWER


def test_said_knows_tokens_turns_and_logprobs():
    one, same, other = make_episode([7, 8]), make_episode([7, 8], logprobs=[-1, -2]), make_episode([7, 9])
    found = said([make_group([one, same]), make_group([other])])
    assert [s.group for s in found] == [0, 0, 1]
    assert found[0].tokens == found[1].tokens != found[2].tokens
    assert found[0].exact != found[1].exact
    assert found[1].logprob == -3


def test_tasks_that_come_again():
    tasks = (3, 1, 4, 5)
    assert check_tasks([tasks] * 4, 50, LIMIT).cause == "tasks_repeated"
    assert check_tasks([tasks], 50, LIMIT).status is Status.PASS
    # Two of four tasks come in the same order by chance more often than that.
    assert check_tasks([(0, 1)] * 3, 4, LIMIT).status is Status.PASS
    assert check_tasks([tasks] * 9, 4, LIMIT).status is Status.NO_POWER
