"""What the page is told of an epoch, against the epoch itself."""

import json

import numpy as np
import pytest
from guessing import byte_ids, episode_of, guessing_epoch, guessing_group, stored

from grpo_lightning.rollout.episode import Episode, Group
from grpo_lightning.rollout.ledger import Ledger, Source
from grpo_lightning.rollout.types import Task
from grpo_lightning.trajectories.columns import epoch_columns, for_json
from grpo_lightning.trajectories.exact_json import NotStored
from grpo_lightning.trajectories.pieces import PieceTable


def table():
    return PieceTable(lambda token_id: bytes([token_id]))


def rebuilt(group, segment, place):
    """Token ids, sources, turns and versions of a sequence, read back from its columns as a plain loop."""
    tokens = list(segment["tokens"])
    runs = [(source, turn, version) for source, turn, version, count in segment["runs"] for _ in range(count)]
    if place == 0:
        tokens = group["prompt"] + tokens
        runs = [(int(Source.PROMPT), 0, -1)] * len(group["prompt"]) + runs
    return tokens, runs


def test_every_token_can_be_read_back():
    epoch, pieces = guessing_epoch(5, byte_ids, groups=4), table()
    columns = json.loads(json.dumps(epoch_columns(epoch, pieces)))
    row = 0
    for group, told in zip(epoch.groups, columns["groups"], strict=True):
        for episode, said in zip(group.episodes, told["episodes"], strict=True):
            assert len(said["segments"]) == len(episode.ledgers)
            for place, ledger in enumerate(episode.ledgers):
                segment = said["segments"][place]
                tokens, runs = rebuilt(told, segment, place)
                assert [pieces.ids[entry] for entry in tokens] == ledger.token_ids.tolist()
                assert runs == list(
                    zip(ledger.source.tolist(), ledger.turn.tolist(), ledger.policy_version.tolist(), strict=True)
                )
                np.testing.assert_allclose(segment["logprobs"], ledger.logprobs[ledger.sampled], rtol=5e-4)
                ratios = epoch.log_ratios[row : row + len(ledger)][ledger.sampled]
                np.testing.assert_allclose(segment["ratios"], ratios, rtol=5e-4)
                row += len(ledger)
    assert row == len(epoch.log_ratios)


def test_rewards_stand_under_their_names():
    one = episode_of([("q", "a")], rewards={"b": 0.5, "a": None}, reward=0.5)
    other = episode_of([("q", "a")], rewards={"c": 2.0}, reward=None, failure="no reward applies")
    columns = epoch_columns(stored([Group(Task("t"), (one, other))]), table())
    assert columns["rewardNames"] == ["a", "b", "c"]
    first, second = columns["groups"][0]["episodes"]
    assert (first["reward"], first["rewards"]) == (0.5, [None, 0.5, None])
    assert (second["reward"], second["rewards"], second["failure"]) == (None, [None, None, 2.0], "no reward applies")


def test_what_is_usual_is_not_said():
    columns = epoch_columns(stored([Group(Task("t"), (episode_of([("q", "a")]),))], trained=False), table())
    (episode,) = columns["groups"][0]["episodes"]
    assert set(episode) == {"status", "reward", "rewards", "turns", "segments"}
    assert episode["turns"] == [{}]
    assert set(episode["segments"][0]) == {"tokens", "runs", "logprobs"}
    assert columns["hasRatios"] is False


def test_tokens_that_were_not_trained_on_have_no_ratio():
    epoch = stored([Group(Task("t"), (episode_of([("q", "abc")]),))])
    epoch.log_ratios[2] = np.nan
    ratios = epoch_columns(epoch, table())["groups"][0]["episodes"][0]["segments"][0]["ratios"]
    assert ratios[1] is None
    assert None not in (ratios[0], ratios[2])


def test_an_episode_of_several_sequences_keeps_the_later_prompts():
    whole = episode_of([("first", "ab"), ("second", "c")])
    ledgers = (
        Ledger.of_prompt(byte_ids("first")).extended(
            byte_ids("ab"), Source.SAMPLED, 0, whole.turns[0].action.token_logprobs, 3
        ),
        Ledger.of_prompt(byte_ids("first, again"), turn=1).extended(
            byte_ids("c"), Source.SAMPLED, 1, whole.turns[1].action.token_logprobs, 3
        ),
    )
    pieces = table()
    split = Episode(whole.turns, ledgers, {}, 1.0)
    segments = epoch_columns(stored([Group(Task("t"), (split,))]), pieces)["groups"][0]["episodes"][0]["segments"]
    texts = ["".join(pieces.texts[entry] for entry in segment["tokens"]) for segment in segments]
    assert texts == ["ab", "first, againc"]
    assert segments[1]["runs"] == [[0, 1, -1, 12], [1, 1, 3, 1]]


def test_a_broken_episode_has_no_sequences():
    group = guessing_group(3, byte_ids)
    broken = epoch_columns(stored([group]), table())["groups"][0]["episodes"][-1]
    assert (broken["status"], broken["segments"], broken["reward"]) == ("error", [], None)
    assert broken["attempts"] == 3


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({1: (1, 2.5)}, {"1": [1, 2.5]}),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (np.float32(0.5), 0.5),
        (np.arange(2), [0, 1]),
        (True, True),
        (2**53, 2**53),
        (-(2**53) - 1, "-9007199254740993"),
        (NotStored("Board", "<Board 3x3>"), "<Board 3x3>"),
        (1 + 2j, "(1+2j)"),
    ],
)
def test_any_value_becomes_one_that_can_be_shown(value, told):
    assert for_json(value) == told
    assert type(for_json(value)) is type(told)
