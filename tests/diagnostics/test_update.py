import math

import pytest
import torch
from fakes import make_row

from grpo_lightning.diagnostics.update import gradient_norm, micro_batch_evidence
from grpo_lightning.functional import TokenLogprobs
from grpo_lightning.objective import PolicyLoss
from grpo_lightning.rollout.ledger import Ledger, Source
from grpo_lightning.rollout.packing import PackedSequence, Row, filler_row, pack


def evidence_of(batch, version=7):
    n = batch.num_targets
    values = torch.arange(n, dtype=torch.float32)
    no = torch.zeros(n, dtype=torch.bool)
    loss = PolicyLoss(
        values.sum(), values / 10, clipped_low=no, clipped_high=~no, factor=values + 1, dropped=no, capped=~no
    )
    current = TokenLogprobs(-values, values + 1, values, values / 10)
    return micro_batch_evidence(batch, current, loss, torch.full((n,), torch.nan), version)


@pytest.fixture
def rows():
    # A forced opening, a turn, an observation, a turn; rows 100 to 108 of the ledger.
    ledger = Ledger.of_prompt((10, 11)).extended((12,), Source.FORCED, 0).extended((13,), Source.ENVIRONMENT, 1)
    ledger = ledger.extended((20, 21), Source.SAMPLED, 1, [-1.0, -2.0], 5).extended((14, 15), Source.ENVIRONMENT, 2)
    ledger = ledger.extended((22,), Source.SAMPLED, 2, [-3.0], 6)
    other = Ledger.of_prompt((10, 11)).extended((30,), Source.SAMPLED, 0, [-4.0], 6)
    sequences = PackedSequence(ledger, 100, (9.0, 0.5, -1.5), 0.25), PackedSequence(other, 40, (2.0,), 0.5)
    return [Row((10, 11), sequences)]


def test_sequences_are_named_by_the_ledger_row_of_their_first_sampled_token(rows):
    evidence = evidence_of(pack(rows, 1.0).replace(first_of_rollout=True))
    assert evidence.ledger_index.tolist() == [104, 105, 108, 42]
    assert evidence.sequence.tolist() == [104, 104, 104, 42]
    assert (evidence.loss_weight * evidence.advantage).tolist() == [0.125, 0.125, -0.375, 1.0]
    assert evidence.updates_since_sampling.tolist() == [2, 2, 1, 1]
    assert evidence.first_of_rollout.all()
    assert evidence.stored.isnan().all()


def test_fillers_are_no_evidence(rows):
    batch = pack([filler_row(make_row((1, 2), [(5, 6)])), *rows], 1.0)
    evidence = evidence_of(batch)
    assert len(evidence) == 4
    assert evidence.logprobs.tolist() == [-2, -3, -4, -5]
    assert evidence.log_ratio.tolist() == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert evidence.entropy.tolist() == [3, 4, 5, 6]
    assert evidence.sequence.tolist() == [104, 104, 104, 42]
    assert {str(getattr(evidence, name).dtype) for name in ("logprobs", "log_ratio", "entropy")} == {"torch.float64"}
    assert len(evidence_of(pack([filler_row(rows[0])], 1.0))) == 0


def test_norm_of_gradients_is_of_all_together():
    gradients = [torch.full((3,), 1e-30), torch.full((4,), 2.0), torch.tensor([[3.0]])]
    assert gradient_norm(gradients) == pytest.approx(math.sqrt(16 + 9))
    assert gradient_norm([torch.full((4,), 1e-30)]) == pytest.approx(2e-30)
    assert gradient_norm([]) == 0
