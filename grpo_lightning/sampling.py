"""How a rollout is made, in its place or ahead of it: the middle layer of the data module."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from grpo_lightning.answering import AnsweringDataModule
from grpo_lightning.errors import EngineDiedError
from grpo_lightning.rollout.advantages import Advantages, with_advantages
from grpo_lightning.rollout.ahead import Ahead, Cancel, require_version
from grpo_lightning.rollout.episode import Group
from grpo_lightning.rollout.generation_record import GenerationRecord
from grpo_lightning.rollout.metrics import rollout_metrics
from grpo_lightning.rollout.micro_batches import Layout
from grpo_lightning.rollout.rollout import Origin, Rollout, make_rollouts
from grpo_lightning.rollout.sampler import Sampler
from grpo_lightning.rollout.schedule import RolloutSchedule
from grpo_lightning.rollout.shaping import mask_truncated as without_truncated
from grpo_lightning.rollout.shaping import punish_overlong, refill, with_greedy
from grpo_lightning.rollout.validation import validate_rollout
from grpo_lightning.tasks.order import draw

if TYPE_CHECKING:
    from grpo_lightning.module import GRPOModule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampled:
    """A rollout that is sampled and judged, but not cut: that depends on the epoch that trains on it.

    Attributes:
        version: Policy version that sampled it.
        groups: Its groups, with advantages.
        tasks: Index of each group's task.
        flat: Groups without variance that others replaced.
        drawn: Tasks drawn for it.
        record: What the engine returned.
        seconds: What sampling took.
    """

    version: int
    groups: Sequence[Group]
    tasks: Sequence[int]
    flat: int
    drawn: int
    record: GenerationRecord
    seconds: float


class SamplingDataModule(AnsweringDataModule):
    """What `RolloutDataModule` is but for its settings and Lightning's hooks."""

    temperature: float
    top_p: float
    top_k: int
    order: Callable[[int, int, int], int]
    advantages: Advantages
    max_refills: int
    mask_truncated: bool
    overlong_buffer: int | None
    _schedule: RolloutSchedule
    _ahead: Ahead[Sampled] | None

    def layout(self) -> Layout:
        """How the coming epoch's rollout is cut."""
        raise NotImplementedError

    def _make_rollouts(self, module: "GRPOModule", epoch: int) -> list[Rollout]:
        """Cut an epoch's rollout for every process: the one that was sampled ahead, or one that is sampled now."""
        sampled = self._take_ahead() or self._sampled(None, self._schedule.rollouts, self._next_position())
        metrics = rollout_metrics(sampled.groups, self.multi_turn) | {
            "time/rollout_sampling_seconds": sampled.seconds,
            **({"group/replaced": float(sampled.flat)} if self.max_refills else {}),
            "sync/version": float(sampled.version),
            "sync/lag": float(module.policy_version - sampled.version),
        }
        metrics["throughput/rollout_tokens_per_second"] = metrics["tokens/sampled"] / sampled.seconds
        origin = Origin(
            sampled.version,
            self._schedule.rollouts,
            epoch,
            tuple(sampled.tasks),
            metrics,
            sampled.drawn,
            self.top_p,
            self.top_k,
        )
        return self._cut(origin, sampled.groups, module, sampled.record)

    def _look_ahead(self) -> None:
        """Begin to sample the next rollout with the policy as it is now, on a thread of its own; first process.

        It draws the tasks and the seeds that it would draw later, and counts as drawn when it is taken.
        """
        if self._ahead is not None:
            return
        try:
            self.ensure_synced()
        except EngineDiedError as error:
            logger.warning("The engine died before a rollout was sampled ahead; it will be sampled later. %s", error)
            return
        version, cancel = self.engine.policy_version, Cancel()
        sampler = replace(
            self.sampler,
            # To start the engine again ends with a sync, which is not for another thread.
            restarts=0,
            sync=partial(require_version, self.engine, version),
            within=cancel.within,
        )
        sample = partial(self._sampled, version, self._schedule.rollouts, self._next_position(), sampler)
        self._ahead = Ahead(sample, cancel)

    def _take_ahead(self) -> Sampled | None:
        """The rollout that was sampled ahead, if there is one."""
        ahead = self._ahead
        if ahead is None:
            return None
        ahead.wait()
        self._ahead = None
        try:
            return ahead.result()
        except EngineDiedError as error:
            logger.warning("The engine died while a rollout was sampled ahead; it is sampled again. %s", error)
            return None

    def _next_position(self) -> int:
        """How many tasks were drawn before; to overfit means the same tasks again and again."""
        return 0 if self._trainer().overfit_batches else self._schedule.tasks_drawn

    def _sampled(self, version: int | None, number: int, position: int, ahead: Sampler | None = None) -> Sampled:
        """Sample and judge a rollout.

        Args:
            version: Policy version that samples it; None for the one that the engine is synced to.
            number: Rollouts before it.
            position: Tasks drawn before it.
            ahead: What samples it ahead; by default what samples in this place, with a progress bar.
        """
        record = GenerationRecord()
        with self._module().phases("rollout") as sampling:
            indices, groups, flat, drawn = self._sample_groups(record, number, position, ahead)
            validate_rollout(groups)
            groups = self.judged(self._with_greedy(self._shaped(groups), ahead))
        version = self.engine.policy_version if version is None else version
        return Sampled(version, groups, indices, flat, drawn, record, sampling.seconds)

    def _cut(
        self, origin: Origin, groups: Sequence[Group], module: "GRPOModule", record: GenerationRecord | None = None
    ) -> list[Rollout]:
        sampling = self.sampler.settings(self.temperature)
        with module.phases("packing"):
            return make_rollouts(
                origin, groups, self.layout(), module.token_weights, sampling, record, module.objective.marks
            )

    def _sample_groups(
        self, record: GenerationRecord, number: int, position: int, ahead: Sampler | None
    ) -> tuple[list[int], list[Group], int, int]:
        """Tasks and groups of a rollout, how many groups were replaced, and how many tasks were drawn."""
        begin = position

        def draw(refill: int | None, count: int) -> list[tuple[int, Group]]:
            nonlocal position
            indices = self._draw_tasks(position, count)
            position += count
            groups = self._sample(
                f"Rollout {number}" if refill is None else f"Rollout {number}, refill {refill + 1}",
                [self.tasks[index] for index in indices],
                samples=self.samples_per_prompt,
                temperature=self.temperature,
                key=number if refill is None else f"{number}/{refill}",
                record=record,
                truncated=True,
                ahead=ahead,
            )
            return list(zip(indices, groups, strict=True))

        found, flat, drawn = refill(draw(None, self.prompts_per_rollout), draw, self.max_refills)
        assert position == begin + drawn
        return [index for index, _ in found], [group for _, group in found], flat, drawn

    def _shaped(self, groups: list[Group]) -> list[Group]:
        """The groups with what the settings add to their rewards, and mask."""
        if self.overlong_buffer is not None:
            groups = punish_overlong(groups, max_length=self.max_sampled, buffer=self.overlong_buffer)
        return without_truncated(groups) if self.mask_truncated else groups

    def judged(self, groups: Sequence[Group]) -> list[Group]:
        """Groups with the advantages that follow from their rewards."""
        return with_advantages(
            groups,
            self.episodes.advantage,
            self.advantages.estimate,
            part_weights=self.scorer.weights,
        )

    def _with_greedy(self, groups: list[Group], ahead: Sampler | None) -> list[Group]:
        """The groups with the reward of the greedy answer, if the advantages ask for it."""
        if not self.advantages.needs_greedy:
            return groups
        tasks = [group.task for group in groups]
        greedy = self._shaped(
            self._sample("Greedy baseline", tasks, samples=1, temperature=0.0, key="greedy", ahead=ahead)
        )
        return [with_greedy(group, other.episodes[0].reward) for group, other in zip(groups, greedy, strict=True)]

    def _draw_tasks(self, first: int, count: int | None = None) -> list[int]:
        """Indices of a rollout's tasks, after ``first`` tasks were drawn."""
        positions = range(first, first + (self.prompts_per_rollout if count is None else count))
        return [draw(self.order, position, len(self.tasks), self.seed) for position in positions]
