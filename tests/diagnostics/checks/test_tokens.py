"""Every rollout that the types allow passes; the faults themselves are in ``examinations/test_rollout.py``."""

from functools import partial

import numpy as np
import pytest
import torch
from fakes import make_episode, make_group
from hypothesis import assume, given, settings
from trajectories import rollouts

from grpo_lightning.diagnostics import Status, Verdict
from grpo_lightning.diagnostics.checks.packed import check_packed
from grpo_lightning.diagnostics.checks.tokens import (
    check_logprob_values,
    check_sampled_tokens,
    check_sources,
    name_copies,
    replaced_logprobs,
)
from grpo_lightning.diagnostics.rollout_table import RolloutTable, sampled_runs
from grpo_lightning.functional import token_weights
from grpo_lightning.rollout.episode import ledgers_of
from grpo_lightning.rollout.generation_record import GenerationRecord
from grpo_lightning.rollout.micro_batches import Layout, cut
from grpo_lightning.rollout.packing import locate, usable_rows
from grpo_lightning.rollout.types import Generation, SamplingSettings

WEIGHTS = partial(token_weights, aggregation="sequence")


def record_of(groups):
    """What an engine would have noted, and two generations that came to nothing."""
    record = GenerationRecord()
    for group in groups:
        for episode in group.episodes:
            for number, turn in enumerate(episode.turns):
                if not turn.action.was_forced:
                    ledger = episode.ledgers[turn.segment]
                    start = int(np.flatnonzero(ledger.sampled & (ledger.turn == number))[0])
                    a = turn.action
                    generation = Generation(a.token_ids, a.token_logprobs, a.finish_reason, a.policy_version)
                    record.note(ledger.token_ids[:start].tolist(), generation)
    record.note([1, 2], Generation((3,), (-1.0,), "stop", 0))
    return record


@given(rollouts())
@settings(deadline=None)
def test_any_rollout_passes(groups):
    runs = sampled_runs(groups)
    actions = [t.action for g in groups for e in g.episodes for t in e.turns if not t.action.was_forced]
    assert [tuple(run.token_ids.tolist()) for run in runs] == [a.token_ids for a in actions]
    assert check_sources(runs).status is Status.PASS
    assert check_sampled_tokens(runs, record_of(groups)).status is Status.PASS
    assert check_sampled_tokens(runs, None).status is Status.NO_POWER


@given(rollouts())
@settings(deadline=None)
def test_any_packed_rollout_passes(groups):
    assume(usable_rows(locate(groups), WEIGHTS))
    batches = cut(groups, Layout(1, 2, 1, 2), WEIGHTS, SamplingSettings(6))[0]
    table = RolloutTable.of(groups)
    assert len(table) == sum(map(len, ledgers_of(groups)))
    verdict = check_packed(batches, table)
    assert verdict.status is Status.PASS, verdict.message
    # The second pass repeats the first.
    assert verdict.evidence["tokens"] == sum(b.num_targets for b in batches) // 2


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ([-1.0, float("nan")], "logprobs_missing"),
        ([0.0, 0.0], "logprobs_zero"),
        ([-1.0] * 40, "logprobs_constant"),
        ([-1.0] * 4, ""),
        (list(-np.linspace(0, 1, 40)), ""),
    ],
)
def test_what_took_the_place_of_logprobs(values, cause):
    assert replaced_logprobs(np.array(values)) == cause


def test_values_of_logprobs():
    assert check_logprob_values(-np.linspace(0, 1, 40)).status is Status.PASS
    assert check_logprob_values(np.full(40, -0.7)).cause == "logprobs_constant"
    assert check_logprob_values(np.array([-0.7, np.nan])).cause == "logprobs_missing"
    # A policy may be certain of all that it says.
    assert check_logprob_values(np.zeros(40)).status is Status.NO_POWER
    assert check_logprob_values(np.full(4, -0.7)).status is Status.NO_POWER


def test_a_completion_that_came_once_is_not_trained_on_twice():
    episode = make_episode([7, 8, 9])
    groups = [make_group([episode, episode])]
    verdict = check_sampled_tokens(sampled_runs(groups), record_of([make_group([episode])]))
    assert verdict.cause == "samples_repeated"
    assert verdict.evidence["wrong"] == 1
    assert check_sampled_tokens(sampled_runs(groups), record_of(groups)).status is Status.PASS


def test_tokens_that_nobody_asked_for_are_foreign():
    verdict = check_sampled_tokens(sampled_runs([make_group([make_episode([7, 8])])]), GenerationRecord())
    assert verdict.cause == "foreign_tokens"
    assert "task#0, turn 0" in str(verdict)


@pytest.mark.parametrize(
    ("tokens", "change", "cause"),
    [
        (40, 0.0, "logprobs_copied"),
        (40, 1e-9, "logprobs_replaced"),
        (20, 0.0, "logprobs_replaced"),
    ],
)
def test_copies_of_the_trainers_logprobs(tokens, change, cause):
    found = Verdict("sampled tokens", Status.FAIL, "Others.", cause="logprobs_replaced")
    # Where nothing else could have been chosen, equality is no wonder and difference no proof.
    computed = torch.cat([-torch.arange(1, tokens + 1).double(), torch.zeros(50, dtype=torch.float64)])
    stored = computed.clone()
    stored[0] += change
    stored[-1] -= 1e-5
    verdict = name_copies(found, stored, computed)
    assert verdict.cause == cause
    assert ("the trainer's own" in verdict.message) is (cause == "logprobs_copied")
