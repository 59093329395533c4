"""What a user plugs in."""

import torch
from fakes import FakeEngine

from grpo_lightning import GRPOModule, RolloutDataModule
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.functional.terms import PolicyTerms, TokenLoss
from grpo_lightning.tasks import SumTasks


class OwnModule(GRPOModule):
    """A module with a setting more.

    Args:
        model: The model.
        bonus: A setting of its own.
        **kwargs: Settings of `GRPOModule`.
    """

    def __init__(self, model: str, *, bonus: float = 0.0, **kwargs) -> None:
        super().__init__(model, **kwargs)
        self.bonus = bonus


class OwnData(RolloutDataModule):
    """A data module that knows its tasks.

    Args:
        largest: Largest summand.
        **kwargs: Settings of `RolloutDataModule`.
    """

    def __init__(self, *, largest: int = 3, **kwargs) -> None:
        super().__init__(SumTasks(largest), **kwargs)


class OwnEngine(FakeEngine):
    """An engine with a setting.

    Args:
        speed: A setting of its own.
    """

    def __init__(self, speed: int = 1) -> None:
        super().__init__()
        self.speed = speed


class PickyEngine(FakeEngine):
    """An engine that knows beforehand what it cannot serve."""

    def check(self, spec) -> None:
        """Refuse large adapters."""
        if spec.lora_rank > 8:
            raise ConfigurationError(f"expected lora_rank <= 8, but got {spec.lora_rank}")


def beyond(position: int, size: int, seed: int) -> int:
    """An order of tasks that are not there."""
    return size


class OwnReward:
    """A reward with a setting.

    Args:
        per_character: Reward of a character.
    """

    def __init__(self, per_character: float = 1.0) -> None:
        self.per_character = per_character

    def __call__(self, completion: str) -> float:
        """The completion's length."""
        return self.per_character * len(completion)


def constant(completion: str) -> float:
    """The same for all."""
    return 0.5


def not_a_number(completion: str) -> float:
    """NaN for what is empty."""
    return float("nan") if completion == "" else 1.0


def text(completion: str) -> str:
    """No number at all."""
    return "good"


def raises(completion: str) -> float:
    """Fails on what is empty."""
    return 1.0 / len(completion)


def slow(completion: str) -> float:
    """Takes too long."""
    import time

    time.sleep(1)
    return 1.0


def wants_difficulty(completion: str, difficulty: int) -> float:
    """Asks for a field that sums lack."""
    return float(difficulty)


def in_tags(completion: str, answer: str) -> float:
    """Wants the answer marked."""
    return float(f"<answer>{answer}</answer>" in completion)


class FailsLate:
    """A reward that fails after the first rollouts."""

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, completion: str) -> float:
        """Count, and fail in the end."""
        self._calls += 1
        if self._calls > 10:
            raise RuntimeError("no more")
        return float(len(completion))


def unclipped(terms: PolicyTerms, *, scale: float = 1.0) -> TokenLoss:
    """A surrogate with a setting: the ratio as it is."""
    nowhere = torch.zeros_like(terms.marked)
    return TokenLoss(-scale * terms.log_ratio.exp() * terms.advantages, nowhere, nowhere)
