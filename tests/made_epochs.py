"""Epochs made by hand or drawn at random, and a comparison that sees every bit of them."""

import math
import struct
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from grpo_lightning.rollout.episode import Episode, Group, Turn
from grpo_lightning.rollout.ledger import Ledger, Source
from grpo_lightning.rollout.micro_batches import Layout
from grpo_lightning.rollout.rollout import Origin
from grpo_lightning.rollout.types import Action, Task, ToolCall
from grpo_lightning.trajectories.stored import StoredEpoch


def made_epoch(
    groups: int = 2, episodes: int = 2, turns: int = 2, tokens: int = 3, *, epoch: int = 0, **changes: Any
) -> StoredEpoch:
    """An epoch of plain episodes of which every number is different."""
    rng = np.random.default_rng(epoch)
    made = tuple(_group(rng, number, episodes, turns, tokens) for number in range(groups))
    origin = Origin(epoch, epoch, epoch, tuple(range(groups)), {"reward/mean": 0.5, "reward/none": float("nan")})
    return StoredEpoch(**{**vars(StoredEpoch(origin, Layout(1, 1, 1, 1), 0.7, (3, 5), made)), **changes})


def _group(rng: Any, number: int, episodes: int, turns: int, tokens: int) -> Group:
    task = Task(f"task {number}", ({"role": "user", "content": "How many?"},), {"answer": number}, number, "game")
    advantages = tuple(tuple(rng.normal(size=turns).tolist()) for _ in range(episodes))
    return Group(task, tuple(_episode(rng, turns, tokens) for _ in range(episodes)), advantages)


def _episode(rng: Any, turns: int, tokens: int) -> Episode:
    ledger = Ledger.of_prompt([1, 2, 3])
    said = []
    for turn in range(turns):
        # What engines return is float32.
        logprobs = (-rng.random(tokens)).astype(np.float32).astype(float).tolist()
        ids = rng.integers(0, 49152, tokens).tolist()
        ledger = ledger.extended(ids, Source.SAMPLED, turn, logprobs, 4).extended([9, 10], Source.ENVIRONMENT, turn)
        action = Action("the answer is 4", tuple(ids), tuple(logprobs), sum(logprobs), False, "stop", 4)
        said.append(Turn(({"role": "user", "content": "and?"},), action, 0.25))
    reward = float(rng.random())
    return Episode(tuple(said), (ledger,), {"environment": reward, "other": None}, reward)


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal in every bit and type. NaNs are equal, and so are mappings of different classes."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return same(list(one.items()), list(other.items()))
    if type(one) is not type(other):
        return False
    if isinstance(one, float) and not isinstance(one, np.generic):
        return struct.pack("d", one) == struct.pack("d", other) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec=None, exclude_categories=()), max_size=8)
"""Any code points: lone surrogates, pairs of them, NUL."""
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | texts | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(texts | st.sampled_from(["$tuple", "$"]) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)
mappings = st.dictionaries(texts, plain, max_size=3)
messages = st.lists(mappings, max_size=2).map(tuple)
ids = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4)
tool_calls = st.builds(ToolCall, texts, mappings, texts, st.none() | texts)


@st.composite
def episodes(draw: Any, prompt: list[int]) -> Episode:
    turns, ledgers = [], []
    for turn in range(draw(st.integers(0, 3))):
        if not ledgers or draw(st.booleans()):
            ledgers.append(Ledger.of_prompt(draw(ids) if ledgers else prompt, turn))
        tokens, forced, version = draw(ids), draw(st.booleans()), draw(st.integers(-1, 2**40))
        logprobs = [] if forced else [draw(st.floats(-1e300, 0.0)) for _ in tokens]
        source = Source.FORCED if forced else Source.SAMPLED
        known = {} if forced else {"logprobs": logprobs, "policy_version": version}
        ledgers[-1] = ledgers[-1].extended(tokens, source, turn, **known).extended(draw(ids), Source.ENVIRONMENT, turn)
        finish = draw(st.sampled_from(["stop", "length"]))
        calls = tuple(draw(st.lists(tool_calls, max_size=1)))
        action = Action(draw(texts), tuple(tokens), tuple(logprobs), draw(finite), forced, finish, version, calls)
        reward, error = draw(st.none() | finite), draw(st.none() | texts)
        turns.append(Turn(draw(messages), action, reward, error, draw(mappings), len(ledgers) - 1))
    return Episode(
        tuple(turns),
        tuple(ledgers),
        draw(st.dictionaries(texts, st.none() | st.floats(), max_size=2)),
        draw(st.none() | finite),
        draw(st.sampled_from(["terminated", "truncated", "error"])),
        draw(st.none() | texts),
        draw(messages),
        draw(st.integers(1, 3)),
    )


@st.composite
def groups(draw: Any) -> Group:
    task = Task(draw(texts), draw(messages), draw(mappings), draw(st.integers()), draw(texts))
    made = tuple(draw(st.lists(episodes(draw(ids)), max_size=2)))
    advantages = tuple(tuple(draw(finite) for _ in episode.turns) for episode in made)
    return Group(task, made, advantages if draw(st.booleans()) else ())


@st.composite
def epochs(draw: Any) -> StoredEpoch:
    number = st.integers(0, 2**40)
    tasks = tuple(draw(st.lists(number, max_size=2)))
    metrics = draw(st.dictionaries(texts, st.floats(), max_size=2))
    origin = Origin(draw(number), draw(number), draw(st.integers(0, 10**6)), tasks, metrics)
    made = tuple(draw(st.lists(groups(), max_size=2)))
    rows = sum(len(ledger) for group in made for episode in group.episodes for ledger in episode.ledgers)
    log_ratios = np.array(draw(st.lists(finite | st.just(np.nan), min_size=rows, max_size=rows)), np.float64)
    layout = Layout(*(draw(st.integers(1, 9)) for _ in range(4)))
    return StoredEpoch(
        origin,
        layout,
        draw(finite),
        tuple(draw(st.lists(number, max_size=2))),
        made,
        draw(st.none() | st.just(log_ratios)),
    )
