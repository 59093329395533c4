"""What TRL's GRPOTrainer writes to ``log_history``, of a healthy run, with changes."""

import random
from typing import Any


def trl_history(steps: int = 40, **changes: Any) -> list[dict[str, Any]]:
    """Entries of a run with vLLM, one update per rollout and no KL, as TRL 1.16 logs them.

    Args:
        steps: Their number.
        changes: Values instead of the healthy ones, or functions of the step; ``/`` is written ``__``. None leaves
            the name out.
    """
    rng = random.Random(0)
    rows = []
    for step in range(1, steps + 1):
        done = step / steps
        row: dict[str, Any] = {
            "loss": 0.0,
            "grad_norm": 0.2 + 0.1 * rng.random(),
            "learning_rate": 1e-6 * (1 - (step - 1) / steps),
            "num_tokens": 10000.0 * step,
            "completions/mean_length": 200 + rng.gauss(0, 5),
            "completions/min_length": 20.0,
            "completions/max_length": 256.0,
            "completions/clipped_ratio": 0.25,
            "completions/mean_terminated_length": 150.0,
            "rewards/correct/mean": 0.3 + 0.4 * done,
            "rewards/correct/std": 0.4,
            "reward": 0.3 + 0.4 * done + rng.gauss(0, 0.02),
            "reward_std": 0.3,
            "frac_reward_zero_std": 0.25,
            "step_time": 12.0,
            "sampling/sampling_logp_difference/mean": 0.012 + 0.002 * rng.random(),
            "sampling/sampling_logp_difference/max": 0.8,
            "sampling/importance_sampling_ratio/min": 0.7,
            "sampling/importance_sampling_ratio/mean": 1.0,
            "sampling/importance_sampling_ratio/max": 1.6,
            "entropy": 1.1 - 0.3 * done,
            "clip_ratio/low_mean": 0.0,
            "clip_ratio/low_min": 0.0,
            "clip_ratio/high_mean": 0.0,
            "clip_ratio/high_max": 0.0,
            "clip_ratio/region_mean": 0.0,
            "epoch": done,
            "step": step,
        }
        for name, value in changes.items():
            key = name.replace("__", "/")
            row[key] = value(step) if callable(value) else value
            if row[key] is None:
                del row[key]
        rows.append(row)
    summary = {"train_runtime": 720.0, "train_samples_per_second": 1.0, "total_flos": 0.0, "train_loss": 0.0}
    return [*rows, {**summary, "epoch": 1.0, "step": steps}]
