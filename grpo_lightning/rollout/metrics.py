"""Numbers of a rollout, under the project's stable names."""

from collections.abc import Sequence

import torch

from grpo_lightning.rollout.types import Group


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards, groups, lengths and token counts of one rollout. See ``docs/metrics.md`` for each definition."""
    samples = [s for g in groups for s in g.samples]
    rewards = torch.tensor([s.reward for s in samples if s.reward is not None], dtype=torch.float64)
    lengths = torch.tensor([len(s.action.token_ids) for s in samples], dtype=torch.float64)
    scored = [[s.reward for s in g.samples if s.reward is not None] for g in groups]
    usable = [values for values in scored if len(values) >= 2]
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std(correction=0)),
        "reward/failed": float(len(samples) - len(rewards)),
        "group/zero_variance_fraction": sum(min(v) == max(v) for v in usable) / max(1, len(usable)),
        "group/dropped": float(len(groups) - len(usable)),
        "completion/length_mean": float(lengths.mean()),
        "completion/length_max": float(lengths.max()),
        "completion/truncated_fraction": sum(s.action.finish_reason == "length" for s in samples) / len(samples),
        "tokens/sampled": float(lengths.sum()),
        "tokens/forced": float(sum(len(s.action.token_ids) for s in samples if s.action.was_forced)),
    }
    for name in dict.fromkeys(name for s in samples for name in s.rewards):
        values = [v for s in samples if (v := s.rewards.get(name)) is not None]
        if values:
            metrics[f"reward/{name}"] = sum(values) / len(values)
    return metrics
