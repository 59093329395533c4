"""What the trainer itself says of a rollout before it trains on it."""

import io
import math

import pytest
import torch
from fakes import make_episode, make_group

from grpo_lightning.functional.aggregation import token_weights
from grpo_lightning.functional.entropy import high_entropy_marks
from grpo_lightning.rollout.micro_batches import Layout
from grpo_lightning.rollout.rescored import Rescored, at_rows, rescore
from grpo_lightning.rollout.rollout import Origin, make_rollouts
from grpo_lightning.rollout.types import SamplingSettings

SAMPLING = SamplingSettings(max_tokens=8, temperature=0.7)
NAN = math.nan


def some_groups(masked=()):
    """Four groups of three; each ledger is a prompt of two tokens and what was sampled."""
    groups = []
    for g in range(4):
        episodes = [make_episode(range(5, 6 + (g + i) % 4), float(i)) for i in range(3)]
        groups.append(make_group(episodes, [-1.0, 0.0, 1.0], f"task {g}"))
    return groups


def rollout_of(updates=2, micro_batches=2, passes=1, groups=None):
    origin = Origin(version=0, number=0, epoch=0, tasks=(0, 1, 2, 3), metrics={})
    layout = Layout(updates, micro_batches, 1, passes)
    [rollout] = make_rollouts(origin, groups or some_groups(), layout, token_weights, SAMPLING)
    return rollout


def say(batch):
    """Each value tells its ledger row; fillers say nonsense."""
    row = batch.ledger_index.float()
    real = batch.loss_weight > 0
    return {
        "logprobs": torch.where(real, -row, NAN),
        "entropy": torch.where(real, row / 2, NAN),
        "reference": torch.where(real, -row - 1, NAN),
    }


def trained_rows(groups):
    """``(row, update)`` of every sampled token, for two updates of two groups."""
    found, row = [], 0
    for number, group in enumerate(groups):
        for episode in group.episodes:
            for ledger in episode.ledgers:
                found += [(row + i, number // 2) for i in range(len(ledger)) if ledger.sampled[i]]
                row += len(ledger)
    return found


class TestRescore:
    @pytest.mark.parametrize("micro_batches", [1, 2, 9])
    @pytest.mark.parametrize("passes", [1, 3])
    def test_values_stand_at_their_ledger_rows(self, micro_batches, passes):
        rollout = rollout_of(micro_batches=micro_batches, passes=passes)
        found = rescore(rollout.batches, rollout.layout, say)
        expected = dict(trained_rows(some_groups()))
        assert len(found.logprobs) == 1 + max(expected)
        for row in range(len(found.logprobs)):
            if row in expected:
                values = (found.logprobs[row], found.entropy[row], found.reference[row], found.update[row])
                assert tuple(map(float, values)) == (-row, row / 2, -row - 1, expected[row])
            else:
                assert found.update[row] == -1
                assert all(math.isnan(v[row]) for v in (found.logprobs, found.entropy, found.reference))

    def test_only_the_first_pass_is_computed(self):
        rollout, seen = rollout_of(passes=3), []
        rescore(rollout.batches, rollout.layout, lambda batch: seen.append(batch.index) or say(batch))
        assert seen == [0, 1, 2, 3]

    def test_without_a_reference(self):
        rollout = rollout_of()
        found = rescore(
            rollout.batches, rollout.layout, lambda b: {k: v for k, v in say(b).items() if k != "reference"}
        )
        assert found.reference.isnan().all()
        assert found.logprobs.isfinite().any()

    def test_dtypes_and_no_gradient(self):
        rollout = rollout_of()

        def compute(batch):
            return {name: values.bfloat16().requires_grad_() for name, values in say(batch).items()}

        found = rescore(rollout.batches, rollout.layout, compute)
        assert {v.dtype for v in (found.logprobs, found.entropy, found.reference)} == {torch.float64}
        assert found.update.dtype == torch.int64
        assert not found.logprobs.requires_grad


class TestState:
    def test_round_trip_through_a_file(self):
        rollout = rollout_of()
        found = rescore(rollout.batches, rollout.layout, say)
        file = io.BytesIO()
        torch.save(found.state(), file)
        file.seek(0)
        again = Rescored.from_state(torch.load(file, weights_only=True))
        for name, values in vars(found).items():
            other = getattr(again, name)
            assert other.dtype == values.dtype
            assert torch.equal(other.nan_to_num(-7), values.nan_to_num(-7)), name

    def test_third_parts_survive(self):
        thirds = torch.tensor([1 / 3, -2 / 3, NAN], dtype=torch.float64)
        found = Rescored(thirds, thirds, thirds, torch.tensor([0, 1, -1]))
        again = Rescored.from_state(found.state())
        assert torch.equal(again.logprobs[:2], thirds[:2])
        assert again.update.tolist() == [0, 1, -1]


class TestAtRows:
    def test_rows_that_are_not_there(self):
        values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        found = at_rows(values, torch.tensor([2, -1, 0, 3, 1]))
        assert found.dtype == torch.float64
        assert found.nan_to_num(-1).tolist() == [3, -1, 1, -1, 2]

    def test_nothing(self):
        assert at_rows(torch.zeros(0), torch.tensor([0, 5])).isnan().all()
        assert len(at_rows(torch.zeros(3), torch.zeros(0, dtype=torch.int64))) == 0


class TestWithRescored:
    @pytest.mark.parametrize("micro_batches", [1, 2, 9])
    def test_batches_hold_what_was_said(self, micro_batches):
        rollout = rollout_of(micro_batches=micro_batches, passes=2)
        filled = rollout.with_rescored(rescore(rollout.batches, rollout.layout, say))
        assert filled.rescored is not None
        for batch in filled.batches:
            real = batch.loss_weight > 0
            assert torch.equal(batch.proximal_logprobs[real], -batch.ledger_index[real].float())
            assert batch.focus.all()

    def test_the_share_is_of_each_update(self):
        """High entropies in one update take nothing from the other."""
        rollout = rollout_of(passes=2)
        rescored = rescore(rollout.batches, rollout.layout, say)
        filled = rollout.with_rescored(rescored, lambda e: high_entropy_marks(e, torch.ones_like(e), share=0.5))
        chosen = {}
        for batch in filled.batches:
            columns = (batch.ledger_index.tolist(), batch.focus.tolist(), batch.loss_weight.tolist())
            for row, focus, weight in zip(*columns, strict=True):
                if weight:
                    assert chosen.setdefault(row, focus) == focus, "all passes alike"
        for update in (0, 1):
            rows = [row for row, at in trained_rows(some_groups()) if at == update]
            count = 1 + math.floor(0.5 * (len(rows) - 1))
            # The entropy grows with the row.
            assert [row for row in rows if chosen[row]] == rows[-count:]
