"""Numbers of a rollout, under the project's stable names."""

from collections.abc import Sequence

import torch

from grpo_lightning.rollout.episode import Group
from grpo_lightning.rollout.ledger import Source
from grpo_lightning.rollout.packing import is_trainable


def rollout_metrics(groups: Sequence[Group], multi_turn: bool = False) -> dict[str, float]:
    """Rewards, groups, lengths and token counts of one rollout. See ``docs/metrics.md`` for each definition.

    Args:
        groups: The rollout.
        multi_turn: Whether to count turns and tool calls as well.
    """
    episodes = [e for g in groups for e in g.episodes]
    rewards = torch.tensor([e.reward for e in episodes if e.reward is not None], dtype=torch.float64)
    played = [e for e in episodes if e.status != "error"]
    lengths = torch.tensor([e.count(Source.SAMPLED) for e in played] or [0], dtype=torch.float64)
    scored = [[e.reward for e in g.episodes if e.reward is not None] for g in groups]
    usable = [values for values in scored if len(values) >= 2]
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std(correction=0)),
        "reward/failed": float(len(episodes) - len(rewards)),
        "group/zero_variance_fraction": sum(min(v) == max(v) for v in usable) / max(1, len(usable)),
        "group/dropped": float(sum(sum(map(is_trainable, g.episodes)) < 2 for g in groups)),
        "completion/length_mean": float(lengths.mean()),
        "completion/length_max": float(lengths.max()),
        "completion/truncated_fraction": sum(e.status == "truncated" for e in played) / max(1, len(played)),
        "tokens/sampled": float(lengths.sum()),
        "tokens/forced": float(sum(e.count(Source.FORCED) for e in episodes)),
    }
    for name in dict.fromkeys(name for e in episodes for name in e.rewards):
        values = [v for e in episodes if (v := e.rewards.get(name)) is not None]
        if values:
            metrics[f"reward/{name}"] = sum(values) / len(values)
    return metrics | (_turn_metrics(groups) if multi_turn else {})


def _turn_metrics(groups: Sequence[Group]) -> dict[str, float]:
    episodes = [e for g in groups for e in g.episodes]
    turns = [turn for e in episodes for turn in e.turns]
    played = [len(e.turns) for e in episodes if e.status != "error"]
    calls = [call for turn in turns for call in turn.action.tool_calls]
    return {
        "episode/turns_mean": sum(played) / max(1, len(played)),
        "episode/turns_max": float(max(played, default=0)),
        "episode/sequences": sum(len(e.ledgers) for e in episodes) / max(1, len(played)),
        "episode/errors": float(sum(e.status == "error" for e in episodes)),
        "episode/retries": float(sum(e.attempts - 1 for e in episodes)),
        "action/forced_fraction": sum(turn.action.was_forced for turn in turns) / max(1, len(turns)),
        "action/invalid_fraction": sum(turn.error is not None for turn in turns) / max(1, len(turns)),
        "tools/calls": float(len(calls)),
        "tokens/environment": float(sum(e.count(Source.ENVIRONMENT) for e in episodes)),
    }
