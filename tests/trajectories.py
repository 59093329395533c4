"""Random multi-turn episodes and groups, for the tests that hold for all of them.

Hypothesis chooses their shape, which it can simplify; what is said in them follows from one seed.
"""

import random

import numpy as np
from fakes import make_task
from hypothesis import strategies as st

from grpo_lightning.rollout.episode import Episode, Group, Turn
from grpo_lightning.rollout.ledger import NO_VERSION, Ledger, Source
from grpo_lightning.rollout.packing import PackedSequence, Row
from grpo_lightning.rollout.types import Action, ToolCall

REWARDS = [None, 0.0, 0.1, 0.5, 1.0, -2.0]
MESSAGES = [
    (),
    ({"role": "user", "content": "left or right?"},),
    ({"role": "tool", "content": "4", "name": "add", "tool_call_id": "c1"}, {"role": "user", "content": "é"}),
]
TOOL_CALLS = [(), (ToolCall("add", {"a": 1, "b": [2, {"c": None}]}, "c1"), ToolCall("", {}, "c2", "no JSON"))]
INFOS = [{}, {"moves": 3, "board": ["x", None, 0.5]}]

seeds = st.integers(0, 2**32 - 1).map(random.Random)
# Few different tokens, so that prompts of further sequences often coincide.
prompts = st.lists(st.integers(0, 3), min_size=1, max_size=4)
short = st.integers(0, 2)
shapes = st.lists(
    st.fixed_dictionaries(
        {
            "said": st.integers(1, 4),
            "was_forced": st.sampled_from([False, False, True]),
            "splits": st.sampled_from([False, False, True]),
            "close": short,
            "observation": short,
        }
    ),
    min_size=1,
    max_size=4,
)
"""Of each turn: tokens said, whether they are forced, whether a new sequence begins there, and if not, the tokens
forced at the end of the turn before and those of the observation."""


def some_tokens(rng, count):
    return tuple(rng.randrange(100) for _ in range(count))


def some_floats(rng, count, low, high):
    """Numbers that float32 can hold."""
    return tuple(float(np.float32(rng.uniform(low, high))) for _ in range(count))


def some_action(rng, count, was_forced):
    logprobs = () if was_forced else some_floats(rng, count, -20, 0)
    return Action(
        "".join(rng.choices("aé\n\x00", k=3)),
        some_tokens(rng, count),
        logprobs,
        sum(logprobs),
        was_forced,
        rng.choice(["stop", "length"]),
        NO_VERSION if was_forced else rng.randrange(10),
        () if was_forced else rng.choice(TOOL_CALLS),
    )


def play(prompt, turn_shapes, rng):
    """Turns of the policy and forced ones, ends of turns that were forced, observations, several sequences."""
    ledger, done, turns = Ledger.of_prompt(prompt), [], []
    for number, shape in enumerate(turn_shapes):
        if number and shape["splits"]:
            done.append(ledger)
            ledger = Ledger.of_prompt([rng.randrange(4) for _ in range(rng.randint(1, 3))], number)
        elif number:
            ledger = ledger.extended(some_tokens(rng, shape["close"]), Source.FORCED, number - 1)
            ledger = ledger.extended(some_tokens(rng, shape["observation"]), Source.ENVIRONMENT, number)
        action = some_action(rng, shape["said"], shape["was_forced"])
        error = rng.choice([None, "unknown tool"])
        turns.append(Turn(rng.choice(MESSAGES), action, rng.choice(REWARDS), error, rng.choice(INFOS), len(done)))
        if action.was_forced:
            ledger = ledger.extended(action.token_ids, Source.FORCED, number)
        else:
            sampled = action.token_logprobs, action.policy_version
            ledger = ledger.extended(action.token_ids, Source.SAMPLED, number, *sampled)
    ledger = ledger.extended(some_tokens(rng, rng.randrange(3)), Source.FORCED, len(turns) - 1)
    return Episode(
        tuple(turns),
        (*done, ledger),
        {"environment": rng.choice(REWARDS), "style": 0.25},
        rng.choice(REWARDS),
        rng.choice(["terminated", "truncated"]),
        rng.choice([None, "reward 'judge' took longer than 1 s"]),
        rng.choice(MESSAGES),
        rng.randint(1, 3),
    )


def played_episodes(prompt):
    """Episodes of one or several turns behind a prompt."""
    return st.builds(play, st.just(prompt), shapes, seeds)


def episodes(prompt):
    """The same, and some that broke before they began."""
    broken = Episode((), (), {}, None, "error", "reset raised OSError: no route", attempts=3)
    return st.integers(0, 7).flatmap(lambda i: st.just(broken) if i == 7 else played_episodes(prompt))


@st.composite
def groups(draw, name="task", size=None):
    """A group with another advantage for each turn; 0 where there is no reward."""
    prompt, rng = draw(prompts), draw(seeds)
    size = draw(st.integers(1, 4)) if size is None else size
    found = draw(st.lists(episodes(prompt), min_size=size, max_size=size))
    advantages = [
        tuple(0.0 for _ in e.turns) if e.reward is None else some_floats(rng, len(e.turns), -3, 3) for e in found
    ]
    return Group(make_task(name), tuple(found), tuple(advantages))


def rollouts(max_groups=4):
    """Some groups."""
    return st.lists(groups(), min_size=1, max_size=max_groups)


def located_by_hand(groups):
    """``(group, index of the episode, ledger, position)`` of every ledger row of a rollout, in order."""
    return [
        (group, number, ledger, position)
        for group in groups
        for number, episode in enumerate(group.episodes)
        for ledger in episode.ledgers
        for position in range(len(ledger))
    ]


def to_pack(episode, first_row, weight, rng):
    """Its first ledger with sampled tokens, with another advantage for each turn."""
    ledger = next(ledger for ledger in episode.ledgers if ledger.sampled.any())
    return PackedSequence(ledger, first_row, some_floats(rng, len(episode.turns), -3, 3), weight)


def rows_behind(prompt):
    trainable = played_episodes(prompt).filter(lambda e: e.ledgers[0].sampled.any())
    weights = st.sampled_from([0.0, 0.125, 0.25, 1.0])
    sequences = st.builds(to_pack, trainable, st.integers(0, 10**6), weights, seeds)
    return st.builds(Row, st.just(tuple(prompt)), st.lists(sequences, min_size=1, max_size=5).map(tuple))


packable_rows = st.lists(prompts.flatmap(rows_behind), min_size=1, max_size=6)
