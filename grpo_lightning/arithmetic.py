"""How many completions, updates and micro-batches a run makes, before anything is loaded."""

from dataclasses import dataclass

from grpo_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class BatchPlan:
    """The batches of a run.

    Attributes:
        prompts: Tasks of one rollout.
        samples: Completions of each task.
        updates: Optimizer steps that share one rollout; divides ``prompts``.
        micro_batches: Micro-batches of each optimizer step.
        passes: Passes over each rollout.
        processes: Training processes; each has micro-batches of its own.
        epochs: Rollouts in all; None without a planned end.
    """

    prompts: int
    samples: int
    updates: int
    micro_batches: int = 1
    passes: int = 1
    processes: int = 1
    epochs: int | None = None

    def check(self) -> None:
        """Refuse a rollout that cannot be cut into equal updates.

        Raises:
            ConfigurationError: With a setting that works.
        """
        if self.prompts % self.updates == 0:
            return
        divisors = [d for d in range(1, self.prompts + 1) if self.prompts % d == 0]
        nearest = max(d for d in divisors if d <= self.updates or d == 1)
        raise ConfigurationError(
            f"expected updates_per_rollout to divide prompts_per_rollout={self.prompts}, but got {self.updates}; "
            f"use --data.updates_per_rollout {nearest} (or another of {divisors})"
        )

    @property
    def completions(self) -> int:
        """Completions of one rollout."""
        return self.prompts * self.samples

    def __str__(self) -> str:
        passes = f", {self.passes} passes" if self.passes > 1 else ""
        ranks = f" in each of {self.processes} processes" if self.processes > 1 else ""
        text = (
            f"{self.prompts} prompts x {self.samples} samples = {self.completions} completions -> "
            f"{self.updates} update{_s(self.updates)} of {self.completions // self.updates}, each in "
            f"{self.micro_batches} micro-batch{'es' if self.micro_batches != 1 else ''}{ranks}{passes}"
        )
        if self.epochs is None:
            return text
        updates = self.epochs * self.updates * self.passes
        return (
            f"{text}; {self.epochs} epoch{_s(self.epochs)} = {updates} update{_s(updates)}, "
            f"{self.epochs * self.completions} completions"
        )


def _s(number: int) -> str:
    return "" if number == 1 else "s"
