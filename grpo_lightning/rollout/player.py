"""Playing one episode: the environment speaks, the policy acts, until one of them or a limit ends it.

Every turn takes the episode so far as a value and returns it one turn longer. Nothing of an episode is kept on an
object that another could reach.
"""

import asyncio
import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace

from grpo_lightning.envs.environment import Environment, EnvironmentFactory, InvalidAction, Observation
from grpo_lightning.envs.kinds import factory_for
from grpo_lightning.errors import ConfigurationError, RewardError
from grpo_lightning.rewards.scorer import RESERVED_NAMES, Scorer, metric_name
from grpo_lightning.rollout.engine import Generates
from grpo_lightning.rollout.episode import ENVIRONMENT_REWARD, Episode, EpisodeStatus, Turn
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.generation_record import GenerationRecord
from grpo_lightning.rollout.guarded_environment import EnvironmentFault, GuardedEnvironment
from grpo_lightning.rollout.ledger import NO_VERSION, Ledger, Source
from grpo_lightning.rollout.prompts import PromptEncoder
from grpo_lightning.rollout.tool_use import ToolUse
from grpo_lightning.rollout.types import Action, Generation, Message, SamplingSettings, Task
from grpo_lightning.rollout.validation import validate_generation

_CONCURRENT_SCORES = 32


@dataclass(frozen=True)
class _Position:
    """An episode so far: what was said, and the observation that is to be answered next, if it goes on."""

    observation: Observation
    tools: ToolUse
    opening: tuple[Message, ...]
    conversation: tuple[Message, ...]
    ledgers: tuple[Ledger, ...]
    pays: bool
    deadline: float | None
    turns: tuple[Turn, ...] = ()
    closing: tuple[Message, ...] = ()
    status: EpisodeStatus | None = None

    @property
    def sampled(self) -> int:
        return sum(ledger.count(Source.SAMPLED) for ledger in self.ledgers)


@dataclass(frozen=True)
class Player:
    """What the episodes of a rollout share. Of an episode it keeps nothing but that it is being played.

    Attributes:
        engine: A started engine that serves the wanted policy version.
        encoder: The chat, in tokens.
        sampling: How completions are sampled.
        scorer: The reward functions.
        settings: Limits and choices.
        max_context: Longest context in tokens.
        environments: How environments are made, by `Task.env`.
        seed_key: Names this rollout; with task, sample and turn it gives each request its seed.
        record: Takes note of the prompts.
    """

    engine: Generates
    encoder: PromptEncoder
    sampling: SamplingSettings
    scorer: Scorer
    settings: EpisodeSettings
    max_context: int
    environments: Mapping[str, EnvironmentFactory]
    seed_key: str
    record: GenerationRecord | None = None
    _scoring: asyncio.Semaphore = field(init=False, default_factory=lambda: asyncio.Semaphore(_CONCURRENT_SCORES))
    _open: dict[str, asyncio.Semaphore] = field(init=False, default_factory=dict)
    _playing: dict[int, Environment] = field(init=False, default_factory=dict)
    _prompts: dict[str, tuple[str, list[int]]] = field(init=False, default_factory=dict)

    async def play(self, task: Task, number: int) -> Episode:
        """Play an episode; if the environment fails, again from the seed.

        Args:
            task: The task.
            number: Which of its samples.

        Returns:
            The episode, of status ``"error"`` if the environment failed every time.
        """
        attempts = self.settings.retries + 1
        for attempt in range(1, attempts + 1):
            try:
                async with self._slot(task.env):
                    return replace(await self._attempt(task, number), attempts=attempt)
            except EnvironmentFault as error:
                fault = error
        return Episode((), (), {}, None, status="error", failure=str(fault), attempts=attempts)

    def _slot(self, name: str) -> AbstractAsyncContextManager[None]:
        """Room for one more open environment of a kind."""
        limit = self.settings.concurrency
        return nullcontext() if limit is None else self._open.setdefault(name, asyncio.Semaphore(limit))

    async def _attempt(self, task: Task, number: int) -> Episode:
        environment = await GuardedEnvironment.make(factory_for(self.environments, task), task, self.settings)
        self._begin(environment.environment)
        try:
            position = self._begun(task, await environment.reset())
            try:
                while position.status is None:
                    position = await self._turn(environment, task, number, position)
            except _OutOfTime:
                position = replace(position, status="truncated")
            return await self._scored(environment, task, position)
        finally:
            await environment.close()
            del self._playing[id(environment.environment)]

    def _begin(self, environment: Environment) -> None:
        """Note that an episode is played in it."""
        if id(environment) in self._playing:
            raise ConfigurationError(
                "expected a fresh environment for every episode, but two that are played at once were given the same "
                f"{type(environment).__name__}: have the function that is given as environment make a new one each time"
            )
        self._playing[id(environment)] = environment

    def _begun(self, task: Task, observation: Observation) -> _Position:
        tools = ToolUse.of(observation, self.encoder)
        messages = tools.opening(observation.messages, self.encoder)
        ledger = Ledger.of_prompt(self._prompt(task.id, messages, tools))
        if self.record is not None:
            self.record.begin(task.id, ledger.prompt_ids)
        limit = self.settings.timeout
        status: EpisodeStatus | None = "truncated" if observation.terminated or observation.truncated else None
        return _Position(
            observation,
            tools,
            opening=messages,
            conversation=messages,
            ledgers=(ledger,),
            pays=observation.reward is not None,
            deadline=None if limit is None else asyncio.get_running_loop().time() + limit,
            status=status,
        )

    def _prompt(self, task: str, messages: Sequence[Message], tools: ToolUse) -> list[int]:
        """The episode's prompt, encoded once for all samples of a task that begin alike."""
        # Observations are plain values, so the text tells them apart where == would not (1 and True).
        said = repr((messages, tools.for_template))
        known, ids = self._prompts.get(task, (None, []))
        if known != said:
            ids = self.encoder.prompt(task, messages, tools.for_template)
            self._prompts[task] = said, ids
        return ids

    async def _turn(self, environment: GuardedEnvironment, task: Task, number: int, position: _Position) -> _Position:
        turn, ledger = len(position.turns), position.ledgers[-1]
        if position.observation.forced_action is None:
            action = await self._sampled(task, number, position)
            ledger = ledger.extended(
                action.token_ids, Source.SAMPLED, turn, action.token_logprobs, action.policy_version
            )
        else:
            action = self._forced(position)
            ledger = ledger.extended(action.token_ids, Source.FORCED, turn)
            if len(ledger) > self.max_context:
                return replace(position, status="truncated")
        if action.finish_reason == "length" and self.settings.truncated_action == "end":
            answer = Observation(reward=0.0 if position.pays else None, truncated=True)
        else:
            answer = await self._answer(environment, turn, action, position.pays)
        done = Turn(
            messages=position.observation.messages,
            action=action,
            reward=answer.reward,
            error=answer.error,
            info=answer.info,
            segment=len(position.ledgers) - 1,
        )
        position = replace(
            position,
            observation=answer,
            conversation=(*position.conversation, {"role": "assistant", "content": action.text}),
            ledgers=(*position.ledgers[:-1], ledger),
            turns=(*position.turns, done),
        )
        return self._continued(position)

    async def _sampled(self, task: Task, number: int, position: _Position) -> Action:
        turn, ledger = len(position.turns), position.ledgers[-1]
        room = min(self.sampling.max_tokens, self.max_context - len(ledger), self._left(position))
        deadline = position.deadline
        if deadline is not None and asyncio.get_running_loop().time() >= deadline:
            raise _OutOfTime
        limit = asyncio.timeout_at(deadline)
        try:
            async with limit:
                generation = await self.engine.generate(
                    ledger.token_ids.tolist(),
                    replace(self.sampling, max_tokens=room),
                    seed=request_seed(self.seed_key, task.id, number, turn),
                )
        except TimeoutError as error:
            if limit.expired():
                raise _OutOfTime from error
            raise
        validate_generation(generation, task.id)
        action = to_action(generation, self.encoder)
        return replace(action, tool_calls=position.tools.calls(action.text))

    def _left(self, position: _Position) -> int:
        """Tokens that the policy may still say."""
        limit = self.settings.max_sampled_tokens
        return self.sampling.max_tokens if limit is None else limit - position.sampled

    def _forced(self, position: _Position) -> Action:
        text = position.observation.forced_action
        assert text is not None
        calls = position.tools.calls(text)
        return Action(text, tuple(self.encoder.forced(text)), (), 0.0, True, "stop", NO_VERSION, calls)

    async def _answer(self, environment: GuardedEnvironment, turn: int, action: Action, pays: bool) -> Observation:
        try:
            return await environment.step(turn, action)
        except InvalidAction as invalid:
            reward = invalid.reward if pays else None
            if self.settings.invalid_action == "end":
                return Observation(reward=reward, terminated=True, error=invalid.message)
            forced = await environment.default_action() if self.settings.invalid_action == "default" else None
            messages = ({"role": "user", "content": invalid.message},)
            return Observation(messages, reward=reward, error=invalid.message, forced_action=forced)

    def _continued(self, position: _Position) -> _Position:
        """The episode ready for its next turn, or ended."""
        answer, turn = position.observation, len(position.turns)
        if answer.terminated:
            return replace(position, status="terminated", closing=answer.messages)
        if answer.truncated or turn >= self.settings.max_turns or self._left(position) <= 0:
            return replace(position, status="truncated", closing=answer.messages)
        messages, tools = position.tools.observed(answer.messages), position.tools.for_template
        conversation = (*position.conversation, *messages)
        ledger = position.ledgers[-1]
        following = self.encoder.continuation(position.turns[-1].action.token_ids, messages, tools)
        longer = ledger.extended(following.close, Source.FORCED, turn - 1)
        longer = longer.extended(following.observation, Source.ENVIRONMENT, turn)
        ledgers = (*position.ledgers[:-1], longer)
        if self.settings.thinking == "split" and not self.encoder.is_extension(
            longer.token_ids.tolist(), conversation, tools
        ):
            ledgers = (*position.ledgers, Ledger.of_prompt(self.encoder.first(conversation, tools), turn))
        if len(ledgers[-1]) >= self.max_context and self.settings.context_limit == "split":
            kept = (*position.opening, position.conversation[-1], *messages)
            ledgers = (*position.ledgers, Ledger.of_prompt(self.encoder.first(kept, tools), turn))
        if len(ledgers[-1]) >= self.max_context:
            return replace(position, status="truncated", closing=answer.messages)
        return replace(position, conversation=conversation, ledgers=ledgers)

    async def _scored(self, environment: GuardedEnvironment, task: Task, position: _Position) -> Episode:
        assert position.status is not None
        episode = Episode(position.turns, position.ledgers, {}, None, position.status, closing=position.closing)
        if all(turn.action.was_forced for turn in episode.turns):
            return replace(episode, failure="it ended before the policy could act")
        rewards: dict[str, float | None] = {}
        if position.pays or any(turn.reward is not None for turn in episode.turns):
            rewards[ENVIRONMENT_REWARD] = math.fsum(turn.reward or 0.0 for turn in episode.turns)
        scores = {metric_name(name): value for name, value in (await environment.score(episode)).items()}
        taken = sorted(set(scores) & {*RESERVED_NAMES, *self.scorer.names})
        if taken:
            raise RewardError(
                f"expected score() to name its rewards otherwise than {taken[0]!r}, which there is already"
            )
        rewards |= scores
        total = math.fsum(value for value in rewards.values() if value is not None)
        # Waiting for a turn does not count towards the time limit of a reward.
        async with self._scoring:
            score = await self.scorer.score(task, episode)
        rewards |= score.rewards
        if score.failure is not None:
            return replace(episode, rewards=rewards, failure=score.failure)
        if not any(value is not None for value in rewards.values()):
            return replace(episode, rewards=rewards, failure="no reward applies to this task")
        return replace(episode, rewards=rewards, reward=total + (score.total or 0.0))


class _OutOfTime(Exception):
    """The episode's time is over before the policy has spoken."""


def to_action(generation: Generation, encoder: PromptEncoder) -> Action:
    """The rich action of one generation (never forced: the policy chose it)."""
    return Action(
        text=encoder.decode(generation.token_ids),
        token_ids=generation.token_ids,
        token_logprobs=generation.logprobs,
        logprob_sum=sum(generation.logprobs),
        was_forced=False,
        finish_reason=generation.finish_reason,
        policy_version=generation.policy_version,
    )


def request_seed(*parts: object) -> int:
    """A 31-bit seed that depends on all parts and on nothing else."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4]) >> 1
