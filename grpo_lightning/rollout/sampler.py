"""Answering tasks: from tasks to scored groups, with a progress bar, also if the engine dies on the way."""

import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_lightning.envs.environment import EnvironmentFactory
from grpo_lightning.errors import EngineDiedError
from grpo_lightning.rewards.scorer import Scorer
from grpo_lightning.rollout.collector import Finished, collect
from grpo_lightning.rollout.engine import RolloutEngine
from grpo_lightning.rollout.episode import Group
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.generation_record import GenerationRecord, NotedEngine
from grpo_lightning.rollout.player import Player
from grpo_lightning.rollout.progress import rollout_bar
from grpo_lightning.rollout.prompts import PromptEncoder
from grpo_lightning.rollout.types import SamplingSettings, Task

logger = logging.getLogger(__name__)

_NAMED = 16
"""Episodes, or reasons, that a warning names."""


@dataclass(frozen=True)
class Sampler:
    """An engine with everything that stays the same from rollout to rollout.

    Attributes:
        engine: A started engine.
        encoder: The chat, in tokens.
        environments: How environments are made, by `Task.env`.
        episodes: Limits and choices.
        max_context: Longest context, in tokens.
        max_tokens: Longest completion, in tokens.
        stop: Texts that end a completion.
        banned_token_ids: Tokens that are never sampled.
        seed: Base of all request seeds.
        restarts: How often the engine is started again in one rollout if it dies.
        sync: Makes the engine serve the current policy.
        restart: Starts the engine again.
        top_p: Mass of the likeliest tokens that truncated sampling keeps.
        top_k: How many of them it keeps; 0 for all.
        within: What all runs within on the engine's event loop, if anything.
    """

    engine: RolloutEngine
    encoder: PromptEncoder
    environments: Mapping[str, EnvironmentFactory]
    episodes: EpisodeSettings
    max_context: int
    max_tokens: int
    stop: tuple[str, ...]
    banned_token_ids: tuple[int, ...]
    seed: int
    restarts: int
    sync: Callable[[], None]
    restart: Callable[[], None]
    top_p: float = 1.0
    top_k: int = 0
    within: Callable[[Coroutine[Any, Any, list[Group]]], Coroutine[Any, Any, list[Group]]] | None = None

    def settings(self, temperature: float, *, truncated: bool = False) -> SamplingSettings:
        """How completions are sampled at a temperature.

        Args:
            temperature: The temperature.
            truncated: Whether ``top_p`` and ``top_k`` apply, as in what is trained on.
        """
        top_p, top_k = (self.top_p, self.top_k) if truncated else (1.0, 0)
        return SamplingSettings(
            self.max_tokens, temperature, self.encoder.stop_token_ids, self.stop, self.banned_token_ids, top_p, top_k
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
        record: GenerationRecord | None = None,
        truncated: bool = False,
    ) -> list[Group]:
        """Play and score every task.

        Args:
            title: What the progress bar says.
            tasks: The tasks.
            scorer: Their rewards.
            samples: Episodes of each.
            temperature: Sampling temperature; 0 is greedy.
            key: Names this rollout; its episodes' seeds depend on it.
            trainer_bar: The Trainer's progress bar.
            record: Takes note of what the engine returns.
            truncated: Whether ``top_p`` and ``top_k`` apply.

        Raises:
            EngineDiedError: If the engine died more often than it may be started again.
        """
        finished: Finished = {}
        with rollout_bar(title, len(tasks) * samples, trainer_bar) as on_episode:
            for left in reversed(range(self.restarts + 1)):
                served = self.engine.policy_version >= 0
                try:
                    self.sync()
                    served = True
                    # Fresh for each attempt: what it holds belongs to the engine's event loop.
                    player = self._player(scorer, self.settings(temperature, truncated=truncated), key, record)
                    played = collect(player, tasks, samples_per_task=samples, finished=finished, on_episode=on_episode)
                    groups = self.engine.run(played if self.within is None else self.within(played))
                    break
                except EngineDiedError as error:
                    # One that never came up would not come up the next time either.
                    if left == 0 or not served:
                        raise
                    keys = [(i, n) for i in range(len(tasks)) for n in range(samples) if (i, n) not in finished]
                    logger.warning(
                        "%s: the engine died and is started again. Of %d episodes %d are finished and kept; "
                        "played again: %s. %s",
                        title,
                        len(tasks) * samples,
                        len(finished),
                        _some([f"{tasks[i].id}#{n}" for i, n in keys]),
                        error,
                    )
                    self.restart()
        report_broken(title, groups)
        return groups

    def _player(
        self, scorer: Scorer, sampling: SamplingSettings, key: object, record: GenerationRecord | None
    ) -> Player:
        return Player(
            engine=self.engine if record is None else NotedEngine(self.engine, record),
            encoder=self.encoder,
            sampling=sampling,
            scorer=scorer,
            settings=self.episodes,
            max_context=self.max_context,
            environments=self.environments,
            seed_key=f"{self.seed}/{key}",
            record=record,
        )


def report_broken(title: str, groups: Sequence[Group]) -> None:
    """Warn of episodes that were left out because their environment failed."""
    broken = [str(e.failure) for g in groups for e in g.episodes if e.status == "error"]
    if broken:
        logger.warning(
            "%s: %d of %d episodes broke and are left out of their groups. %s",
            title,
            len(broken),
            sum(len(g.episodes) for g in groups),
            _some(list(dict.fromkeys(broken)), "; "),
        )


def _some(names: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return separator.join(names[:_NAMED]) + more
