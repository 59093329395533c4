"""A conversation of two turns, for what only such runs can get wrong."""

from benchmarks.faults.fault import Stage
from grpo_lightning.envs import Environment, Observation
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.types import Action, Task


class Talk(Environment):
    """Asks, asks for more, and pays for what was said."""

    def reset(self, task: Task) -> Observation:
        """The task's question."""
        self._turns = 0
        return Observation(task.messages)

    def step(self, action: Action) -> Observation:
        """Another question, or the end."""
        self._turns += 1
        more = ({"role": "user", "content": "And one more than that?"},)
        return Observation(more, reward=len(action.text) / 10, terminated=self._turns == 2)


def multi_turn(stage: Stage) -> None:
    """Let a run hold conversations."""
    stage.data |= {
        "environment": Talk,
        "rewards": None,
        "episodes": EpisodeSettings(max_turns=2, max_context=256, truncated_action="step"),
    }
