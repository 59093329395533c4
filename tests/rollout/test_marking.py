"""Tokens that are chosen for a whole optimizer step, whatever its micro-batches are."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from fakes import make_episode, make_group
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trajectories import rollouts

from grpo_lightning.functional.aggregation import token_weights
from grpo_lightning.functional.marks import clip_cov_marks, covariance, kl_cov_marks
from grpo_lightning.objective import Objective
from grpo_lightning.rollout.marking import with_marks
from grpo_lightning.rollout.micro_batches import Layout, cut
from grpo_lightning.rollout.packing import is_trainable
from grpo_lightning.rollout.types import SamplingSettings

SAMPLING = SamplingSettings(max_tokens=8, temperature=0.7)
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def of_objective(surrogate, **args):
    return Objective.from_settings(
        surrogate=surrogate, surrogate_args=args, clips={}, ratio_level="token", kl_estimator="k3"
    ).marks


CLIP_COV = of_objective("clip_cov", share=0.3, low=-1e9, high=1e9)
KL_COV = of_objective("kl_cov", share=0.3)
every_choice = pytest.mark.parametrize("marks", [CLIP_COV, KL_COV], ids=["clip_cov", "kl_cov"])


def marked(groups, marks, *, updates=1, micro_batches=1, processes=1, passes=1):
    """Ledger rows that are marked, once for each pass; fillers must not be."""
    layout = Layout(updates, micro_batches, processes, passes)
    found = []
    for part in cut(groups, layout, partial(token_weights, aggregation="sequence"), SAMPLING, marks):
        for batch in part:
            assert not batch.marked[batch.loss_weight == 0].any()
            found += batch.ledger_index[batch.marked].tolist()
    return sorted(found)


def some_groups(count=4, size=3):
    """Groups of different lengths and logprobs."""
    generator = torch.Generator().manual_seed(0)

    def episode(number):
        length = 1 + number % 5
        logprobs = (-3 * torch.rand(length, generator=generator)).tolist()
        return make_episode(range(5, 5 + length), float(number % 3), prompt=(4, 5), logprobs=logprobs)

    return [
        make_group([episode(size * g + i) for i in range(size)], [i - 1.0 + 0.1 * g for i in range(size)], f"task {g}")
        for g in range(count)
    ]


def logprobs_of(groups):
    return torch.tensor([v for g in groups for e in g.episodes for v in e.turns[0].action.token_logprobs])


def advantages_of(groups):
    pairs = [pair for g in groups for pair in zip(g.episodes, g.advantages, strict=True)]
    return torch.tensor([advantage for episode, (advantage,) in pairs for _ in episode.turns[0].action.token_ids])


@every_choice
class TestTheCutHasNoSay:
    @PROPERTY
    @given(groups=rollouts(), micro_batches=st.integers(1, 5), processes=st.integers(1, 3))
    def test_in_any_rollout(self, marks, groups, micro_batches, processes):
        assume(any(sum(map(is_trainable, group.episodes)) > 1 for group in groups))
        whole = marked(groups, marks)
        assert whole
        assert marked(groups, marks, micro_batches=micro_batches, processes=processes) == whole

    def test_every_pass_has_the_same_marks(self, marks):
        whole = marked(some_groups(), marks)
        assert marked(some_groups(), marks, passes=3) == sorted(3 * whole)

    def test_the_order_of_micro_batches(self, marks):
        [batches] = cut(some_groups(), Layout(1, 4, 1, 1), token_weights, SAMPLING)
        forth, back = with_marks(batches, marks), with_marks(batches[::-1], marks)[::-1]
        assert any(batch.marked.any() for batch in forth)
        for one, other in zip(forth, back, strict=True):
            assert torch.equal(one.marked, other.marked)

    def test_each_update_has_its_own_share(self, marks):
        groups = some_groups()
        rows = sum(len(ledger) for g in groups[:2] for e in g.episodes for ledger in e.ledgers)
        first, second = groups[:2], groups[2:]
        assert marked(groups, marks, updates=2) == marked(first, marks) + [rows + r for r in marked(second, marks)]

    def test_only_marks_change(self, marks):
        [batches] = cut(some_groups(), Layout(1, 3, 1, 1), token_weights, SAMPLING)
        for before, after in zip(batches, with_marks(batches, marks), strict=True):
            assert all(before.__dict__[name] is after.__dict__[name] for name in before.__dict__ if name != "marked")


class TestWhatIsChosen:
    def test_by_hand(self):
        """Marks are those of the pure functions on the step's tokens in the order of the ledger."""
        groups = some_groups()
        old = logprobs_of(groups)
        advantages = advantages_of(groups)
        chosen = kl_cov_marks(covariance(old.double(), advantages.double()), share=0.3)
        rows, row = [], 0
        for ledger in (ledger for g in groups for e in g.episodes for ledger in e.ledgers):
            rows += [row + i for i in range(len(ledger)) if ledger.sampled[i]]
            row += len(ledger)
        assert marked(groups, KL_COV, micro_batches=3) == [
            r for r, yes in zip(rows, chosen.tolist(), strict=True) if yes
        ]

    def test_the_number_is_the_share_of_the_step(self):
        tokens = sum(1 + n % 5 for n in range(12))
        assert len(marked(some_groups(), CLIP_COV, micro_batches=4)) == int(0.3 * tokens)

    def test_random_numbers_follow_from_what_was_sampled(self):
        groups = some_groups()
        torch.manual_seed(1)
        first = marked(groups, CLIP_COV)
        torch.manual_seed(2)
        assert marked(groups, CLIP_COV) == first
        [last_bits] = cut(groups, Layout(1, 1, 1, 1), token_weights, SAMPLING)
        nudged = last_bits[0].replace(old_logprobs=last_bits[0].old_logprobs * (1 + 1e-7))
        assert not torch.equal(nudged.old_logprobs, last_bits[0].old_logprobs)
        [found] = with_marks([nudged], CLIP_COV)
        assert sorted(found.ledger_index[found.marked].tolist()) == first
        [other] = with_marks([last_bits[0].replace(target_ids=last_bits[0].target_ids + 1)], CLIP_COV)
        assert sorted(other.ledger_index[other.marked].tolist()) != first

    def test_they_are_not_the_first_ones(self):
        assert (
            marked(some_groups(), CLIP_COV)
            != marked(some_groups(), of_objective("clip_cov", share=1.0, low=-1e9))[
                : len(marked(some_groups(), CLIP_COV))
            ]
        )

    def test_masked_episodes_are_not_looked_at(self):
        groups = some_groups()
        hidden = [replace(g, episodes=(replace(g.episodes[0], masked=True), *g.episodes[1:])) for g in groups]
        rows = {
            row
            for group, first in zip(hidden, first_rows(hidden), strict=True)
            for row in range(first, first + len(group.episodes[0].ledgers[0]))
        }
        found = marked(hidden, CLIP_COV, micro_batches=2)
        assert found
        assert not rows & set(found)

    def test_a_step_of_fillers(self):
        [batches] = cut(some_groups(), Layout(1, 1, 1, 1), token_weights, SAMPLING)
        empty = batches[0].replace(loss_weight=torch.zeros_like(batches[0].loss_weight))
        [found] = with_marks([empty], CLIP_COV)
        assert not found.marked.any()

    def test_clip_cov_takes_candidates_alone(self):
        groups = some_groups()
        everything = of_objective("clip_cov", share=1.0, low=0.5, high=9.0)
        old = logprobs_of(groups).double()
        advantages = advantages_of(groups).double()
        cov = covariance(old, advantages)
        keys = torch.zeros(len(cov), dtype=torch.float64)
        expected = int(clip_cov_marks(cov, share=1.0, low=0.5, high=9.0, keys_N=keys).sum())
        assert len(marked(groups, everything)) == expected > 0


def first_rows(groups):
    rows, row = [], 0
    for group in groups:
        rows.append(row)
        row += sum(len(ledger) for e in group.episodes for ledger in e.ledgers)
    return rows
