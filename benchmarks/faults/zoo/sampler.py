"""Faults in how the engine samples, and in the logprobs that it returns."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import grpo_lightning.rollout.player
from benchmarks.faults.fault import PRE_FLIGHT, Stage, fault, samples, updates
from grpo_lightning import RolloutDataModule
from grpo_lightning.rollout.episode import Group, ledgers_of
from grpo_lightning.rollout.ledger import Ledger
from grpo_lightning.rollout.types import Generation, SamplingSettings


def _generations(stage: Stage, change: Callable[[Generation], Generation]) -> None:
    """Something happens to what the engine returned."""

    def make(generate: Any) -> Any:
        async def wrong(self: Any, *args: Any, **settings: Any) -> Generation:
            right = await generate(self, *args, **settings)
            changed = change(right)
            stage.note(changed != right)
            return changed

        return wrong

    stage.wrap(type(stage.engine), "generate", make)


def _requests(stage: Stage, change: Callable[[SamplingSettings], SamplingSettings]) -> None:
    """The engine is asked for something else."""

    def make(generate: Any) -> Any:
        async def wrong(self: Any, prompt_ids: Any, params: SamplingSettings, **settings: Any) -> Generation:
            changed = change(params)
            stage.note(changed != params)
            generation: Generation = await generate(self, prompt_ids, changed, **settings)
            return generation

        return wrong

    stage.wrap(type(stage.engine), "generate", make)


@fault("raw_logprobs", deadline=PRE_FLIGHT, engine="raw logprobs", needs_vllm=True)
def raw_logprobs(stage: Stage) -> None:
    """At temperature 0.7 the engine returns the logprobs of temperature 1 (vLLM's default, raw_logprobs)."""
    stage.data["temperature"] = 0.7


@fault("wrong_temperature", deadline=PRE_FLIGHT)
def wrong_temperature(stage: Stage) -> None:
    """The engine samples at temperature 1 what the trainer takes for 0.7."""
    stage.data["temperature"] = 0.7
    _requests(stage, lambda params: replace(params, temperature=1.0))


@fault("wrong_temperature", deadline=PRE_FLIGHT)
def temperature_missing_in_trainer(stage: Stage) -> None:
    """The trainer does not divide its logits by the temperature of 0.7 that the engine samples with."""
    from grpo_lightning.policy import Policy

    stage.data["temperature"] = 0.7
    stage.wrap(
        Policy,
        "token_logprobs",
        lambda right: lambda self, batch, **options: right(self, batch.replace(temperature=1.0), **options),
    )


@fault("truncated_sampling", deadline=samples(64), needs_vllm=True)
def top_p_not_replayed(stage: Stage) -> None:
    """The engine samples with top-p 0.8, of which the trainer knows nothing."""
    import vllm

    def make(params: Any) -> Any:
        return lambda **settings: params(**{**settings, **({"top_p": 0.8} if "seed" in settings else {})})

    stage.wrap(vllm, "SamplingParams", make)


@fault("truncated_sampling", deadline=samples(64), needs_vllm=True)
def top_k_not_replayed(stage: Stage) -> None:
    """The engine samples among the 5 likeliest tokens, of which the trainer knows nothing."""
    import vllm

    def make(params: Any) -> Any:
        return lambda **settings: params(**{**settings, **({"top_k": 5} if "seed" in settings else {})})

    stage.wrap(vllm, "SamplingParams", make)


@fault("shifted_logprobs", deadline=PRE_FLIGHT)
def off_by_one_shift(stage: Stage) -> None:
    """Each token is stored with the logprob of the next one."""
    _generations(stage, lambda g: replace(g, logprobs=(*g.logprobs[1:], g.logprobs[-1])))


@fault("logprob_units", deadline=PRE_FLIGHT)
def logprobs_in_bits(stage: Stage) -> None:
    """The engine's logprobs are logarithms to base 2."""
    _generations(stage, lambda g: replace(g, logprobs=tuple(value / math.log(2) for value in g.logprobs)))


@fault("logprobs_missing", deadline=PRE_FLIGHT)
def logprobs_missing(stage: Stage) -> None:
    """The engine was not asked for logprobs and returns none."""
    _generations(stage, lambda g: replace(g, logprobs=()))


@fault("logprobs_missing", deadline=PRE_FLIGHT)
def logprobs_nan(stage: Stage) -> None:
    """Logprobs that are missing were filled in with NaN."""
    _generations(stage, lambda g: replace(g, logprobs=(math.nan,) * len(g.logprobs)))


@fault("logprobs_zero", deadline=PRE_FLIGHT)
def logprobs_zero_filled(stage: Stage) -> None:
    """One completion in four lost its logprobs, which were filled in with zeros."""
    count = itertools.count()
    _generations(stage, lambda g: g if next(count) % 4 else replace(g, logprobs=(0.0,) * len(g.logprobs)))


@fault("logprobs_zero", deadline=PRE_FLIGHT)
def logprobs_all_zero(stage: Stage) -> None:
    """All logprobs were lost and filled in with zeros."""
    _generations(stage, lambda g: replace(g, logprobs=(0.0,) * len(g.logprobs)))


@fault("logprobs_constant", deadline=PRE_FLIGHT)
def logprobs_constant(stage: Stage) -> None:
    """All logprobs are -1: a placeholder that was never replaced."""
    _generations(stage, lambda g: replace(g, logprobs=(-1.0,) * len(g.logprobs)))


@fault("logprobs_constant", deadline=PRE_FLIGHT)
def logprobs_averaged(stage: Stage) -> None:
    """Each token is stored with the mean logprob of its completion."""
    _generations(stage, lambda g: replace(g, logprobs=(sum(g.logprobs) / len(g.logprobs),) * len(g.logprobs)))


def with_logprobs(groups: list[Group], values: Tensor) -> list[Group]:
    """The same groups with other logprobs of their sampled tokens.

    Args:
        groups: The rollout.
        values: One for each ledger row.
    """
    lengths = [len(ledger) for ledger in ledgers_of(groups)]
    rows = iter(np.split(values.numpy(), np.cumsum(lengths)[:-1]))

    def changed(ledger: Ledger) -> Ledger:
        return replace(ledger, logprobs=np.where(ledger.sampled, next(rows), np.nan))

    result = []
    for group in groups:
        episodes = []
        for episode in group.episodes:
            ledgers = tuple(map(changed, episode.ledgers))
            known = iter([v for ledger in ledgers for v in ledger.logprobs[ledger.sampled].tolist()])
            turns = tuple(
                replace(turn, action=replace(turn.action, token_logprobs=tuple(next(known) for _ in a)))
                for turn in episode.turns
                for a in [turn.action.token_logprobs]
            )
            episodes.append(replace(episode, ledgers=ledgers, turns=turns))
        result.append(replace(group, episodes=tuple(episodes)))
    return result


@fault("logprobs_copied", deadline=PRE_FLIGHT)
def logprobs_from_trainer(stage: Stage) -> None:
    """The collector stores the trainer's own logprobs in place of the engine's."""

    def make(cut: Any) -> Any:
        def wrong(self: Any, origin: Any, groups: Any, module: Any, *rest: Any) -> Any:
            values = torch.full((sum(map(len, ledgers_of(groups))),), torch.nan, dtype=torch.float64)
            for rollout in cut(self, origin, groups, module, *rest):
                for batch in rollout.batches:
                    computed = module.policy.token_logprobs(batch).logprobs
                    values[batch.ledger_index] = computed.detach().double().clamp(max=0)
            return cut(self, origin, with_logprobs(groups, values), module, *rest)

        return wrong

    stage.wrap(RolloutDataModule, "_cut", make)


@fault("samples_repeated", deadline=PRE_FLIGHT)
def same_seed_for_all(stage: Stage) -> None:
    """The seed of a request does not depend on the sample's number: the samples of a group are copies."""
    stage.wrap(
        grpo_lightning.rollout.player,
        "request_seed",
        lambda right: lambda key, task, number, turn: right(key, task, 0, turn),
    )


@fault("forced_in_mask", deadline=updates(2))
def forced_by_the_engine(stage: Stage) -> None:
    """A budget rule replaces the last three tokens of long completions, and reports them as sampled with logprob 0."""

    def change(g: Generation) -> Generation:
        if len(g.token_ids) < 6:
            return g
        ids = (*g.token_ids[:-3], *g.token_ids[:3])
        return replace(g, token_ids=ids, logprobs=(*g.logprobs[:-3], 0.0, 0.0, 0.0))

    _generations(stage, change)


@fault(
    "sharpened_sampling",
    "samples_repeated",
    why_alias="at temperature 0.3 the samples of a group are in fact copies, which fewer tokens prove",
    deadline=samples(96),
)
def greedy_half_of_the_time(stage: Stage) -> None:
    """Half of the requests are sampled at temperature 0.3, with the logprobs of temperature 1 put beside them."""
    count = itertools.count()

    def make(generate: Any) -> Any:
        async def wrong(self: Any, prompt_ids: Any, params: SamplingSettings, **settings: Any) -> Generation:
            if params.temperature == 0 or next(count) % 2:
                ordinary: Generation = await generate(self, prompt_ids, params, **settings)
                return ordinary
            sharp: Generation = await generate(self, prompt_ids, replace(params, temperature=0.3), **settings)
            adapter = {"adapter": settings["adapter"]} if "adapter" in settings else {}
            scores = await self.score([*prompt_ids, *sharp.token_ids], **adapter)
            logprobs = tuple(min(0.0, value) for value in scores[len(prompt_ids) - 1 :])
            return replace(sharp, logprobs=logprobs)

        return wrong

    stage.wrap(type(stage.engine), "generate", make)
