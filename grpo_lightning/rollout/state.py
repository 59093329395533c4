"""A rollout in the middle of its epoch, as a checkpoint holds it: plain values, for weights-only loading."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from grpo_lightning.errors import CheckpointError
from grpo_lightning.rollout.episode import Episode, Group, Turn
from grpo_lightning.rollout.ledger import Ledger
from grpo_lightning.rollout.micro_batches import Layout
from grpo_lightning.rollout.plain import plain
from grpo_lightning.rollout.rollout import Origin, Rollout
from grpo_lightning.rollout.types import Action, SamplingSettings, Task, ToolCall
from grpo_lightning.tasks import TaskSource

NOT_BEGUN = -1
"""Position in a rollout whose epoch has not begun."""


def rollout_to_state(rollout: Rollout, position: int) -> dict[str, Any]:
    """What is needed to train on it to the end.

    Args:
        rollout: As the first process sees it.
        position: Micro-batches of each process that were trained on, or `NOT_BEGUN`.
    """
    origin = rollout.origin
    return {
        "version": origin.version,
        "number": origin.number,
        "epoch": origin.epoch,
        "tasks": list(origin.tasks),
        "drawn": origin.drawn,
        "top_p": origin.top_p,
        "top_k": origin.top_k,
        "metrics": dict(origin.metrics),
        "groups": [_group_to_state(group) for group in rollout.groups],
        "layout": asdict(rollout.layout),
        "temperature": rollout.batches[0].temperature,
        "banned_token_ids": list(rollout.batches[0].banned_token_ids),
        "position": position,
        "rescored": None if rollout.rescored is None else rollout.rescored.state(),
    }


def rollout_from_state(
    state: Mapping[str, Any], layout: Layout, sampling: SamplingSettings, source: TaskSource
) -> tuple[Origin, list[Group], int]:
    """Origin, groups and position again.

    Args:
        state: Result of `rollout_to_state`.
        layout: How the resumed run cuts its rollouts.
        sampling: How it samples them.
        source: The tasks.

    Raises:
        CheckpointError: If the resumed run could not train on it as the first one would have.
    """
    if state["layout"] != asdict(layout):
        raise CheckpointError(
            f"the checkpoint was saved in the middle of an epoch that was cut into {state['layout']}, but now there is "
            f"{asdict(layout)}: its rollout cannot be trained to the end. Resume with the same settings, or from an "
            "epoch's end"
        )
    if state["position"] == NOT_BEGUN:
        raise CheckpointError(
            "the checkpoint was saved before its epoch began, where Lightning would skip that epoch. Resume from one "
            "that was saved after an optimizer step or at an epoch's end"
        )
    if (state["temperature"], tuple(state["banned_token_ids"])) != (sampling.temperature, sampling.banned_token_ids):
        raise CheckpointError(
            f"the checkpoint's unfinished rollout was sampled at temperature {state['temperature']:g} with "
            f"{len(state['banned_token_ids'])} banned tokens, but now there are {sampling.temperature:g} and "
            f"{len(sampling.banned_token_ids)}: its ratios would mean nothing. Resume with the same temperature and "
            "bad_words, or from an epoch's end"
        )
    if (state["top_p"], state["top_k"]) != (sampling.top_p, sampling.top_k):
        raise CheckpointError(
            f"the checkpoint's unfinished rollout was sampled with top_p {state['top_p']:g} and top_k "
            f"{state['top_k']}, but now there are {sampling.top_p:g} and {sampling.top_k}: it is judged by what is set "
            "now. Resume with the same, or from an epoch's end"
        )
    if any(index >= len(source) for index in state["tasks"]):
        raise CheckpointError(f"the checkpoint's rollout is of more tasks than the {len(source)} there are now")
    origin = Origin(
        state["version"],
        state["number"],
        state["epoch"],
        tuple(state["tasks"]),
        dict(state["metrics"]),
        state["drawn"],
        state["top_p"],
        state["top_k"],
    )
    groups = [_group(saved, source[i]) for saved, i in zip(state["groups"], state["tasks"], strict=True)]
    return origin, groups, state["position"]


def _group_to_state(group: Group) -> dict[str, Any]:
    return {
        "task": group.task.id,
        "advantages": [list(values) for values in group.advantages],
        "greedy": group.greedy,
        "episodes": [_episode_to_state(episode) for episode in group.episodes],
    }


def _episode_to_state(episode: Episode) -> dict[str, Any]:
    return {
        "turns": [_turn_to_state(turn) for turn in episode.turns],
        "ledgers": [{f.name: getattr(ledger, f.name).tolist() for f in fields(Ledger)} for ledger in episode.ledgers],
        "rewards": dict(episode.rewards),
        "reward": episode.reward,
        "status": episode.status,
        "failure": episode.failure,
        "closing": plain(episode.closing),
        "attempts": episode.attempts,
        "masked": episode.masked,
    }


def _turn_to_state(turn: Turn) -> dict[str, Any]:
    action = {f.name: getattr(turn.action, f.name) for f in fields(Action)}
    calls = [{f.name: plain(getattr(call, f.name)) for f in fields(ToolCall)} for call in turn.action.tool_calls]
    return {
        **{f.name: plain(getattr(turn, f.name)) for f in fields(Turn) if f.name != "action"},
        "action": {**action, "tool_calls": calls},
    }


def _group(state: Mapping[str, Any], task: Task) -> Group:
    if state["task"] != task.id:
        raise CheckpointError(
            f"the checkpoint holds samples of task {state['task']!r}, but the task source now has {task.id!r} in its "
            "place: resume with the tasks, val_size and seed of the run that saved it"
        )
    return Group(
        task,
        tuple(_episode(saved) for saved in state["episodes"]),
        tuple(tuple(values) for values in state["advantages"]),
        state["greedy"],
    )


def _episode(state: Mapping[str, Any]) -> Episode:
    return Episode(
        **{
            **state,
            "turns": tuple(_turn(saved) for saved in state["turns"]),
            "ledgers": tuple(Ledger(**columns) for columns in state["ledgers"]),
            "closing": tuple(state["closing"]),
        }
    )


def _turn(state: Mapping[str, Any]) -> Turn:
    calls = tuple(ToolCall(**call) for call in state["action"]["tool_calls"])
    action = Action(**{**state["action"], "tool_calls": calls})
    return Turn(**{**state, "messages": tuple(state["messages"]), "action": action})
