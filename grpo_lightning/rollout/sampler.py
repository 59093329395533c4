"""Answering tasks: from tasks to scored groups, with a progress bar."""

from collections.abc import Sequence
from typing import Any

from grpo_lightning.rewards.scorer import Scorer
from grpo_lightning.rollout.collector import collect
from grpo_lightning.rollout.engine import RolloutEngine
from grpo_lightning.rollout.progress import rollout_bar
from grpo_lightning.rollout.prompts import PromptEncoder
from grpo_lightning.rollout.types import Group, SamplingSettings, Task


class Sampler:
    """An engine with everything that stays the same from rollout to rollout.

    Args:
        engine: A started engine.
        encoder: Prompts of the model.
        max_tokens: Longest completion, in tokens.
        stop: Texts that end a completion.
        bad_words: Texts of one token that are never sampled.
        seed: Base of all request seeds.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        encoder: PromptEncoder,
        *,
        max_tokens: int,
        stop: tuple[str, ...],
        bad_words: tuple[str, ...],
        seed: int,
    ) -> None:
        self._engine = engine
        self.encoder = encoder
        self._max_tokens = max_tokens
        self._stop = stop
        self._banned_token_ids = encoder.banned_token_ids(bad_words)
        self._seed = seed

    def settings(self, temperature: float) -> SamplingSettings:
        """How completions are sampled at a temperature."""
        return SamplingSettings(
            self._max_tokens, temperature, self.encoder.stop_token_ids, self._stop, self._banned_token_ids
        )

    def sample(
        self,
        title: str,
        tasks: Sequence[Task],
        scorer: Scorer,
        *,
        samples: int,
        temperature: float,
        key: object,
        trainer_bar: Any,
    ) -> list[Group]:
        """Sample and score every task.

        Args:
            title: What the progress bar says.
            tasks: The tasks.
            scorer: Their rewards.
            samples: Completions of each.
            temperature: Sampling temperature; 0 is greedy.
            key: Names this rollout; its samples' seeds depend on it.
            trainer_bar: The Trainer's progress bar.
        """
        with rollout_bar(title, len(tasks) * samples, trainer_bar) as on_sample:
            return self._engine.run(
                collect(
                    self._engine,
                    [(task, self.encoder(task)) for task in tasks],
                    samples_per_task=samples,
                    sampling=self.settings(temperature),
                    scorer=scorer,
                    decode=self.encoder.decode,
                    seed_key=f"{self._seed}/{key}",
                    on_sample=on_sample,
                )
            )
