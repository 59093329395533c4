import logging
import math
import random

import pytest
from fakes import make_episode, make_group
from hypothesis import given, settings
from trajectories import rollouts

from grpo_lightning.errors import GRPOError, LogprobValidationError, RolloutError
from grpo_lightning.rollout.episode import Episode, Turn
from grpo_lightning.rollout.ledger import Ledger, Source
from grpo_lightning.rollout.types import Action, Generation
from grpo_lightning.rollout.validation import sampled_logprobs, validate_generation, validate_rollout


def generation(tokens, logprobs):
    return Generation(tuple(tokens), tuple(logprobs), "stop", 0)


def varied(count, seed=0):
    rng = random.Random(seed)
    return [-rng.expovariate(1) for _ in range(count)]


@pytest.mark.parametrize("logprobs", [[-0.5, -1.0], [0.0, -0.0], [-1e4, -50.0], [5e-4, -1.0]])
def test_good_generation(logprobs):
    validate_generation(generation([1, 2], logprobs), "t")


def refusal(tokens, logprobs):
    with pytest.raises(LogprobValidationError) as caught:
        validate_generation(generation(tokens, logprobs), "task-7")
    assert isinstance(caught.value, RolloutError | GRPOError)
    message = str(caught.value)
    assert message.startswith("task 'task-7': ")
    return message


def test_no_token_is_refused():
    assert "returned no token at all" in refusal([], [])


@pytest.mark.parametrize("logprobs", [[], [None, None], [-0.5, None]])
def test_missing_logprobs_are_refused_and_say_how_to_get_them(logprobs):
    message = refusal([1, 2], logprobs)
    assert "no sample-time logprobs" in message
    assert "logprobs=0" in message


@pytest.mark.parametrize("count", [1, 3, 4])
def test_one_logprob_per_token(count):
    assert f"expected one logprob per sampled token, but got {count} for 2" in refusal([1, 2], [-1.0] * count)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.01, 1.0])
def test_wrong_values_are_refused_and_shown(value):
    message = refusal([1, 2, 3], [-0.5, value, -0.5])
    assert "expected finite logprobs <= 0, but 1 of 3 are not" in message
    assert message.endswith(f"for example {value}")


def test_good_rollout(caplog):
    groups = [make_group([make_episode([3] * 40, logprobs=varied(40, i)) for i in range(2)]) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        validate_rollout(groups)
    assert not caplog.records


def test_tokens_that_nobody_sampled_do_not_hide_a_constant():
    first = Ledger.of_prompt([1, 2]).extended([3] * 40, Source.SAMPLED, 0, [-0.5] * 40, 0)
    first = first.extended([4], Source.FORCED, 0).extended([5, 6], Source.ENVIRONMENT, 1)
    first = first.extended([3] * 24, Source.SAMPLED, 1, [-0.5] * 24, 0)
    turns = tuple(Turn((), Action("", (3,) * n, (-0.5,) * n, -0.5 * n, False, "stop", 0)) for n in (40, 24))
    groups = [make_group([Episode(turns, (first,), {}, 1.0), Episode((), (), {}, None, "error")])]
    assert sampled_logprobs(groups).tolist() == [-0.5] * 64
    with pytest.raises(LogprobValidationError, match="all 64 sample-time logprobs are exactly -0.5"):
        validate_rollout(groups)


@settings(max_examples=40, deadline=None)
@given(rollouts())
def test_logprobs_are_those_of_the_actions_that_the_policy_chose(groups):
    actions = [turn.action for g in groups for e in g.episodes for turn in e.turns]
    assert sampled_logprobs(groups).tolist() == [v for a in actions for v in a.token_logprobs]
    assert sampled_logprobs([]).tolist() == []


@pytest.mark.parametrize("value", [0.0, -1.0, -0.3])
def test_constant_logprobs_are_refused(value):
    episodes = [make_episode([3] * 32, logprobs=[value] * 32) for _ in range(2)]
    with pytest.raises(LogprobValidationError, match=f"all 64 sample-time logprobs are exactly {value}"):
        validate_rollout([make_group(episodes)])


def test_constant_within_each_completion_is_not_constant():
    episodes = [make_episode([3] * 64, logprobs=[-0.5] * 64), make_episode([3] * 64, logprobs=[-0.6] * 64)]
    validate_rollout([make_group(episodes)])


def test_too_few_tokens_are_not_judged(caplog):
    with caplog.at_level(logging.WARNING):
        validate_rollout([make_group([make_episode([3] * 63, logprobs=[-0.5] * 63)])])
        validate_rollout([make_group([make_episode([3], logprobs=[-0.5])])])
        validate_rollout([])
    assert not caplog.records


def test_hardly_varying_logprobs_are_told_but_allowed(caplog):
    logprobs = [-1e-6 * i / 100 for i in range(100)]
    with caplog.at_level(logging.WARNING, logger="grpo_lightning"):
        validate_rollout([make_group([make_episode([3] * 100, logprobs=logprobs)])])
    [record] = caplog.records
    assert "hardly vary" in record.getMessage()
    assert "100 tokens" in record.getMessage()
