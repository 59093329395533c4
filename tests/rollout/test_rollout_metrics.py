import math
import statistics

import pytest
from fakes import make_episode, make_group
from hypothesis import given, settings
from trajectories import rollouts

from grpo_lightning.rollout.episode import Episode, Turn
from grpo_lightning.rollout.ledger import NO_VERSION, Ledger, Source
from grpo_lightning.rollout.metrics import rollout_metrics
from grpo_lightning.rollout.types import Action, ToolCall


def play(reward, *parts, rewards=None, calls=(), errors=(), attempts=1, status="terminated"):
    """An episode of ``("said" | "forced" | "close" | "seen" | "split", tokens)``; the first two are turns."""
    ledgers, turns = [Ledger.of_prompt([4, 5])], []
    for what, tokens in parts:
        number = len(turns)
        if what == "split":
            ledgers.append(Ledger.of_prompt(tokens, number))
        elif what == "seen":
            ledgers[-1] = ledgers[-1].extended(tokens, Source.ENVIRONMENT, number)
        elif what == "close":
            ledgers[-1] = ledgers[-1].extended(tokens, Source.FORCED, number - 1)
        else:
            was_forced = what == "forced"
            logprobs = () if was_forced else (-1.0,) * len(tokens)
            version = NO_VERSION if was_forced else 0
            made = calls if number == 0 else ()
            action = Action("", tuple(tokens), logprobs, sum(logprobs), was_forced, "stop", version, made)
            turns.append(Turn((), action, error="wrong" if number in errors else None, segment=len(ledgers) - 1))
            source = Source.FORCED if was_forced else Source.SAMPLED
            ledgers[-1] = ledgers[-1].extended(tokens, source, number, logprobs or None, version)
    names = {"reward": reward} if rewards is None else rewards
    return Episode(tuple(turns), tuple(ledgers), names, reward, status, attempts=attempts)


@pytest.fixture
def groups():
    half_forced = play(1.0, ("said", [4, 4]), ("forced", [7, 8]), rewards={"exact": 1.0})
    return [
        make_group(
            [
                make_episode([1, 2, 3], 1.0, rewards={"exact": 1.0, "style": None}),
                make_episode([1], 0.0, rewards={"exact": 0.0, "style": 0.5}),
                make_episode([1, 2], 0.5, rewards={"exact": 0.5, "style": 0.25}, finish_reason="length"),
            ],
        ),
        make_group([make_episode([5] * 7, 2.0, rewards={"exact": 2.0}) for _ in range(3)]),
        make_group(
            [
                make_episode([4], None, rewards={"exact": 3.0}),
                half_forced,
                make_episode([4], None, rewards={}, finish_reason="length"),
            ],
        ),
    ]


def test_every_number(groups):
    rewards = [1.0, 0.0, 0.5, 2.0, 2.0, 2.0, 1.0]
    lengths = [3, 1, 2, 7, 7, 7, 1, 2, 1]
    assert rollout_metrics(groups) == pytest.approx(
        {
            "reward/mean": statistics.fmean(rewards),
            "reward/std": statistics.pstdev(rewards),
            "reward/failed": 2,
            # Two groups have something to compare; one of them has equal rewards.
            "group/zero_variance_fraction": 1 / 2,
            "group/dropped": 1,
            "completion/length_mean": statistics.fmean(lengths),
            "completion/length_max": 7,
            "completion/truncated_fraction": 2 / 9,
            "tokens/sampled": sum(lengths),
            "tokens/forced": 2,
            "reward/exact": statistics.fmean([1.0, 0.0, 0.5, 2.0, 2.0, 2.0, 3.0, 1.0]),
            "reward/style": 0.375,
        }
    )


def test_all_values_are_plain_floats(groups):
    assert {type(v) for v in rollout_metrics(groups).values()} == {float}


def test_a_reward_that_never_applies_has_no_mean():
    episodes = [make_episode([1], 1.0, rewards={"a": 1.0, "b": None}) for _ in range(2)]
    metrics = rollout_metrics([make_group(episodes)])
    assert metrics["reward/a"] == 1.0
    assert "reward/b" not in metrics


def test_nothing_scored_is_nan_and_not_an_error():
    metrics = rollout_metrics([make_group([make_episode([1], None), make_episode([1], None)])])
    assert math.isnan(metrics["reward/mean"])
    assert metrics["reward/failed"] == 2
    assert metrics["group/dropped"] == 1
    assert metrics["group/zero_variance_fraction"] == 0


BROKEN = Episode((), (), {}, None, "error", "no route", attempts=3)


def turns_metrics(*episodes):
    metrics = rollout_metrics([make_group(episodes)], multi_turn=True)
    return {name: value for name, value in metrics.items() if name not in rollout_metrics([make_group(episodes)])}


def test_every_number_of_turns():
    calls = (ToolCall("add", {"a": 1}), ToolCall("", error="no JSON"))
    long = play(
        1.0,
        ("said", [1, 2]),
        ("close", [9]),
        ("seen", [7, 7, 7]),
        ("forced", [3, 3]),
        ("seen", [7]),
        ("said", [5]),
        ("split", [4, 5, 6]),
        ("said", [6, 6]),
        calls=calls,
        errors=(0, 3),
        attempts=2,
        status="truncated",
    )
    short = play(0.0, ("forced", [8]), ("seen", [7, 7]), ("said", [1]), calls=calls[:1])
    assert turns_metrics(long, short, BROKEN) == pytest.approx(
        {
            "episode/turns_mean": 3.0,
            "episode/turns_max": 4.0,
            "episode/sequences": 1.5,
            "episode/errors": 1.0,
            "episode/retries": 3.0,
            "action/forced_fraction": 2 / 6,
            "action/invalid_fraction": 2 / 6,
            "tools/calls": 3.0,
            "tokens/environment": 6.0,
        }
    )
    metrics = rollout_metrics([make_group([long, short, BROKEN])])
    # What the policy said in all turns; the system's part is the forced actions and the end of a turn.
    assert metrics["completion/length_max"] == 5
    assert metrics["completion/truncated_fraction"] == 1 / 2
    assert (metrics["tokens/sampled"], metrics["tokens/forced"]) == (6, 1 + 2 + 1)
    assert metrics["reward/failed"] == 1


def test_nothing_played_has_no_turns():
    assert turns_metrics(BROKEN, BROKEN) == {
        "episode/turns_mean": 0.0,
        "episode/turns_max": 0.0,
        "episode/sequences": 0.0,
        "episode/errors": 2.0,
        "episode/retries": 4.0,
        "action/forced_fraction": 0.0,
        "action/invalid_fraction": 0.0,
        "tools/calls": 0.0,
        "tokens/environment": 0.0,
    }


def test_a_group_with_one_episode_that_the_policy_had_a_part_in_is_dropped():
    scripted = play(1.0, ("forced", [3]))
    played = play(0.0, ("said", [3]))
    groups = [make_group([scripted, played]), make_group([played, played]), make_group([BROKEN, played, played])]
    assert rollout_metrics(groups)["group/dropped"] == 1


@settings(max_examples=40, deadline=None)
@given(rollouts())
def test_tokens_are_counted_by_their_source(groups):
    metrics = rollout_metrics(groups, multi_turn=True)
    ledgers = [ledger for g in groups for e in g.episodes for ledger in e.ledgers]
    for name, source in (("sampled", 1), ("forced", 2), ("environment", 3)):
        assert metrics[f"tokens/{name}"] == sum((ledger.source == source).sum() for ledger in ledgers)
    assert {type(v) for v in metrics.values()} == {float}
