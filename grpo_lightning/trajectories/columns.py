"""One epoch's trajectories as plain values for the page: columns instead of objects, and nothing said twice."""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grpo_lightning.rollout.episode import Episode, Group, Turn, ledgers_of
from grpo_lightning.rollout.ledger import Ledger
from grpo_lightning.trajectories.exact_json import NotStored
from grpo_lightning.trajectories.pieces import PieceTable

if TYPE_CHECKING:
    from grpo_lightning.trajectories.stored import StoredEpoch

DIGITS = 4
"""Significant digits of logprobs and log-ratios."""

_EXACT_INTEGERS = 2**53
"""JavaScript rounds larger ones."""


def epoch_columns(epoch: "StoredEpoch", table: PieceTable) -> dict[str, Any]:
    """One epoch as values that JSON can hold. Keys whose value would be empty or usual are left out.

    Args:
        epoch: The epoch.
        table: Takes up what the tokens show; sequences refer to its entries.
    """
    names = sorted({name for group in epoch.groups for episode in group.episodes for name in episode.rewards})
    ratios = _rows(epoch)
    return {
        "version": epoch.origin.version,
        "temperature": epoch.temperature,
        "rewardNames": names,
        "hasRatios": epoch.log_ratios is not None,
        "groups": [_group(group, names, ratios, table) for group in epoch.groups],
    }


def for_json(value: Any) -> Any:
    """What JavaScript can show of a value: what it has no type for becomes text, integers past 2**53 too."""
    if isinstance(value, NotStored):
        return value.shown
    if isinstance(value, int) and abs(value) > _EXACT_INTEGERS:
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [for_json(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return for_json(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _rows(epoch: "StoredEpoch") -> Iterator[NDArray[np.float64] | None]:
    """The log-ratios of one ledger after the other."""
    start = 0
    for ledger in ledgers_of(epoch.groups):
        yield None if epoch.log_ratios is None else epoch.log_ratios[start : start + len(ledger)]
        start += len(ledger)


def _group(
    group: Group, names: list[str], ratios: Iterator[NDArray[np.float64] | None], table: PieceTable
) -> dict[str, Any]:
    shared = len(group.prompt_ids)
    episodes = []
    for number, episode in enumerate(group.episodes):
        columns = _episode(episode, names, table)
        columns["segments"] = [
            _segment(ledger, next(ratios), table, skip=shared if place == 0 else 0)
            for place, ledger in enumerate(episode.ledgers)
        ]
        if group.advantages:
            columns["advantages"] = [_rounded(value) for value in group.advantages[number]]
        episodes.append(columns)
    said = {"env": group.task.env, "data": for_json(group.task.data), "prompt": table.entries(group.prompt_ids)}
    return {"task": group.task.id, "seed": for_json(group.task.seed), "episodes": episodes} | _without_empty(said)


def _episode(episode: Episode, names: list[str], table: PieceTable) -> dict[str, Any]:
    said = {
        "failure": episode.failure,
        "attempts": episode.attempts if episode.attempts > 1 else None,
        "closing": _messages(episode.closing),
        "turns": [_turn(turn) for turn in episode.turns],
    }
    return {
        "status": episode.status,
        "reward": _number(episode.reward),
        "rewards": [_number(episode.rewards.get(name)) for name in names],
    } | _without_empty(said)


def _turn(turn: Turn) -> dict[str, Any]:
    calls = [
        {"name": call.name, "arguments": for_json(call.arguments)}
        | _without_empty({"id": call.id, "error": call.error})
        for call in turn.action.tool_calls
    ]
    said = {
        "finish": None if turn.action.finish_reason == "stop" else turn.action.finish_reason,
        "error": turn.error,
        "info": for_json(turn.info),
        "calls": calls,
        "segment": turn.segment,
    }
    columns = _without_empty(said)
    return columns if turn.reward is None else columns | {"reward": _number(turn.reward)}


def _messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [for_json(message) for message in messages]


def _segment(ledger: Ledger, ratios: NDArray[np.float64] | None, table: PieceTable, skip: int) -> dict[str, Any]:
    """One sequence without its first ``skip`` tokens, which the group holds.

    ``runs`` are ``[source, turn, version, tokens]`` of tokens that agree in all three; ``logprobs`` and ``ratios``
    are those of sampled tokens only, None where one was not trained on.
    """
    entries = table.entries(ledger.token_ids.tolist())
    origin = zip(
        ledger.source[skip:].tolist(),
        ledger.turn[skip:].tolist(),
        ledger.policy_version[skip:].tolist(),
        strict=True,
    )
    columns: dict[str, Any] = {
        "tokens": entries[skip:],
        "runs": [[*key, len(list(tokens))] for key, tokens in groupby(origin)],
        "logprobs": [_rounded(value) for value in ledger.logprobs[ledger.sampled].tolist()],
    }
    if ratios is not None:
        columns["ratios"] = [_rounded(value) for value in ratios[ledger.sampled].tolist()]
    return columns


def _number(value: float | None) -> Any:
    """A reward as it is, as short as JSON writes it."""
    return None if value is None else for_json(float(value))


def _rounded(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short == int(short) else short


def _without_empty(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in columns.items() if value not in (None, "", 0, [], {})}
