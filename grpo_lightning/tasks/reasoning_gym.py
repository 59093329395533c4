"""Tasks from reasoning-gym's procedural datasets."""

import difflib
from typing import Any

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Task


class ReasoningGymTasks:
    """A dataset of reasoning-gym (https://github.com/open-thought/reasoning-gym); score it with `ReasoningGymReward`.

    Args:
        name: Name of the dataset, for example ``"chain_sum"``.
        size: How many tasks to draw.
        seed: Seed of the draw.
        config: Further settings of the dataset.
        instructions: Added behind each question. The default asks for the tags that the reward looks for.

    Raises:
        ConfigurationError: If reasoning-gym is not installed, or has no such dataset.
    """

    def __init__(
        self,
        name: str,
        *,
        size: int = 500,
        seed: int = 0,
        config: dict[str, Any] | None = None,
        instructions: str = "\nGive the final answer between <answer> and </answer>.",
    ) -> None:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ConfigurationError(
                "ReasoningGymTasks needs reasoning-gym: install grpo-lightning[reasoning-gym]"
            ) from error
        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS)
            suggestion = (
                f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(sorted(DATASETS))}"
            )
            raise ConfigurationError(f"expected a dataset of reasoning-gym, but got {name!r}; {suggestion}")
        self._name = name
        self._instructions = instructions
        self._dataset = reasoning_gym.create_dataset(name, size=size, seed=seed, **(config or {}))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(index)
        entry = self._dataset[index]
        return Task(
            id=f"{self._name}-{index}",
            messages=({"role": "user", "content": entry["question"] + self._instructions},),
            data={"answer": entry["answer"], "reasoning_gym_entry": entry},
        )
