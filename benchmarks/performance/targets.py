"""What was aimed at, and what was reached."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A bound of a single number.

    Attributes:
        text: What the number is.
        bound: The bound.
        at_least: Whether the number should be no smaller; else no larger.
        form: How it is written.
    """

    text: str
    bound: float
    at_least: bool
    form: str = ".2f"

    def reached(self, value: float) -> bool:
        """Whether a value is on the right side."""
        return value >= self.bound if self.at_least else value <= self.bound


TARGETS = {
    "trl_speedup_short": Target("Trained samples a second over TRL's, prompts of about 45 tokens", 8, True, ".1f"),
    "trl_speedup_long": Target("The same, prompts of 1,000 tokens that 8 samples share", 15, True, ".1f"),
    "rollout_efficiency": Target("Rollout tokens a second over those of vLLM called directly", 0.95, True),
    "lora_efficiency": Target("vLLM's tokens a second with LoRA over those without", 0.85, True),
    "train_matmul_share": Target("Useful operations of a bf16 training step over the matmul rate", 0.45, True),
    "peak_memory_ratio": Target("Peak memory of a step over that of the padded step with all logits", 0.5, False),
    "paths_least_gain": Target("Least gain of a path that is taken for its speed", 1, True),
    "sync_milliseconds": Target("From the last update to ready, rank 16, milliseconds", 150, False, ".0f"),
    "overlap_ratio": Target("An overlapped epoch over the longer of rollout and training", 1.1, False),
    "start_ratio": Target("`fit` to the first sampled token over bare vLLM start and model load", 1.2, False),
    "import_seconds": Target("`import grpo_lightning`, seconds", 2, False),
    "help_seconds": Target("`grpo-lightning --help`, seconds", 2, False),
}


def table(headlines: Mapping[str, float]) -> str:
    """A row a target; those without a number say so.

    Args:
        headlines: Single numbers by name.
    """
    lines = ["| | key | aim | measured | reached |", "|---|---|---|---|---|"]
    for name, target in TARGETS.items():
        value = headlines.get(name)
        aim = f"{'at least' if target.at_least else 'at most'} {target.bound:g}"
        found = ("not measured", "") if value is None else (f"{value:{target.form}}", _word(target.reached(value)))
        lines.append(f"| {target.text} | `{name}` | {aim} | {found[0]} | {found[1]} |")
    return "\n".join(lines)


def _word(reached: bool) -> str:
    return "yes" if reached else "no"
