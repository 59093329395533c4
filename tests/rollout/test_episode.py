from dataclasses import FrozenInstanceError, replace

import pytest
from fakes import make_episode, make_task
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectories import groups, played_episodes, prompts

from grpo_lightning.errors import LedgerError, LogprobValidationError, RolloutError
from grpo_lightning.rollout.episode import Episode, Group, Predictions, Turn, said
from grpo_lightning.rollout.ledger import Ledger, Source
from grpo_lightning.rollout.types import Action


def sampled(tokens, logprobs, version=0):
    return Action("", tuple(tokens), tuple(logprobs), sum(logprobs), False, "stop", version)


def forced(tokens):
    return Action("", tuple(tokens), (), 0.0, True, "stop", -1)


TURNS = (Turn((), sampled([5, 6], [-0.5, -1.0])), Turn((), forced([7])), Turn((), sampled([8], [-2.0]), segment=1))
FIRST = Ledger.of_prompt([1]).extended([5, 6], Source.SAMPLED, 0, [-0.5, -1.0], 0).extended([7], Source.FORCED, 1)
SECOND = Ledger.of_prompt([1, 2], 2).extended([8], Source.SAMPLED, 2, [-2.0], 0)


def test_an_episode_of_several_ledgers():
    episode = Episode(TURNS, (FIRST, SECOND), {}, 1.0)
    assert [episode.count(source) for source in Source] == [3, 3, 1, 0]
    with pytest.raises(FrozenInstanceError):
        episode.reward = 2.0


WRONG_LEDGERS = {
    "another token": (
        (FIRST, Ledger.of_prompt([1, 2], 2).extended([9], Source.SAMPLED, 2, [-2.0], 0)),
        r"but token_ids differ \(3 in the ledger, 3 in the actions\)",
    ),
    "another logprob": (
        (FIRST, Ledger.of_prompt([1, 2], 2).extended([8], Source.SAMPLED, 2, [-2.0000000000000004], 0)),
        r"but logprobs differ \(3 in the ledger, 3 in the actions\)",
    ),
    "a ledger is missing": ((FIRST,), r"but token_ids differ \(2 in the ledger, 3 in the actions\)"),
    "other order": ((SECOND, FIRST), "but token_ids differ"),
    "a forced token as sampled": (
        (FIRST, SECOND.extended([9], Source.SAMPLED, 2, [-1.0], 0)),
        r"but token_ids differ \(4 in the ledger, 3 in the actions\)",
    ),
    "a sampled token as forced": (
        (Ledger.of_prompt([1]).extended([5, 6, 7], Source.FORCED, 0), SECOND),
        r"but token_ids differ \(1 in the ledger, 3 in the actions\)",
    ),
    "no ledger": ((), r"but token_ids differ \(0 in the ledger, 3 in the actions\)"),
}


@pytest.mark.parametrize(("ledgers", "message"), WRONG_LEDGERS.values(), ids=WRONG_LEDGERS.keys())
def test_a_ledger_that_differs_from_the_actions_is_refused(ledgers, message):
    expected = "expected the ledger's sampled tokens to be those of the 3 actions, in order, "
    with pytest.raises(LedgerError, match=expected + message):
        Episode(TURNS, ledgers, {}, 1.0)


@settings(max_examples=60, deadline=None)
@given(prompts.flatmap(played_episodes), st.data())
def test_no_action_can_be_exchanged_unnoticed(episode, data):
    number = data.draw(st.integers(0, len(episode.turns) - 1))
    turn = episode.turns[number]
    tokens = (*turn.action.token_ids[:-1], turn.action.token_ids[-1] + 1)
    turns = [replace(t, action=replace(t.action, token_ids=tokens)) if t is turn else t for t in episode.turns]
    if turn.action.was_forced:
        replace(episode, turns=tuple(turns))
    else:
        with pytest.raises(LedgerError, match="but token_ids differ"):
            replace(episode, turns=tuple(turns))


@pytest.mark.parametrize("logprobs", [(), (-1.0,), (-1.0, -1.0, -1.0)])
def test_a_sampled_action_needs_one_logprob_per_token(logprobs):
    message = f"one logprob per sampled token and none of forced ones, but got {len(logprobs)} for 2 sampled tokens"
    with pytest.raises(LogprobValidationError, match=message):
        sampled([1, 2], logprobs)


def test_a_forced_action_has_no_logprobs():
    message = "one logprob per sampled token and none of forced ones, but got 2 for 2 forced tokens"
    with pytest.raises(LogprobValidationError, match=message):
        Action("", (1, 2), (-1.0, -1.0), -2.0, True, "stop", -1)


def test_what_was_said_last():
    first, last = (replace(TURNS[0], action=replace(TURNS[0].action, text=text)) for text in ("one", "two"))
    ledger = FIRST.extended([5, 6], Source.SAMPLED, 1, [-0.5, -1.0], 0)
    assert Episode((first, last), (ledger,), {}, None).text == "two"
    assert Episode((), (), {}, None, "error").text == ""


def test_a_text_as_an_episode():
    task = make_task("t")
    episode = said(task, "it is 4")
    assert episode.text == "it is 4"
    assert episode.turns[0].messages == task.messages
    assert (episode.ledgers, dict(episode.rewards), episode.reward) == ((), {}, None)


def test_different_prompts_in_a_group_are_refused():
    first, second, third = (make_episode([5], prompt=prompt) for prompt in ([1, 2], [1, 3], [1, 3, 4]))
    broken = Episode((), (), {}, None, "error")
    message = "task 'task': expected all episodes of a group to begin with the same prompt, but there are 3 different"
    with pytest.raises(RolloutError, match=message) as caught:
        Group(make_task(), (first, second, broken, third, second))
    assert "make the environment's reset depend on task.seed and task.data alone" in str(caught.value)


def test_only_first_prompts_are_compared_and_broken_episodes_have_none():
    broken = Episode((), (), {}, None, "error")
    split = Episode(TURNS, (FIRST, SECOND), {}, 1.0)
    group = Group(make_task(), (broken, split, make_episode([5], prompt=[1])))
    assert group.prompt_ids == (1,)
    assert Group(make_task(), (broken, broken)).prompt_ids == ()


@settings(max_examples=30, deadline=None)
@given(groups(size=3))
def test_predictions_are_not_taken_apart(group):
    predictions = Predictions((group, group))
    assert predictions.to("meta", non_blocking=True) is predictions
    assert list(predictions) == [group, group]
