"""Faults between what was sampled and what is trained on: tokens, masks, rewards, advantages, ages."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import grpo_lightning.rollout.micro_batches
import grpo_lightning.rollout.player
import grpo_lightning.sampling
from benchmarks.faults.fault import NEXT_ROLLOUT, PRE_FLIGHT, Stage, fault, rollouts, samples, updates
from benchmarks.faults.games import multi_turn
from grpo_lightning import RolloutDataModule
from grpo_lightning.functional.advantages import Judged
from grpo_lightning.rollout.episode import Group
from grpo_lightning.rollout.ledger import Ledger, Source
from grpo_lightning.rollout.loader import BatchLoader
from grpo_lightning.rollout.packing import Row
from grpo_lightning.rollout.types import Action


def _packs_changed(stage: Stage, change: Callable[[Ledger], Ledger]) -> None:
    """The packer lays out other ledgers than those of the rollout."""

    def make(pack: Any) -> Any:
        def wrong(rows: Sequence[Row], *args: Any) -> Any:
            changed = [
                replace(row, sequences=tuple(replace(s, ledger=change(s.ledger)) for s in row.sequences))
                for row in rows
            ]
            pairs = zip(rows, changed, strict=True)
            stage.note(
                any(
                    _differ(a, b)
                    for right, wrong in pairs
                    for a, b in zip(_ledgers(right), _ledgers(wrong), strict=True)
                )
            )
            return pack(changed, *args)

        return wrong

    stage.wrap(grpo_lightning.rollout.micro_batches, "pack", make)


def _ledgers(row: Row) -> list[Ledger]:
    return [sequence.ledger for sequence in row.sequences]


def _differ(right: Ledger, wrong: Ledger) -> bool:
    return len(right) != len(wrong) or bool((right.source != wrong.source).any())


def _taken_for_sampled(source: Source) -> Callable[[Ledger], Ledger]:
    """Tokens of another source count as sampled, with logprob 0."""

    def change(ledger: Ledger) -> Ledger:
        foreign = ledger.source == source
        return replace(
            ledger,
            source=np.where(foreign, Source.SAMPLED, ledger.source),
            logprobs=np.where(foreign, 0.0, ledger.logprobs),
            policy_version=np.where(foreign, ledger.policy_version.max(), ledger.policy_version),
        )

    return change


@fault("forced_in_mask", deadline=PRE_FLIGHT)
def forced_in_mask(stage: Stage) -> None:
    """The packer's mask covers forced tokens (ends of turns that were cut off), with a logprob of 0."""
    multi_turn(stage)
    _packs_changed(stage, _taken_for_sampled(Source.FORCED))


@fault("environment_in_mask", deadline=PRE_FLIGHT)
def environment_in_mask(stage: Stage) -> None:
    """The packer's mask covers the environment's observations, with a logprob of 0."""
    multi_turn(stage)
    _packs_changed(stage, _taken_for_sampled(Source.ENVIRONMENT))


@fault("wrong_count", deadline=PRE_FLIGHT)
def eos_dropped(stage: Stage) -> None:
    """The token that ended a completion is left out of the loss, so that stopping is never learned."""

    def change(ledger: Ledger) -> Ledger:
        sampled = np.flatnonzero(ledger.sampled)
        kept = len(ledger) if len(sampled) < 2 else int(sampled[-1])
        columns = ("token_ids", "source", "logprobs", "policy_version", "turn")
        return Ledger(**{name: getattr(ledger, name)[:kept] for name in columns})

    _packs_changed(stage, change)


@fault("retokenised", deadline=updates(4))
def retokenised_turns(stage: Stage) -> None:
    """Each turn's text is encoded again: where the policy split a word otherwise, other tokens are trained."""
    multi_turn(stage)
    stage.data["temperature"] = 1.3

    def make(to_action: Any) -> Any:
        def wrong(generation: Any, encoder: Any) -> Action:
            action: Action = to_action(generation, encoder)
            ids = encoder._tokenizer(action.text, add_special_tokens=False)["input_ids"] or action.token_ids
            end = action.token_ids[-1:] if action.finish_reason == "stop" else ()
            ids = (*ids, *(end if ids[-1:] != list(end) else ()))
            stage.note(tuple(ids) != tuple(action.token_ids))
            known = (*action.token_logprobs, *[action.token_logprobs[-1]] * len(ids))
            return replace(action, token_ids=tuple(ids), token_logprobs=tuple(known[: len(ids)]))

        return wrong

    stage.wrap(grpo_lightning.rollout.player, "to_action", make)


@fault("retokenised", deadline=PRE_FLIGHT)
def targets_of_the_neighbour(stage: Stage) -> None:
    """The targets are rolled by one against everything else."""

    def make(pack: Any) -> Any:
        def wrong(rows: Sequence[Row], *args: Any) -> Any:
            batch = pack(rows, *args)
            return batch.replace(target_ids=batch.target_ids.roll(1))

        return wrong

    stage.wrap(grpo_lightning.rollout.micro_batches, "pack", make)


def _advantages(stage: Stage, change: Callable[[Group], tuple[tuple[float, ...], ...]]) -> None:
    """The groups get other advantages."""

    def changed(group: Group) -> Group:
        advantages = change(group)
        stage.note(advantages != group.advantages)
        return replace(group, advantages=advantages)

    def make(right: Any) -> Any:
        return lambda groups, *args, **settings: [changed(group) for group in right(groups, *args, **settings)]

    stage.wrap(grpo_lightning.sampling, "with_advantages", make)


@fault("advantages_zero", deadline=PRE_FLIGHT)
def advantages_zeroed(stage: Stage) -> None:
    """All advantages are 0 although rewards vary."""
    _advantages(stage, lambda group: tuple(tuple(0.0 for _ in turns) for turns in group.advantages))


@fault("advantages_sign", deadline=PRE_FLIGHT)
def advantages_sign(stage: Stage) -> None:
    """Advantages are the mean minus the reward."""
    _advantages(stage, lambda group: tuple(tuple(-a for a in turns) for turns in group.advantages))


@fault("advantages_wrong", deadline=PRE_FLIGHT)
def advantages_not_centred(stage: Stage) -> None:
    """The rewards themselves are taken for advantages."""
    _advantages(stage, lambda group: tuple((e.reward or 0.0,) * len(e.turns) for e in group.episodes))


@fault("advantages_wrong", deadline=PRE_FLIGHT)
def advantages_of_the_neighbour(stage: Stage) -> None:
    """Each sample has its neighbour's advantage."""
    _advantages(stage, lambda group: (*group.advantages[1:], group.advantages[0]))


@fault("advantages_wrong", deadline=PRE_FLIGHT)
def advantages_of_the_neighbour_packed(stage: Stage) -> None:
    """The packer lays each sequence out with the next one's advantages."""

    def make(pack: Any) -> Any:
        def wrong(rows: Sequence[Row], *args: Any) -> Any:
            changed = []
            for row in rows:
                others = (*row.sequences[1:], row.sequences[0])
                pairs = zip(row.sequences, others, strict=True)
                changed.append(replace(row, sequences=tuple(replace(s, advantages=o.advantages) for s, o in pairs)))
            return pack(changed, *args)

        return wrong

    stage.wrap(grpo_lightning.rollout.micro_batches, "pack", make)


@fault("advantages_wrong", deadline=PRE_FLIGHT)
def groups_transposed(stage: Stage) -> None:
    """Rewards are reshaped to samples by prompts instead of prompts by samples before they are compared."""
    import grpo_lightning.rollout.advantages

    def make(right: Any) -> Any:
        def wrong(judged: Judged, estimator: Any) -> Any:
            rewards, valid = judged.rewards_PG, judged.valid_PG
            stage.note(rewards.shape[0] == rewards.shape[1])
            if rewards.shape[0] != rewards.shape[1]:
                return right(judged, estimator)
            return right(replace(judged, rewards_PG=rewards.T, valid_PG=valid.T), estimator).T

        return wrong

    stage.wrap(grpo_lightning.rollout.advantages, "estimated", make)


def _hard_and_easy(completion: str, answer: str) -> float:
    """A reward that depends on the prompt far more than on the answer."""
    return float(answer) + 0.01 * len(completion)


def _rewards(stage: Stage, change: Callable[[list[float | None]], list[float | None]]) -> None:
    """The rewards of a rollout reach the wrong episodes."""

    def make(sample: Any) -> Any:
        def wrong(self: Any, *args: Any, **settings: Any) -> list[Group]:
            groups = sample(self, *args, **settings)
            right = [e.reward for g in groups for e in g.episodes]
            values = change(right)
            stage.note(values != right)
            changed = iter(values)
            return [
                replace(
                    g,
                    episodes=tuple(
                        replace(e, reward=value, rewards=dict.fromkeys(e.rewards, value))
                        for e in g.episodes
                        for value in [next(changed)]
                    ),
                )
                for g in groups
            ]

        return wrong

    stage.wrap(RolloutDataModule, "_sample", make)


@fault("rewards_wrong", deadline=samples(128), reaction="warn")
def groups_shuffled(stage: Stage) -> None:
    """Rewards come back in the order in which they were finished, and are dealt out in the order of requests."""
    stage.data["rewards"] = _hard_and_easy
    shuffler = random.Random(0)
    _rewards(stage, lambda values: shuffler.sample(values, len(values)))


@fault("rewards_wrong", deadline=samples(128), reaction="warn")
def reward_of_the_neighbour(stage: Stage) -> None:
    """Each episode has the reward of the next one in the list."""
    _rewards(stage, lambda values: [*values[1:], values[0]])


@fault("stale_rollout", deadline=NEXT_ROLLOUT)
def rollout_trained_twice(stage: Stage) -> None:
    """Every second epoch trains on the rollout of the one before."""
    stage.data["updates_per_rollout"] = 1

    def make(loader: Any) -> Any:
        def wrong(self: Any) -> Any:
            epoch = self._trainer().fit_loop.epoch_progress.current.processed
            if epoch % 2 and self.rollout is not None:
                return BatchLoader(self.rollout.batches)
            return loader(self)

        return wrong

    stage.wrap(RolloutDataModule, "train_dataloader", make)


@fault("tasks_repeated", deadline=NEXT_ROLLOUT, reaction="warn")
def same_tasks_every_time(stage: Stage) -> None:
    """The order of tasks does not go on from rollout to rollout."""
    stage.wrap(RolloutDataModule, "_draw_tasks", lambda right: lambda self, first, count=None: right(self, 0, count))


@fault("groups_mixed", deadline=PRE_FLIGHT)
def tasks_of_the_neighbour(stage: Stage) -> None:
    """Answers are put together with the tasks one place off: each group stands under the task of the one before."""

    def make(sample: Any) -> Any:
        def wrong(self: Any, *args: Any, **settings: Any) -> list[Group]:
            groups = sample(self, *args, **settings)
            before = [groups[-1], *groups[:-1]]
            return [replace(group, task=other.task) for group, other in zip(groups, before, strict=True)]

        return wrong

    stage.wrap(RolloutDataModule, "_sample", make)


def _reads_nothing(completion: str) -> float:
    """A reward that cannot read any answer."""
    return 0.0


@fault("rewards_constant", deadline=rollouts(5), reaction="warn")
def reward_reads_nothing(stage: Stage) -> None:
    """The reward looks for a format that no answer has: it is always 0."""
    stage.data["rewards"] = _reads_nothing


@fault("never_stops", deadline=PRE_FLIGHT, reaction="warn")
def cut_off_at_once(stage: Stage) -> None:
    """The limit of tokens stands at 1, where no answer can end."""
    stage.data |= {"max_tokens": 1, "samples_per_prompt": 8}


@fault("answers_empty", deadline=PRE_FLIGHT, reaction="warn")
def text_lost(stage: Stage) -> None:
    """The engine's text is not decoded: the reward sees empty answers."""
    stage.data["samples_per_prompt"] = 8
    stage.wrap(
        grpo_lightning.rollout.player,
        "to_action",
        lambda right: lambda *args: replace(right(*args), text=""),
    )


@fault("template", deadline=PRE_FLIGHT)
def template_without_turn(stage: Stage) -> None:
    """The chat template knows of a generation prompt, and shows an empty one: the policy goes on with the question."""
    path = stage.folder / "template.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    stage.data["chat_template"] = str(path)
