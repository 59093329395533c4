"""An epoch's trajectories as four flat tables and back: groups, episodes, turns, tokens. Nothing here touches a disk.

Nothing stands twice: the tokens of sampled actions are those of the ledger.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from grpo_lightning.rollout.episode import Episode, Group, Turn
from grpo_lightning.rollout.ledger import NO_VERSION, Ledger, Source
from grpo_lightning.rollout.micro_batches import Layout
from grpo_lightning.rollout.rollout import Origin
from grpo_lightning.rollout.types import Action, Task, ToolCall
from grpo_lightning.trajectories.exact_json import from_json, from_text, to_json, to_text
from grpo_lightning.trajectories.stored import StoredEpoch

FORMAT = 1
"""Number of this format. A reader knows its own and no later one."""

METADATA = b"grpo_lightning"
"""Key of each table's metadata: one JSON object with the format and what is true of the whole epoch."""

_SOURCES = [source.name.lower() for source in Source]
_EPISODE = [("group", pa.int64()), ("episode", pa.int64())]

SCHEMAS: dict[str, Any] = {
    "groups": pa.schema(
        [("group", pa.int64())] + [(name, pa.string()) for name in ("task", "messages", "data", "seed", "env")]
    ),
    "episodes": pa.schema(
        [
            *_EPISODE,
            ("reward", pa.float64()),
            ("rewards", pa.string()),
            ("advantages", pa.list_(pa.float64())),
            ("status", pa.string()),
            ("failure", pa.string()),
            ("closing", pa.string()),
            ("attempts", pa.int64()),
            ("masked", pa.bool_()),
        ]
    ),
    "turns": pa.schema(
        [
            *_EPISODE,
            ("turn", pa.int64()),
            ("messages", pa.string()),
            ("text", pa.string()),
            ("tool_calls", pa.string()),
            ("finish_reason", pa.string()),
            ("was_forced", pa.bool_()),
            ("forced_token_ids", pa.list_(pa.int64())),
            ("sampled_tokens", pa.int64()),
            ("logprob_sum", pa.float64()),
            ("policy_version", pa.int64()),
            ("reward", pa.float64()),
            ("error", pa.string()),
            ("info", pa.string()),
            ("segment", pa.int64()),
        ]
    ),
    "tokens": pa.schema(
        [
            *_EPISODE,
            ("segment", pa.int64()),
            ("turn", pa.int64()),
            ("token_id", pa.int64()),
            ("source", pa.dictionary(pa.int8(), pa.string())),
            ("logprob", pa.float64()),
            ("policy_version", pa.int64()),
        ]
    ),
}
"""Columns of each table. Nested values are JSON text (`exact_json.to_json`), texts are as in `exact_json.to_text`; a
seed is decimal text, as it may have any size. Null is None; in ``logprob`` and ``policy_version`` of tokens it is "not
sampled"."""


def to_tables(stored: StoredEpoch) -> dict[str, Any]:
    """The tables of an epoch by name, rows in the order of groups, episodes, ledgers and tokens."""
    epoch = {
        "format": FORMAT,
        "origin": {**asdict(stored.origin), "metrics": dict(stored.origin.metrics)},
        "layout": asdict(stored.layout),
        "temperature": stored.temperature,
        "banned_token_ids": stored.banned_token_ids,
    }
    metadata = {METADATA: to_json(epoch)}
    episodes = [(g, e, episode) for g, group in enumerate(stored.groups) for e, episode in enumerate(group.episodes)]
    advantages: list[Any] = []
    for group in stored.groups:
        advantages += group.advantages or [None] * len(group.episodes)
    rows: dict[str, list[dict[str, Any]]] = {
        "groups": [_group_row(g, group.task) for g, group in enumerate(stored.groups)],
        "episodes": [_episode_row(*item, values) for item, values in zip(episodes, advantages, strict=True)],
        "turns": [_turn_row(g, e, t, turn) for g, e, episode in episodes for t, turn in enumerate(episode.turns)],
    }
    tables = {name: pa.Table.from_pylist(part, schema=SCHEMAS[name]) for name, part in rows.items()}
    tables["tokens"] = _tokens([(g, e, s, x) for g, e, episode in episodes for s, x in enumerate(episode.ledgers)])
    return {name: table.replace_schema_metadata(metadata) for name, table in tables.items()}


def _group_row(number: int, task: Task) -> dict[str, Any]:
    return {
        "group": number,
        "task": to_text(task.id),
        "messages": to_json(task.messages),
        "data": to_json(task.data),
        "seed": str(task.seed),
        "env": to_text(task.env),
    }


def _episode_row(group: int, number: int, episode: Episode, advantages: Sequence[float] | None) -> dict[str, Any]:
    return {
        "group": group,
        "episode": number,
        "reward": episode.reward,
        "rewards": to_json(episode.rewards),
        "advantages": advantages,
        "status": episode.status,
        "failure": _optional(episode.failure),
        "closing": to_json(episode.closing),
        "attempts": episode.attempts,
        "masked": episode.masked,
    }


def _turn_row(group: int, episode: int, number: int, turn: Turn) -> dict[str, Any]:
    action = turn.action
    return {
        "group": group,
        "episode": episode,
        "turn": number,
        "messages": to_json(turn.messages),
        "text": to_text(action.text),
        "tool_calls": to_json([vars(call) for call in action.tool_calls]),
        "finish_reason": action.finish_reason,
        "was_forced": action.was_forced,
        "forced_token_ids": list(action.token_ids) if action.was_forced else None,
        "sampled_tokens": len(action.token_logprobs),
        "logprob_sum": action.logprob_sum,
        "policy_version": action.policy_version,
        "reward": turn.reward,
        "error": _optional(turn.error),
        "info": to_json(turn.info),
        "segment": turn.segment,
    }


def _optional(text: str | None) -> str | None:
    return None if text is None else to_text(text)


def _tokens(ledgers: Sequence[tuple[int, int, int, Ledger]]) -> Any:
    lengths = [len(ledger) for *_, ledger in ledgers]

    def column(name: str, dtype: Any) -> NDArray[Any]:
        return np.concatenate([np.empty(0, dtype), *(getattr(ledger, name) for *_, ledger in ledgers)])

    def place(index: int) -> NDArray[np.int64]:
        return np.repeat(np.array([row[index] for row in ledgers], np.int64), lengths)

    source, version = column("source", np.int8), column("policy_version", np.int64)
    columns = {
        "group": place(0),
        "episode": place(1),
        "segment": place(2),
        "turn": column("turn", np.int64),
        "token_id": column("token_ids", np.int64),
        "source": pa.DictionaryArray.from_arrays(pa.array(source), _SOURCES),
        "logprob": pa.array(column("logprobs", np.float64), mask=source != Source.SAMPLED),
        "policy_version": pa.array(version, mask=version == NO_VERSION),
    }
    return pa.table(columns, schema=SCHEMAS["tokens"])


def from_tables(tables: Mapping[str, Any]) -> StoredEpoch:
    """The epoch again, without log-ratios.

    Args:
        tables: Result of `to_tables`, with its metadata.

    Raises:
        Exception: Of any kind, if the tables contradict each other.
    """
    metadata = {table.schema.metadata[METADATA] for table in tables.values()}
    if len(metadata) > 1:
        raise ValueError("the tables are of different epochs")
    epoch = from_json(metadata.pop().decode())
    ledgers = _ledgers(tables["tokens"])
    turns = defaultdict(list)
    for row in tables["turns"].to_pylist():
        turns[row["group"], row["episode"]].append(row)
    episodes = defaultdict(list)
    for row in tables["episodes"].to_pylist():
        place = (row["group"], row["episode"])
        episodes[row["group"]].append((_episode(row, turns.pop(place, []), ledgers.pop(place, ())), row["advantages"]))
    groups = tuple(_group(row, episodes.pop(row["group"], [])) for row in tables["groups"].to_pylist())
    if turns or ledgers or episodes:
        raise ValueError(f"there are rows of the episodes {[*turns, *ledgers, *episodes][:3]}, which are not there")
    return StoredEpoch(
        Origin(**epoch["origin"]), Layout(**epoch["layout"]), epoch["temperature"], epoch["banned_token_ids"], groups
    )


def format_of(table: Any) -> int | None:
    """Number of the format that a table is of; None if it is none of ours."""
    text = (table.schema.metadata or {}).get(METADATA)
    return None if text is None else int(json.loads(text)["format"])


def _group(row: Mapping[str, Any], episodes: Sequence[tuple[Episode, list[float] | None]]) -> Group:
    task = Task(
        id=from_text(row["task"]),
        messages=from_json(row["messages"]),
        data=from_json(row["data"]),
        seed=int(row["seed"]),
        env=from_text(row["env"]),
    )
    advantages = tuple(tuple(values) for _, values in episodes if values is not None)
    return Group(task, tuple(episode for episode, _ in episodes), advantages)


def _episode(row: Mapping[str, Any], turns: Sequence[Mapping[str, Any]], ledgers: tuple[Ledger, ...]) -> Episode:
    sampled = ((i, p) for x in ledgers for i, p in zip(x.token_ids[x.sampled], x.logprobs[x.sampled], strict=True))
    return Episode(
        turns=tuple(_turn(turn, sampled) for turn in turns),
        ledgers=ledgers,
        rewards=from_json(row["rewards"]),
        reward=row["reward"],
        status=row["status"],
        failure=_optional_back(row["failure"]),
        closing=from_json(row["closing"]),
        attempts=row["attempts"],
        masked=row["masked"],
    )


def _turn(row: Mapping[str, Any], sampled: Iterator[tuple[Any, Any]]) -> Turn:
    said = list(islice(sampled, row["sampled_tokens"]))
    if len(said) < row["sampled_tokens"]:
        raise ValueError(f"an action of {row['sampled_tokens']} tokens has only {len(said)} in the ledger")
    action = Action(
        text=from_text(row["text"]),
        token_ids=tuple(row["forced_token_ids"] if row["was_forced"] else (int(token) for token, _ in said)),
        token_logprobs=tuple(float(logprob) for _, logprob in said),
        logprob_sum=row["logprob_sum"],
        was_forced=row["was_forced"],
        finish_reason=row["finish_reason"],
        policy_version=row["policy_version"],
        tool_calls=tuple(ToolCall(**call) for call in from_json(row["tool_calls"])),
    )
    error, info = _optional_back(row["error"]), from_json(row["info"])
    return Turn(from_json(row["messages"]), action, row["reward"], error, info, row["segment"])


def _optional_back(text: str | None) -> str | None:
    return None if text is None else from_text(text)


def _ledgers(table: Any) -> dict[tuple[int, int], tuple[Ledger, ...]]:
    def column(name: str) -> NDArray[Any]:
        values: NDArray[Any] = table[name].to_numpy()
        return values

    source = pc.index_in(table["source"].cast(pa.string()), value_set=pa.array(_SOURCES)).to_numpy()
    version = table["policy_version"].fill_null(NO_VERSION).to_numpy()
    columns = (column("token_id"), source, column("logprob"), version, column("turn"))
    places = np.stack([column("group"), column("episode"), column("segment")])
    begins = np.flatnonzero(np.diff(places, prepend=-1).any(axis=0))
    found: dict[tuple[int, int], tuple[Ledger, ...]] = defaultdict(tuple)
    for begin, end in pairwise([*begins, table.num_rows]):
        group, episode, _ = places[:, begin].tolist()
        found[group, episode] += (Ledger(*(values[begin:end] for values in columns)),)
    return found
